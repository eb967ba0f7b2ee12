"""The trained parameters in a checkpoint, as leaves that are read when they are needed."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.convert.source import Leaf
from llava_jax.errors import CheckpointError


class SavedParameters:
    """The trained parameters in one checkpoint, read one at a time into host memory."""

    def __init__(self, directory: Path, step: int):
        self.path = directory.absolute() / str(step)
        self.checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            self.metadata = self.checkpointer.metadata(self.path / "state").item_metadata.tree["trainable"]
            meta = json.loads((self.path / "meta/metadata").read_text())
        except Exception as error:
            raise _unreadable(self.path, error) from error
        self.frozen: dict[str, int] = meta["frozen"]  # checksums of the other parameters, by name

    def leaves(self) -> dict[str, Leaf]:
        return {
            name: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype), lambda name=name: self._read(name))
            for name, leaf in self.metadata.items()
        }

    def _read(self, name: str) -> np.ndarray:
        leaf = self.metadata[name]
        item = {"trainable": {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}}
        restore_args = {"trainable": {name: ocp.RestoreArgs(restore_type=np.ndarray)}}
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        try:
            return self.checkpointer.restore(self.path / "state", args=args)["trainable"][name]
        except Exception as error:
            raise _unreadable(self.path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"The checkpoint {path} cannot be read: {reason[0][:300]} "
        "Delete that directory to use the one before it, or train again if there is none."
    )
