"""What a run tells: the progress line, metrics.jsonl, result files and the loss plot."""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO


class MetricsLog:
    """`metrics.jsonl`: one JSON object per logged step; `stage` names the stage where a recipe has several.

    With `read_only` nothing is written: of several processes one writes.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self.path = path
        self.read_only = read_only
        self.reporters = []  # who is told every row, besides
        self.unwritten = ""  # what found no room yet
        self.told: set[str] = set()  # lines that are no rows

    def rows(self) -> list[dict]:
        """All rows. What a dying process wrote of a last one is left out; any other line that is no row is told."""
        rows = []
        text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            elif line.endswith("\n") and line not in self.told:
                self.told.add(line)
                print(
                    f"{self.path}: a line is no row and left out: {line.strip()[:80]!r}",
                    file=sys.stderr,
                    flush=True,
                )
        return rows

    def forget_after(self, stage: str, step: int) -> None:
        """Drops what an interrupted run logged beyond the checkpoint it resumes from."""
        if self.read_only:
            return
        kept = [row for row in self.rows() if row.get("stage", "") != stage or row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict) -> None:
        """Writes a row. One that cannot be written, perhaps because the disk is full, is written with a later one."""
        if self.read_only:
            return
        for reporter in self.reporters:
            reporter.append(row)
        told = bool(self.unwritten)
        self.unwritten += json.dumps(row) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                self._write(file)
        except OSError as error:
            if not told:
                print(f"{self.path} cannot be written now ({error.strerror}).", file=sys.stderr, flush=True)

    def _write(self, file: IO[bytes]) -> None:
        size, data = file.tell(), self.unwritten.encode()
        try:
            written = file.write(data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)  # no half row
            raise
        self.unwritten = ""


class Progress:
    """One line per logged step: rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self, stage: str, num_steps: int, first_step: int):
        self.label = f"{stage} " if stage else ""
        self.num_steps = num_steps
        self.since = first_step, time.monotonic()
        self.compiled = False
        self.in_place = sys.stdout.isatty()

    def show(self, row: dict) -> None:
        step, start = self.since
        seconds = time.monotonic() - start - (0 if self.compiled else row.get("compile_seconds", 0.0))
        eta = seconds / max(1, row["step"] - step) * (self.num_steps - row["step"])
        if not self.compiled:  # later rows do not count the first steps, which are slow in other ways, too
            self.compiled = True
            self.since = row["step"], time.monotonic()
        line = (
            f"{self.label}step {row['step']}/{self.num_steps}  loss {_or_nan(row['loss']):.4f}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{row['images_per_second']:,.0f} images/s  ETA {format_seconds(eta)}"
        )
        last = row["step"] == self.num_steps
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1  # not 0 where the terminal has none
            print(f"\r{line[:width]:<{width}}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class Counter:
    """A line that tells how far a count has come: in place on a terminal, elsewhere every ten seconds.

    A count that is over sooner is not told. One that goes back to less has started anew.
    """

    def __init__(self, label: str):
        self.label = label
        self.in_place = sys.stdout.isatty()
        self._start(0)

    def __call__(self, done: int, total: int) -> None:
        if done < self.done:
            self._start(done)
        self.done, now = done, time.monotonic()
        ended = done == total
        if now - self.told < (0.5 if self.in_place else 10.0) and not (ended and self.told > self.start):
            return
        self.told, seconds = now, now - self.start
        left = (
            f"took {format_seconds(seconds)}"
            if ended
            else f"ETA {format_seconds(seconds / done * (total - done))}"
        )
        line = f"{self.label} {done:,} of {total:,}  {left}"
        if not self.in_place:
            print(line, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="\n" if ended else "", flush=True)

    def _start(self, done: int) -> None:
        self.done = done
        self.told = self.start = time.monotonic()


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, data) -> None:
    """Writes indented JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=2) + "\n")


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, norm, smoothed = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed


def plot_loss(rows: list[dict], path: Path, *, keys: Sequence[str] = ("loss",)) -> None:
    """Draws losses over steps, one panel per stage, raw and smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = list(dict.fromkeys(row.get("stage", "") for row in rows))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False)
    for stage, axis in zip(stages, axes[0], strict=True):
        for number, key in enumerate(keys):
            mine = [row for row in rows if row.get("stage", "") == stage and row.get(key) is not None]
            if not mine:  # every step was skipped, or nothing evaluated
                continue
            steps, losses = zip(*((row["step"], row[key]) for row in mine), strict=True)
            axis.plot(steps, losses, color=f"C{number}", alpha=0.35)
            axis.plot(steps, smooth(list(losses)), color=f"C{number}", label=f"{key}, smoothed")
            axis.legend()
        axis.set(title=stage or path.stem.replace("_", " "), xlabel="step", ylabel=keys[0])
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
