"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, if they are installed."""

import hashlib
import html
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llava_jax.config import Config, split_names
from llava_jax.config_values import to_json
from llava_jax.errors import ConfigError

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # whose names are those of our extras


class Reporter(Protocol):
    """Takes rows of metrics.jsonl."""

    def append(self, row: dict) -> None:
        """Reports one row."""

    def append_answers(self, step: int, answers: Sequence[dict]) -> None:
        """Reports what the model said to some questions after a step, as `AnswerSamples.answer` gives it."""

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
        writer = self._writer_from(row["step"])
        for key, value in _numbers(row).items():
            writer.add_scalar(key, value, row["step"])
        writer.flush()

    def append_answers(self, step: int, answers: Sequence[dict]) -> None:
        lines = ["| set | sample | asked | expected | answer |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_in_a_cell, cells))} |" for cells in _cells(answers)]
        self._writer_from(step).add_text("answers", "\n".join(lines), step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _writer_from(self, step: int):
        if self.writer is None:
            self.writer = self.module.SummaryWriter(
                str(self.directory), purge_step=step, filename_suffix=f".{step}"
            )
        return self.writer


class WandB:
    """One run per run directory, continued when that is; a stage's metrics have its name before theirs."""

    def __init__(self, config: Config, stage: str, workdir: Path):
        self.prefix = f"{stage}/" if stage else ""
        settings = to_json(config)
        wandb = _load("wandb")
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "llava_jax"),
                name=config.name,
                id=hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],
                resume="allow",
                config={stage: settings} if stage else settings,
                allow_val_change=True,  # of what a run that continues may change
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

    def append_answers(self, step: int, answers: Sequence[dict]) -> None:
        columns = ["set", "sample", "asked", "expected", "answer"]
        table = _load("wandb").Table(columns=columns, data=list(_cells(answers)))
        self.run.log({f"{self.prefix}answers": table, f"{self.prefix}step": step})

    def close(self) -> None:
        self.run.finish()


def _cells(answers: Sequence[dict]) -> Iterator[list[str]]:
    for answer in answers:
        yield [answer[key] for key in ("set", "sample", "asked", "label", "predict")]


def _in_a_cell(text: str) -> str:
    """`text` as Markdown shows it in a table."""
    return " ".join(html.escape(text).replace("|", "&#124;").split())


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
