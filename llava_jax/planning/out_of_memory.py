"""When the devices' memory does not suffice in training: what takes it, and what to change."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from llava_jax.config import Config
from llava_jax.errors import OutOfMemoryError
from llava_jax.planning.activations import gathered_bytes, saved_bytes
from llava_jax.planning.advice import Situation, advise
from llava_jax.planning.compilation import needed_bytes
from llava_jax.planning.memory import arguments
from llava_jax.planning.targets import GIB
from llava_jax.program import Program
from llava_jax.sharding import num_row_shards


@contextlib.contextmanager
def explain_out_of_memory(config: Config, mesh: Mesh, shapes: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED into OutOfMemoryError, with the sizes by arithmetic and what would help.

    shapes: the (tokens, image slots) of the stage's rows.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(_explain(config, mesh, max(shapes), str(error))) from error


def _explain(config: Config, mesh: Mesh, shape: tuple[int, int], message: str) -> str:
    length, num_images = shape
    sizes = arguments(Program(config, mesh, 1), length, num_images)
    rows = config.data.batch_size // config.train.accumulation_steps // num_row_shards(mesh)
    parts = mesh.size // num_row_shards(mesh)
    entries = {
        "parameters that train": sizes.parameters,
        "moments": sizes.moments,
        "frozen parameters": sizes.frozen,
        "gradients": sizes.gradients,
        f"activations kept of {rows} rows": saved_bytes(config, rows, length) // parts,
        "gathered matrices": gathered_bytes(config) // parts if mesh.size > 1 else 0,
    }
    total = sum(entries.values())
    peak = max(total, needed_bytes(message, sizes.total) or 0)
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    lines = [
        "The devices' memory does not suffice: " + message.strip().partition("\n")[0][:300],
        f"GiB per device by arithmetic, rows of {length} tokens and {num_images} image slots:",
        *(f"  {name:<32} {size / GIB:>8.2f}" for name, size in entries.items()),
        f"  {'together':<32} {total / GIB:>8.2f}" + (f" of {limit / GIB:.2f}" if limit else ""),
        "What would help, cheapest first:",
    ]
    situation = Situation(
        config,
        length,
        mesh.size,
        num_row_shards(mesh),
        device.platform,
        sizes,
        peak,
        limit or peak,
    )
    lines += [
        f"  {-advice.saves / GIB:>7.2f} GiB  {advice.change}  ({advice.price})"
        for advice in advise(situation)
    ]
    return "\n".join([*lines, "python -m llava_jax.plan --topology=here compiles, with --search, what fits."])
