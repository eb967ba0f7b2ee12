"""Looks for the lightest rematerialisation, and with each the most rows at a time, that fit."""

import dataclasses
from collections.abc import Callable

from llava_jax.config import Config
from llava_jax.planning.activations import saved_bytes
from llava_jax.planning.memory import arguments
from llava_jax.planning.stage_plan import StagePlan, make_plan, rows_per_device
from llava_jax.planning.targets import Target
from llava_jax.planning.workload import Workload
from llava_jax.program import Program
from llava_jax.sharding import make_mesh, num_row_shards

LIGHTEST_FIRST = ("none", "dots", "full")


def search(
    config: Config, target: Target, workload: Workload, tell: Callable[[StagePlan], None]
) -> list[StagePlan]:
    """The plans that fit, one per rematerialisation, lightest first: each has the most rows per device that do.

    The rows of a step stay those of the recipe; accumulation divides them. tell(plan) is called with each that is
    compiled. Empty if nothing fits.
    """
    fitting = []
    for remat in LIGHTEST_FIRST:
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
    mesh = make_mesh(config.mesh, target.devices)
    given = arguments(Program(config, mesh, 1), workload.length, workload.num_images).total
    kept = saved_bytes(config, rows_per_device(config, mesh), workload.length)
    parts = mesh.size // num_row_shards(mesh)  # among which each row is split
    return given + kept // parts > target.hbm_bytes
