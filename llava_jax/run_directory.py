"""The run directory: whose it is, with which settings, and that only one process works in it."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from llava_jax.config import Config, split_names, to_json
from llava_jax.errors import CheckpointError, ConfigError, InUseError
from llava_jax.metrics import write_json
from llava_jax.recipe import Recipe
from llava_jax.weights import RUN_FORMAT

# Settings that may differ when a run is continued: they change neither samples nor weights.
HARMLESS = (
    "train.log_steps",
    "train.remat",
    "train.scan_unroll",
    "checkpoint.",
    "name",
    "data.path",  # what the files hold is told by the pipeline's fingerprint
    "data.image_folder",
    "data.dataset_dir",
    "data.eval_path",
    "data.num_threads",
    "data.cache_dir",
    "data.overwrite_cache",
    "data.on_bad_sample",
    "data.max_bad_share",
    "mesh.",
    "evaluate.",
    "export.",
)


def open_run_directory(recipe: Recipe, workdir: Path) -> IO:
    """Makes the run directory, writes `config.json` and takes the lock, which lasts while the result is open.

    A directory that holds checkpoints must be of the same run. Raises ConfigError naming the settings that differ,
    CheckpointError when nothing can be written there, InUseError when another process trains in it.
    """
    asked = {
        "format": RUN_FORMAT,
        "name": recipe.name,
        "stages": {n: _absolute(c) for n, c in recipe.stages.items()},
    }
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(entry.name != ".lock" for entry in workdir.iterdir()):
            raise ConfigError(f"{workdir} holds files but no run (no config.json); choose another --workdir.")
        lock = _lock(workdir)
        if any(workdir.glob("checkpoints/**/commit_success.txt")):
            _check_same_run(path, asked)
        write_json(path, asked)
    except OSError as error:
        raise CheckpointError(
            f"The run directory {workdir} cannot be written ({error.strerror}); choose another --workdir."
        ) from error
    return lock


def _lock(workdir: Path) -> IO:
    """An exclusive lock, which the system releases when the process ends, however it ends."""
    file = (workdir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise InUseError(
            f"{workdir} is in use by {holder}; wait for it, or choose another --workdir."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file


def _absolute(config: Config) -> dict:
    """The config as JSON, with absolute paths in `init`, so that the run can be opened from anywhere."""
    fields = to_json(config)
    absolute = {
        key: ",".join(map(os.path.abspath, split_names(path)))
        if key == "adapters"
        else path and os.path.abspath(path)
        for key, path in fields["init"].items()
    }
    return fields | {"init": absolute}


def _check_same_run(path: Path, asked: dict) -> None:
    try:
        before = _flatten(json.loads(path.read_text())["stages"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no run's settings ({error!r}); choose another --workdir."
        ) from error
    now = _flatten(json.loads(json.dumps(asked["stages"])))
    differing = [
        f"{key}={now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.partition("/")[2].startswith(HARMLESS)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run with other settings: {', '.join(differing[:5])}"
            f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}. Continue it with the same settings, or "
            "choose another --workdir; to train a finished model further, start a new run with init.model."
        )


def _flatten(stages: dict) -> dict:
    """{"pretrain/optimizer.learning_rate": 0.001, ...}"""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix[-1] != "/" else prefix + key, inner)
        else:
            flat[prefix] = value

    for stage, config in stages.items():
        visit(f"{stage}/", config)
    return flat
