"""What a train step keeps on each device, by arithmetic on the shards of its arguments."""

import dataclasses
import math
from collections.abc import Iterable

import jax

from llava_jax.program import Program


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
    parameters = _bytes_per_device(state.trainable.values())
    return Arguments(
        parameters=parameters,
        moments=_bytes_per_device(jax.tree.leaves(state.opt_state)),
        frozen=_bytes_per_device(program.abstract_frozen().values()),
        batch=_bytes_per_device(program.abstract_batch(length, num_images).values()),
        gradients=parameters,  # one for each, which lies where the parameter does
    )


def _bytes_per_device(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.sharding.memory_kind != "pinned_host"
    )
