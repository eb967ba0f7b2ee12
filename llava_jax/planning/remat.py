"""What train.remat="auto" stands for: the lightest rematerialisation with which a step fits the devices' memory."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from llava_jax.config import Config
from llava_jax.metrics import write_json
from llava_jax.planning.compilation import compile_step
from llava_jax.planning.memory import arguments, least_bytes
from llava_jax.planning.targets import GIB, HERE, find
from llava_jax.processes import exchange, from_first, is_first
from llava_jax.program import Program

# "offload" is none of them: whether it beats "full" depends on the way to the host, which no compiler knows.
LIGHTEST_FIRST = ("none", "minimal", "dots", "full")
WITHOUT_LIMIT = "full"  # where devices do not tell how much memory they have
_KEYS = ("remat", "needed_gib", "hbm_gib", "conditions")  # of a stage in the record
USABLE = 0.95  # of the memory; batches that wait, buffers of collectives and fragmentation take some too


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and of what. Sizes are bytes per device."""

    remat: str
    limit: int | None  # None: the devices do not tell
    needed: dict[str, int]  # by those that were tried; what surely exceeds the limit is told by arithmetic

    def __str__(self) -> str:
        if self.limit is None:
            return f"train.remat=auto: {self.remat}, for these devices do not tell how much memory they have"
        sizes = ", ".join(f"{remat} needs {needed / GIB:.2f}" for remat, needed in self.needed.items())
        return f"train.remat=auto: {self.remat} ({sizes}; {USABLE:.0%} of {self.limit / GIB:.2f} GiB may be taken)"


def with_remat(config: Config, remat: str) -> Config:
    """The config with another `train.remat`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))


def choose(config: Config, limit: int | None, measure: Callable[[Config], int]) -> Choice:
    """The lightest that fits `limit` bytes per device. The heaviest need not: there is nothing else to take.

    measure: the bytes per device that the step of a config without "auto" needs.
    """
    if limit is None:
        return Choice(WITHOUT_LIMIT, None, {})
    needed = {}
    *lighter, heaviest = LIGHTEST_FIRST
    for remat in lighter:
        needed[remat] = measure(with_remat(config, remat))
        if needed[remat] <= USABLE * limit:
            return Choice(remat, limit, needed)
    return Choice(heaviest, limit, needed)


def settle(
    config: Config,
    mesh: Mesh,
    num_steps: int,
    shape: tuple[int, int],
    *,
    stage: str,
    record: Path,
    continues: bool,
) -> Config:
    """The config of a stage with its "auto" replaced, which is told, and kept in the file `record` by the stage's name.

    Steps of lighter rematerialisations are compiled until one fits; the one that is taken need not be compiled again
    when the compiled are kept. Several processes call it together and take the same. num_steps: of the stage.
    shape: its largest rows, (tokens, image slots). continues: what the record says is taken, if it is of such devices.
    """
    conditions = _conditions(config, mesh)
    kept = _read(record)
    earlier = from_first("an earlier choice of train.remat", kept.get(stage) if continues else None)
    if earlier and earlier["conditions"] == conditions:
        print(f"{stage or config.name}: train.remat=auto: {earlier['remat']}, as before", flush=True)
        return with_remat(config, earlier["remat"])
    limit = _limit()
    choice = choose(config, limit, lambda other: _needed(Program(other, mesh, num_steps), limit, shape))
    print(f"{stage or config.name}: {choice}", flush=True)
    if is_first():
        sizes = {remat: needed / GIB for remat, needed in choice.needed.items()}
        limit = choice.limit and choice.limit / GIB
        entry = dict(zip(_KEYS, (choice.remat, sizes, limit, conditions), strict=True))
        write_json(record, kept | {stage: entry})
    return with_remat(config, choice.remat)


def _conditions(config: Config, mesh: Mesh) -> dict:
    """What may differ when a run is continued, and changes what its step needs."""
    return {
        "devices": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "sharding": dataclasses.asdict(config.sharding),
        "attention": config.train.attention,
        "scan_unroll": config.train.scan_unroll,
    }


def _read(record: Path) -> dict:
    """What is kept, by stage; of a file that cannot be read, nothing."""
    if not (is_first() and record.exists()):
        return {}
    try:
        return {
            stage: {key: kept[key] for key in _KEYS} for stage, kept in json.loads(record.read_text()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(
            f"{record} cannot be read ({error!r}); train.remat=auto is chosen anew.",
            file=sys.stderr,
            flush=True,
        )
        return {}


def _limit() -> int | None:
    """The memory of the smallest device of all processes; None if one does not tell."""
    limits = exchange("the devices' memory", find(HERE).hbm_bytes)
    return None if None in limits else min(limits)


def _needed(program: Program, limit: int, shape: tuple[int, int]) -> int:
    """Bytes per device of the process whose step needs most."""
    sizes = arguments(program, *shape)
    needed = least_bytes(program, sizes, shape[0])
    if needed <= limit:
        needed = compile_step(program, find(HERE), *shape, argument_bytes=sizes.total).peak
    return max(exchange(f"compiling with train.remat={program.config.train.remat}", needed, timeout=3600.0))
