"""Training state on disk: orbax checkpoints of what trains, none of which is used before its digests are checked."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llava_jax.config import CheckpointConfig
from llava_jax.digests import find_damage, write_digests
from llava_jax.errors import CheckpointError, HangError
from llava_jax.optimizers.averaging import AverageState
from llava_jax.processes import exchange
from llava_jax.saved_parameters import NOT_DIGESTED, save_args
from llava_jax.step import TrainState
from llava_jax.watchdog import Watchdog

_SET_ASIDE = "set_aside"
_SAVE_TIMEOUT = 3600  # seconds after which orbax gives up a save
_OUTCOME_TIMEOUT = 30.0  # seconds for the others to say how a save went, after it has failed here


class Checkpoints:
    """The checkpoints of one stage, one numbered directory per saved step. Saving is asynchronous.

    Beside the state lies `meta`, plain JSON: the step, which is also the data position, the dataset's
    fingerprint and the checksums of the frozen parameters. A directory gets its number only when it is complete and holds
    the digests of its files; until then, and again while it is deleted, it has the name of a temporary.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, watchdog: Watchdog):
        self.directory = directory.resolve()  # tensorstore takes no `..`
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot hold checkpoints ({error.strerror}); move what is there, or choose another "
                "--workdir."
            ) from error
        self.config = config
        self.watchdog = watchdog
        self.is_first = jax.process_index() == 0
        self.saving: int | None = None  # the step that is being written
        self.failure: Exception | None = None  # what went wrong with the newest save
        self.saved_at = time.monotonic()
        self.ranking: list[int] = []  # steps, best first: the best that is saved is kept beside the newest
        self.checkpointer = self._make_checkpointer()
        self.unraisablehook, sys.unraisablehook = sys.unraisablehook, self._tell_unraisable
        self._remove_temporaries()

    def starting_point(self, num_steps: int) -> Path | None:
        """The checkpoint that a stage of `num_steps` continues; None: it starts anew.

        That is the newest good one from which training can go on, or what `resume_from_checkpoint` names, until the
        run has saved checkpoints that descend from it. Raises CheckpointError if there are checkpoints, but none to
        continue from.
        """
        asked = self.config.resume_from_checkpoint
        own = self._newest(num_steps)
        if asked and not (own and read_meta(own).get("resumed_from") == asked):
            start = self._named(asked, num_steps)
        elif own is None and saved_steps(self.directory):
            raise self._nothing_to_continue()
        else:
            start = own
        if start is None and self.is_first and (self.directory / _SET_ASIDE).exists():
            _tell(
                f"{self.directory / _SET_ASIDE} holds checkpoints, but this starts anew; to go on from one of them name it "
                "in checkpoint.resume_from_checkpoint."
            )
        return start

    def set_aside_after(self, start: Path) -> None:
        """Moves checkpoints, damaged or not, out of the way of those that will be saved; none is deleted."""
        foreign = start.parent != self.directory
        steps = [step for step in saved_steps(self.directory) if foreign or step > step_of(start)]
        if not (steps and self.is_first):
            return
        aside = self.directory / _SET_ASIDE
        aside.mkdir(exist_ok=True)
        for step in steps:
            (self.directory / str(step)).rename(_free_name(aside / str(step)))
        _tell(
            f"checkpoints {', '.join(map(str, steps))} are now in {aside}; delete them when nobody needs them."
        )

    def is_good(self, step: int) -> bool:
        """Whether the checkpoint of this step is complete and undamaged; one that is being written is waited for."""
        self._wait()
        path = self.directory / str(step)
        return step in saved_steps(self.directory) and not self._find_damage(path)

    def is_due(self) -> bool:
        """Whether `save_every_minutes` have passed since the last save, or since this last said so."""
        minutes = self.config.save_every_minutes
        if not (self.is_first and minutes) or time.monotonic() - self.saved_at < 60 * minutes:
            return False
        self.saved_at = time.monotonic()
        return True

    def save(self, state: TrainState, meta: dict, *, whole: bool = False) -> None:
        """Starts writing the state of `meta["step"]`; returns once it has been copied off the devices.

        A save that fails, perhaps of a full disk, is told and forgotten: the next one tries again.
        whole: with the optimizer's moments, even if `save_only_model`.
        """
        self._wait()
        self._prune()
        self.saved_at = time.monotonic()
        whole = whole or not self.config.save_only_model
        kept = _as_dict(state) if whole else {"step": state.step, "trainable": state.trainable}
        meta = meta | {"optimizer": whole, "resumed_from": self.config.resume_from_checkpoint}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(kept, save_args=save_args(kept)), meta=ocp.args.JsonSave(meta)
        )
        self.saving = meta["step"]
        try:
            self.checkpointer.save(self.directory / str(self.saving), args=args, force=True)
        except Exception as error:  # of orbax, tensorstore or the file system: they share no type
            self._require_agreement(error)
            self._give_up(error)

    def finish(self) -> None:
        """Waits for the last save. Raises CheckpointError if it failed."""
        self._wait()
        self._prune()
        if self.failure:
            raise CheckpointError(
                f"The last state could not be saved in {self.directory} ({_reason(self.failure)}). Make room there, or "
                "make it writable, and run the same command again: it continues from the newest checkpoint, "
                f"{max(saved_steps(self.directory), default='the start')}."
            ) from self.failure

    def close(self) -> None:
        """Waits for the last save; it tells what went wrong with it."""
        self._wait()
        self._prune()
        self.checkpointer.close()
        sys.unraisablehook = self.unraisablehook

    def restore(self, path: Path, abstract_state: TrainState) -> TrainState:
        """Reads the checkpoint `path` into the shapes, dtypes and shardings of `abstract_state`."""
        args = ocp.args.StandardRestore(_as_dict(abstract_state))
        return TrainState(**self._restore(path, ocp.StandardCheckpointHandler(), args))

    def restore_parameters(self, path: Path, abstract_trainable: dict) -> dict[str, jax.Array]:
        """Reads the trained parameters alone."""
        return self._restore_part(path, {"trainable": abstract_trainable})["trainable"]

    def restore_average(self, path: Path, abstract_state: TrainState) -> dict[str, jax.Array]:
        """Reads the moving average of the trained parameters alone, laid out as these are."""
        item = [
            {"average": abstract_state.trainable} if isinstance(part, AverageState) else None
            for part in abstract_state.opt_state
        ]
        (found,) = filter(None, self._restore_part(path, {"opt_state": item})["opt_state"])
        return found["average"]

    def _restore_part(self, path: Path, item: dict) -> dict:
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        return self._restore(path, ocp.PyTreeCheckpointHandler(), args)

    def _restore(self, path: Path, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> dict:
        try:
            with self.watchdog.waiting(f"checkpoint {path}"), ocp.Checkpointer(handler) as checkpointer:
                return checkpointer.restore(path / "state", args=args)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {path} cannot be continued: {_reason(error)} Its files are whole, so it was made with "
                "other settings (of the model, the optimizer, or what trains). Use those, or start a new run from it "
                "with init.model."
            ) from error

    def _make_checkpointer(self) -> ocp.AsyncCheckpointer:
        # Orbax calls the callback on the first process when all files are there, before it renames their directory.
        options = ocp.AsyncOptions(
            post_finalization_callback=lambda: write_digests(self._temporary(self.saving)),
            timeout_secs=_SAVE_TIMEOUT,
            # Else a directory that cannot be made leaves threads that wait for it and keep the process alive.
            create_directories_asynchronously=False,
        )
        handler = ocp.CompositeCheckpointHandler(
            "state", "meta", composite_options=ocp.CompositeOptions(async_options=options)
        )
        return ocp.AsyncCheckpointer(handler, async_options=options)

    def _temporary(self, step: int) -> Path:
        return self.directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"

    def _wait(self) -> None:
        if self.saving is None:
            return
        try:
            with self.watchdog.waiting(f"checkpoint {self.saving} to be written"):
                self.checkpointer.wait_until_finished()
        except Exception as error:
            self._require_agreement(error)
            self._give_up(error)
        else:
            self._require_agreement(None)
            self.saving = self.failure = None

    def _require_agreement(self, error: Exception | None) -> None:
        """Raises CheckpointError when a save failed on this process alone: the others may still wait for it. All
        processes call it at the end of a save."""
        try:
            timeout = _OUTCOME_TIMEOUT if error else _SAVE_TIMEOUT
            outcomes = exchange(f"checkpoint {self.saving}", error is None, timeout)
        except HangError:
            if error is None:
                raise
            outcomes = [True]
        if error and any(outcomes):
            self.failure, failed, self.saving = error, self.saving, None
            newest = max(saved_steps(self.directory), default="the start")
            raise CheckpointError(
                f"Checkpoint {failed} could not be saved by process {jax.process_index()} alone ({_reason(error)}), "
                "so that the others wait for it. Mend that and run the same command again: it continues from the newest "
                f"checkpoint, {newest}."
            ) from error

    def _give_up(self, error: Exception) -> None:
        newest = max(saved_steps(self.directory), default=None)
        _tell(
            f"checkpoint {self.saving} could not be saved ({_reason(error)}). Training goes on and the next save tries "
            f"again; {f'the newest checkpoint is {newest}' if newest else 'there is no checkpoint yet'}."
        )
        self.failure, self.saving = error, None
        self.checkpointer = self._make_checkpointer()  # the old one may be in the middle of something
        self._remove_temporaries()

    def _tell_unraisable(self, unraisable) -> None:
        """When one array cannot be written, orbax stops listening to the others, and each of them complains of that."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self.unraisablehook(unraisable)

    def _remove_temporaries(self) -> None:
        if self.is_first:
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        limit = self.config.save_total_limit
        if self.is_first and limit:
            saved = saved_steps(self.directory)
            best = next((step for step in self.ranking if step in saved), None)
            for step in [step for step in saved if step != best][:-limit]:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
                shutil.rmtree((self.directory / str(step)).rename(self._temporary(step)), ignore_errors=True)

    def _newest(self, num_steps: int) -> Path | None:
        """The newest good checkpoint that can be continued, or is the stage's last."""
        for step in _verified(self.directory, self._find_damage):
            path = self.directory / str(step)
            if step == num_steps or (step < num_steps and read_meta(path)["optimizer"]):
                return path
        return None

    def _named(self, asked: str, num_steps: int) -> Path:
        """The checkpoint that `resume_from_checkpoint` asks for."""
        key = f"checkpoint.resume_from_checkpoint={asked}"
        if asked.lower() in ("true", "latest", "auto"):
            raise CheckpointError(
                f"{key} names no checkpoint; leave it out: without it a run continues from its newest, and another run's is "
                "named by its path, RUN/checkpoints/[STAGE/]STEP."
            )
        path = self.directory / asked if _is_step(asked) else Path(asked).expanduser().resolve()
        if not (_is_step(path.name.partition(".")[0]) and path.is_dir()):
            raise CheckpointError(
                f"{key}: {path} is no checkpoint; name one of a run's checkpoints/[STAGE/]STEP."
            )
        if damage := self._find_damage(path):
            raise CheckpointError(f"{key} is damaged: {damage}. Name another one.")
        obstacle = None
        if step_of(path) > num_steps:
            obstacle = f"is of a later step than this stage's last, {num_steps}"
        elif step_of(path) < num_steps:
            obstacle = what_prevents_training(read_meta(path))
        if obstacle:
            raise CheckpointError(
                f"{key} cannot be continued: it {obstacle}. Name another one, or start a new run from it with init.model."
            )
        if step_of(path) == num_steps and path.parent != self.directory:
            raise CheckpointError(
                f"{key} is the end of its stage, step {num_steps} of {num_steps}, so nothing is left to train. To train "
                "that run's model further, drop this setting and set --config.init.model to that run's directory."
            )
        return path

    def _nothing_to_continue(self) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} holds checkpoints, but none that can be continued: they are damaged (named above) or "
            "were saved with checkpoint.save_only_model. Put a good one back, start a new run with init.model, or start "
            "this one anew with checkpoint.overwrite_output_dir=True."
        )

    def _find_damage(self, path: Path) -> str | None:
        """As the function; each process reads its share of the files, and all learn whether one found something."""
        index, count = jax.process_index(), jax.process_count()
        with self.watchdog.waiting(f"the digests of {path}"):
            damage = find_damage(path, later=NOT_DIGESTED, process_index=index, process_count=count)
            if count > 1 and multihost_utils.process_allgather(np.array(damage is not None)).any():
                return damage or "another process found which file"
        return damage or _misnamed(path)


