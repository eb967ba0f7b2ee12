"""Looks for the rematerialisations, and with each the most rows at a time, that fit."""

import dataclasses
from collections.abc import Callable

from llava_jax.config import Config
from llava_jax.planning.memory import arguments, least_bytes
from llava_jax.planning.remat import LIGHTEST_FIRST, choose, with_remat
from llava_jax.planning.stage_plan import StagePlan, make_plan
from llava_jax.planning.targets import Target
from llava_jax.planning.workload import Workload
from llava_jax.program import Program
from llava_jax.sharding import make_mesh, num_row_shards
from llava_jax.step import can_offload


def plan_lightest(
    config: Config, target: Target, workload: Workload, tell: Callable[[str], None]
) -> StagePlan:
    """The plan of a stage whose train.remat is "auto", as training would replace that; tell(how)."""
    plans = {}

    def measure(candidate: Config) -> int:
        plans[candidate.train.remat] = make_plan(candidate, target, workload)
        return plans[candidate.train.remat].compiled.peak

    choice = choose(config, target.hbm_bytes, measure)
    tell(str(choice))
    return plans.get(choice.remat) or make_plan(with_remat(config, choice.remat), target, workload)


def search(
    config: Config, target: Target, workload: Workload, tell: Callable[[StagePlan], None]
) -> list[StagePlan]:
    """The plans that fit, one per rematerialisation, lightest first, "offload" last: each has the most rows per device
    that do.

    The rows of a step stay those of the recipe; accumulation divides them. tell(plan) is called with each that is
    compiled. Empty if nothing fits.
    """
    fitting = []
    offload = ("offload",) if can_offload(target.devices[0]) else ()
    for remat in (*LIGHTEST_FIRST, *offload):
        for candidate in _candidates(config, target, remat):
            if _surely_too_large(candidate, target, workload):
                continue
            plan = make_plan(candidate, target, workload)
            tell(plan)
            if plan.compiled.fits is not False:
                fitting.append(plan)
                break
    return fitting


def flags(plan: StagePlan) -> str:
    """What to add to the command to train as planned."""
    train = plan.config.train
    return f"--config.train.remat={train.remat} --config.train.accumulation_steps={train.accumulation_steps}"


def _candidates(config: Config, target: Target, remat: str) -> list[Config]:
    """The stage with this rematerialisation and all that accumulation allows, most rows at a time first.

    What does not fit is refused within seconds, what fits takes minutes to compile.
    """
    shards = num_row_shards(make_mesh(config.mesh, target.devices))
    size = config.data.batch_size
    steps = [n for n in range(1, size // shards + 1) if size % (n * shards) == 0]
    return [
        dataclasses.replace(
            config, train=dataclasses.replace(config.train, remat=remat, accumulation_steps=n)
        )
        for n in steps
    ]


def _surely_too_large(config: Config, target: Target, workload: Workload) -> bool:
    """Whether arguments and kept activations alone exceed the memory, so that no compiler need be asked."""
    if target.hbm_bytes is None:
        return False
    program = Program(config, make_mesh(config.mesh, target.devices), 1)
    sizes = arguments(program, workload.length, workload.num_images)
    return least_bytes(program, sizes, workload.length) > target.hbm_bytes
