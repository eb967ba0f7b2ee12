"""The trained parameters in a checkpoint, as leaves that are read when they are needed, and part by part."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.convert.errors import ConversionError
from llava_jax.convert.orbax_weights import StoredArrays
from llava_jax.convert.source import Index, Leaf
from llava_jax.digests import find_damage
from llava_jax.errors import CheckpointError

# The least that can be read of a large array without the rest. One layer of a 7B decoder's MLP takes 180 MB.
_CHUNK_BYTES = 64 * 2**20
# Orbax touches these two after a checkpoint's digests are written; nothing that is restored depends on them.
NOT_DIGESTED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def save_args(state):
    """A tree of arrays -> orbax's SaveArgs for each, which cut it so that `SavedParameters` can read parts.

    Matrices of stacked layers, which alone have three axes, are cut into layers first.
    """
    return jax.tree.map(
        lambda array: ocp.SaveArgs(
            chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if np.ndim(array) == 3 else ()
        ),
        state,
    )


class SavedParameters:
    """The trained parameters in one checkpoint. Raises CheckpointError where it cannot be read.

    Arrays that were not saved with `save_args` are read whole.
    """

    def __init__(self, directory: Path, step: int):
        self.path = directory.resolve() / str(step)  # tensorstore takes no `..`
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                self.metadata = checkpointer.metadata(self.path / "state").item_metadata.tree["trainable"]
            meta = json.loads((self.path / "meta/metadata").read_text())
        except Exception as error:
            raise _unreadable(self.path, error) from error
        self.frozen: dict[str, int] = meta["frozen"]  # checksums of the other parameters, by name

    def leaves(self) -> dict[str, Leaf]:
        return {
            name: Leaf(
                tuple(leaf.shape),
                np.dtype(leaf.dtype),
                functools.partial(self._read, name),
                _reading_axis(leaf),
            )
            for name, leaf in self.metadata.items()
        }

    def _read(self, name: str, index: Index = ()) -> np.ndarray:
        try:
            # Opened anew: a run may have been replaced since, and its change has to be noticed.
            return StoredArrays(self.path / "state").read(f"trainable.{name}", index)
        except ConversionError as error:
            raise _unreadable(self.path, error.__cause__) from error


def _reading_axis(leaf: ocp.metadata.ArrayMetadata) -> int | None:
    """The first axis that the chunks on the disk divide. None if they are large: each part would decode them again."""
    chunk = leaf.storage.chunk_shape
    if math.prod(chunk) * np.dtype(leaf.dtype).itemsize > _CHUNK_BYTES:
        return None
    return next((axis for axis, size in enumerate(leaf.shape) if chunk[axis] < size), None)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error with what is known: that files are damaged is said only where their digests tell it."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    damage = find_damage(path, later=NOT_DIGESTED)
    cure = "By their digests its files are whole; look at the path, its permissions and the file system."
    if damage:
        cure = (
            f"Of its files, {damage}; mend that. Only if files are lost or damaged, and there is no copy of them, move "
            "that directory away to use the one before it."
        )
    return CheckpointError(f"The checkpoint {path} cannot be read: {reason[0][:300]} {cure}")