def saved_steps(directory: Path) -> list[int]:
    """The steps of complete checkpoints, damaged or not, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path.name) and path.is_dir())


def step_of(path: Path) -> int:
    """The step of a checkpoint, be it one that was set aside under a longer name."""
    return int(path.name.partition(".")[0])


def verified_steps(directory: Path) -> Iterator[int]:
    """The steps of good checkpoints, newest first. Reads every file of one to say so, and tells of damaged ones."""
    return _verified(directory, lambda path: find_damage(path, later=NOT_DIGESTED) or _misnamed(path))


def read_meta(path: Path) -> dict:
    """What lies beside the state in the checkpoint `path`."""
    try:
        return json.loads((path / "meta/metadata").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def what_prevents_training(meta: dict) -> str | None:
    """Why training cannot go on from the checkpoint beside which `meta` lies; None: it can."""
    if not meta["optimizer"]:
        return "was saved without the optimizer's moments"
    if meta.get("averaged"):
        return "ended its stage with the average of the parameters (optimizer.ema_decay) in their place"
    if meta.get("evaluated_as", meta["step"]) != meta["step"]:
        return f"ended its stage with the parameters of step {meta['evaluated_as']} (train.load_best_model_at_end)"
    return None


def _misnamed(path: Path) -> str | None:
    step = read_meta(path)["step"]
    return None if step == step_of(path) else f"it holds the state after step {step}"


def _verified(directory: Path, find_damage: Callable[[Path], str | None]) -> Iterator[int]:
    for step in reversed(saved_steps(directory)):
        if damage := find_damage(directory / str(step)):
            _tell(f"checkpoint {directory / str(step)} is damaged and not used: {damage}.")
        else:
            yield step


def _is_step(name: str) -> bool:
    """Whether a directory of this name is a checkpoint: copies have other names, 0020 among them."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def _free_name(path: Path) -> Path:
    """`path`, or with a number behind its name where there is something already."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    )
    return next(name for name in names if not name.exists())


def _as_dict(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


_CAUSES = "No space left on device|File too large|Disk quota exceeded|Read-only file system|Permission denied"


def _reason(error: Exception) -> str:
    """The first line of what went wrong, and the system's word for it, which may stand far behind."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    cause = re.search(_CAUSES, str(error))
    return f"{cause[0]}: {line}" if cause and cause[0] not in line else line


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} cannot be read: {_reason(error)} Mend that; only if files are lost or damaged, and there is "
        "no copy of them, move that directory away to continue from the one before it."
    )
