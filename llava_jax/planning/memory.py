"""What a train step keeps on each device, by arithmetic on the shards of its arguments."""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax

from llava_jax.planning.activations import saved_bytes
from llava_jax.program import Program
from llava_jax.sharding import gradient_sharding, num_row_shards


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes per device of what a step is given, and of the gradients that it makes."""

    parameters: int  # those that train
    moments: int  # on the device; what lies in the host's memory between steps does not count
    frozen: int
    batch: int
    gradients: int

    @property
    def total(self) -> int:
        """Of the arguments alone."""
        return self.parameters + self.moments + self.frozen + self.batch


def arguments(program: Program, length: int, num_images: int) -> Arguments:
    """What the step of rows of that many tokens and image slots is given; nothing is allocated."""
    state = program.abstract_state()
    return Arguments(
        parameters=_bytes_per_device(state.trainable.values()),
        moments=_bytes_per_device(jax.tree.leaves(state.opt_state)),
        frozen=_bytes_per_device(program.abstract_frozen().values()),
        batch=_bytes_per_device(program.abstract_batch(length, num_images).values()),
        gradients=_bytes_per_device(_gradients(program, state.trainable)),
    )


def least_bytes(program: Program, sizes: Arguments, length: int) -> int:
    """What a step of rows of that many tokens needs in any case: its arguments, and the activations it keeps."""
    config, mesh = program.config, program.mesh
    shards = num_row_shards(mesh)
    rows = config.data.batch_size // config.train.accumulation_steps // shards
    parts = mesh.size // shards  # among which each row is split
    return sizes.total + saved_bytes(config, rows, length) // parts


def _gradients(
    program: Program, trainable: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[jax.ShapeDtypeStruct]:
    zero = program.config.sharding.zero
    for name, leaf in trainable.items():
        sharding = gradient_sharding(program.mesh, name, leaf.shape, zero=zero)
        yield jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_per_device(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.sharding.memory_kind != "pinned_host"
    )
