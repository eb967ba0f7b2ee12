"""Training state on disk: an orbax checkpoint of what trains, and the facts that a resume must agree with."""

import dataclasses
from pathlib import Path

import orbax.checkpoint as ocp

from llava_jax.config import CheckpointConfig
from llava_jax.errors import CheckpointError
from llava_jax.step import TrainState


class Checkpoints:
    """The checkpoints of one stage, one numbered directory per saved step. Saving is asynchronous.

    Beside the state lies `meta`, plain JSON: the step, which is also the data position, the dataset's
    fingerprint and the checksums of the frozen parameters.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = directory.absolute()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.save_total_limit, create=True, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, meta: dict) -> None:
        """Starts writing; returns once the state has been copied off the devices."""
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def read_meta(self, step: int) -> dict:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except Exception as error:
            raise _unreadable(self.directory / str(step), error) from error

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Reads the state saved at `step` into the shapes, dtypes and shardings of `abstract_state`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_as_dict(abstract_state)))
        try:
            return TrainState(**self.manager.restore(step, args=args).state)
        except Exception as error:
            raise _unreadable(self.directory / str(step), error) from error

    def close(self) -> None:
        """Waits for the last write and raises what went wrong in it."""
        try:
            self.manager.wait_until_finished()
        finally:
            self.manager.close()


def saved_steps(directory: Path) -> list[int]:
    """The steps of complete checkpoints, in ascending order."""
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def _as_dict(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"The checkpoint {path} cannot be read: {reason[0][:300]} "
        "Delete that directory to continue from the one before it, or from the start if there is none."
    )
