"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, if they are installed."""

import hashlib
import importlib
import os
from pathlib import Path
from typing import Protocol

from llava_jax.config import Config, split_names
from llava_jax.errors import ConfigError

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # whose names are those of our extras


class Reporter(Protocol):
    """Takes rows of metrics.jsonl."""

    def append(self, row: dict) -> None:
        """Reports one row."""

    def close(self) -> None:
        """Writes what is left."""


def check_reporters(config: Config) -> None:
    """Raises ConfigError when what train.report_to names is not installed."""
    for name in split_names(config.train.report_to):
        if name in _MODULES:
            _load(name)


def open_reporters(config: Config, stage: str, workdir: Path) -> list[Reporter]:
    """What a stage's train.report_to asks for. stage: its name, "" for an only one."""
    makers = {"tensorboard": TensorBoard, "wandb": WandB}
    names = [name for name in split_names(config.train.report_to) if name in makers]
    return [makers[name](config, stage, workdir) for name in names]


class TensorBoard:
    """Event files in tensorboard/ of the run directory; of steps that are taken again, the later ones count."""

    def __init__(self, config: Config, stage: str, workdir: Path):
        del config
        self.directory = workdir / "tensorboard" / stage
        self.module = _load("tensorboard")
        self.writer = None

    def append(self, row: dict) -> None:
        if self.writer is None:
            step = row["step"]
            self.writer = self.module.SummaryWriter(
                str(self.directory), purge_step=step, filename_suffix=f".{step}"
            )
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """One run per run directory, continued when that is; a stage's metrics have its name before theirs."""

    def __init__(self, config: Config, stage: str, workdir: Path):
        self.prefix = f"{stage}/" if stage else ""
        wandb = _load("wandb")
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "llava_jax"),
                name=config.name,
                id=hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(workdir),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"train.report_to='wandb': {error} Run wandb login, or set WANDB_MODE=offline in the environment."
            ) from error
        self.run.define_metric(f"{self.prefix}*", step_metric=f"{self.prefix}step")

    def append(self, row: dict) -> None:
        numbers = _numbers(row) | {"step": row["step"]}
        self.run.log({self.prefix + key: value for key, value in numbers.items()})

    def close(self) -> None:
        self.run.finish()


def _numbers(row: dict) -> dict[str, float]:
    """A row's figures, without those that were not finite."""
    return {key: value for key, value in row.items() if key not in ("stage", "step") and value is not None}


def _load(name: str):
    module = _MODULES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"train.report_to={name!r} needs {module}, which cannot be imported ({error}): pip install -c constraints.txt "
            f"-e '.[{name}]', or set train.report_to=none. metrics.jsonl holds the same figures."
        ) from error
