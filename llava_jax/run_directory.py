"""The run directory: whose it is, with which settings, and the settings that may change in it."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from llava_jax.checkpoint import saved_steps
from llava_jax.config import Config, split_names
from llava_jax.config_values import to_json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.metrics import MetricsLog, write_json
from llava_jax.recipe import Recipe
from llava_jax.run_lock import RunLock
from llava_jax.weights import RUN_FORMAT, checkpoint_directory

# Settings that may differ when a run is continued: they change neither samples nor weights.
HARMLESS = (
    "train.log_steps",
    "train.report_to",
    "train.profile_steps",
    "train.eval_steps",
    "train.max_skipped_steps",
    "train.hang_timeout_minutes",
    "train.attention",
    "train.remat",
    "train.scan_unroll",
    "train.compiled_dir",
    "checkpoint.",
    "name",
    "init.change_template",
    "data.path",  # what the files hold is told by the pipeline's fingerprint
    "data.image_folder",
    "data.dataset_dir",
    "data.eval_path",
    "data.eval_dataset",
    "data.num_threads",
    "data.cache_dir",
    "data.overwrite_cache",
    "data.on_bad_sample",
    "data.max_bad_share",
    "mesh.",
    "sharding.",
    "evaluate.",
    "export.",
)


def open_run_directory(recipe: Recipe, workdir: Path) -> contextlib.AbstractContextManager:
    """Makes the run directory, writes `config.json` and takes the lock, which lasts as long as the result's block.

    A directory that holds checkpoints must be of the same run, except for stages that `overwrite_output_dir` starts
    anew: theirs are deleted. Of several processes one calls it. Raises ConfigError naming the settings
    that differ, CheckpointError when nothing can be written there, InUseError when another process trains in it.
    """
    asked = {
        "format": RUN_FORMAT,
        "name": recipe.name,
        "stages": {n: _absolute(c) for n, c in recipe.stages.items()},
    }
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(not entry.name.startswith(".lock") for entry in workdir.iterdir()):
            raise ConfigError(f"{workdir} holds files but no run (no config.json); choose another --workdir.")
        lock = RunLock(workdir)
        try:
            anew = _overwrite(recipe, workdir)
            if _holds_checkpoints(workdir):
                _check_same_run(path, asked, anew)
            write_json(path, asked)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise CheckpointError(
            f"The run directory {workdir} cannot be written ({error.strerror}); choose another --workdir."
        ) from error
    return lock


def _holds_checkpoints(workdir: Path) -> bool:
    """Whether any stage has saved something, be it damaged."""
    root = workdir / "checkpoints"
    # A stage's are in one of the first two, and what it has set aside one below.
    return any(saved_steps(directory) for directory in (root, *root.glob("*"), *root.glob("*/*")))


def _overwrite(recipe: Recipe, workdir: Path) -> list[str]:
    """Deletes what earlier runs trained of the first stage with `overwrite_output_dir` and of those after it.

    Returns the names of these stages.
    """
    stages = list(recipe.stages)
    asked = [name for name in stages if recipe.stages[name].checkpoint.overwrite_output_dir]
    anew = stages[stages.index(asked[0]) :] if asked else []
    for name in anew:
        shutil.rmtree(checkpoint_directory(workdir, name), ignore_errors=True)
        MetricsLog(workdir / "metrics.jsonl").forget_after(name, -1)
    return anew


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


def _check_same_run(path: Path, asked: dict, anew: list[str]) -> None:
    """Compares the settings of the stages that do not start anew."""
    try:
        before = flatten(json.loads(path.read_text())["stages"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold a run's settings ({error!r}). Put a copy of it back, or choose another --workdir; "
            f"checkpoint.resume_from_checkpoint={path.parent}/checkpoints/[STAGE/]STEP continues there what was saved here."
        ) from error
    now = flatten(json.loads(json.dumps(asked["stages"])))
    default = flatten({name: json.loads(json.dumps(to_json(Config()))) for name in asked["stages"]})
    # An older version did what is now the default of settings that it did not have.
    before = {key: default[key] for key in now.keys() & default.keys() - before.keys()} | before
    differing = [
        f"{key.removeprefix('/')}={now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key.partition("/")[0] not in anew
        and not key.partition("/")[2].startswith(HARMLESS)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run with other settings: {', '.join(differing[:5])}"
            f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}. Continue it with the same settings, "
            "choose another --workdir, or start it anew with checkpoint.overwrite_output_dir=True; to train a finished "
            "model further, start a new run with init.model, or with more steps and "
            "checkpoint.resume_from_checkpoint, which keeps the moments."
        )


def flatten(stages: dict) -> dict:
    """Settings of stages as one dict: {"pretrain/optimizer.learning_rate": 0.001, ...}."""
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
