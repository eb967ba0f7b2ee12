"""Whether data can be trained on: what is wrong with samples, and how much of that a run puts up with."""

import json
import os
import threading
from pathlib import Path

import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data.dataset import Dataset
from llava_jax.data.measuring import Measurements
from llava_jax.data.records import raise_problems
from llava_jax.errors import DataError
from llava_jax.metrics import write_atomically

MAX_USELESS_SHARE = 0.1
_MOST_NAMED_BY_ID = (
    10_000  # samples; an id takes reading the record, and a wrong folder makes all samples bad
)


def find_problems(dataset: Dataset, measured: Measurements) -> dict[int, str]:
    """Samples that cannot be trained on, and why: what measuring found, and images that are not there.

    Raises DataError if an image folder is no directory, for then nothing is wrong with the samples.
    """
    missing: dict[int, str] = {}
    sources = dataset.picks[:, 0]
    for number, source in enumerate(dataset.sources):
        (mine,) = np.nonzero(sources[measured.image_owners] == number)
        if len(mine) and not os.path.isdir(source.folder.path):
            raise DataError(
                f"{source.name}: image_folder={source.folder.path!r} is no directory; it should hold the {len(mine):,} "
                "images that are named there. Set data.image_folder (in dataset_info.json: 'image_folder')."
            )
        for position, problem in source.folder.missing(measured.image_paths[index] for index in mine):
            missing.setdefault(int(measured.image_owners[mine[position]]), problem)
    named = {
        id: _name(dataset, id, problem, by_id=count < _MOST_NAMED_BY_ID)
        for count, (id, problem) in enumerate(sorted(missing.items()))
    }
    return dict(sorted((named | measured.problems).items()))


def _name(dataset: Dataset, id: int, problem: str, *, by_id: bool) -> str:
    file, number = dataset.picks[id]
    name = (
        f"{dataset.sources[file].name}: record {number}" if len(dataset.sources) > 1 else f"record {number}"
    )
    try:
        return f"{dataset[id].name if by_id else name}: {problem}"
    except DataError as error:  # a directory of frames is gone since they were measured
        return str(error)


def require_sound(
    config: DataConfig, measured: Measurements, problems: dict[int, str], *, where: str = ""
) -> None:
    """Raises DataError if training may not start: on any problem, or, with data.on_bad_sample="skip", on more
    than data.max_bad_share; and if a tenth of the other samples teach nothing, or one has too many images.

    where: what the message begins with; "" is what is trained on.
    """
    where = where or config.path or config.dataset
    total = len(measured.lengths)
    if config.on_bad_sample == "error" or len(problems) == total:
        raise_problems(where, list(problems.values()))
    _require_few(config, len(problems), total, next(iter(problems.values()), ""))
    usable = np.ones(total, bool)
    usable[list(problems)] = False
    _require_useful(config, measured.num_supervised[usable], where)
    limit, most = config.max_images_per_row, int(measured.num_tiles[usable].max())
    if limit and most > limit:
        raise DataError(
            f"{where}: {np.count_nonzero(measured.num_tiles[usable] > limit):,} samples have more images, or tiles of "
            f"them, than data.max_images_per_row={limit}; raise it to {most}."
        )


def _require_useful(config: DataConfig, num_supervised: np.ndarray, where: str) -> None:
    useless, total = np.count_nonzero(num_supervised == 0), len(num_supervised)
    why = f"data.max_length={config.max_length} cuts off {{}} or data.mask={config.mask!r} leaves none"
    if useless == total:
        raise DataError(
            f"{where}: nothing is left to learn: {why.format('every answer')}; raise the one or change the other."
        )
    if useless >= MAX_USELESS_SHARE * total and useless:
        raise DataError(
            f"{where}: {useless:,} of {total:,} samples teach nothing, because {why.format('their answers')}; raise "
            "the one, change the other, or remove these samples. python -m llava_jax.check_data shows them."
        )


class BadSamples:
    """Samples that are left out, or whose images turned out unusable and what took their place.

    The report is kept in a file, one JSON object per line, so that a run that continues still counts what it
    found before.
    """

    def __init__(
        self, config: DataConfig, num_samples: int, left_out: dict[int, str], report: Path | None = None
    ):
        self._config = config
        self._num_samples = num_samples
        self._left_out = left_out
        self._path = report
        self._replaced: dict[int, dict] = _read_replaced(report) if report and report.exists() else {}
        self._lock = threading.Lock()

    def add(self, id: int, problem: str, replacement: str | None) -> None:
        """Notes that a sample was replaced, by nothing if None; raises DataError if there are too many by now."""
        with self._lock:
            if id not in self._replaced:
                self._replaced[id] = {"sample": id, "problem": problem, "replaced_by": replacement}
                self._write()
            count = len(self._replaced) + len(self._left_out)
        _require_few(self._config, count, self._num_samples, problem)

    def report(self) -> list[dict]:
        """One row for each sample that is left out or was replaced, in the order of the data."""
        left_out = {id: {"sample": id, "problem": problem} for id, problem in self._left_out.items()}
        return [row for _, row in sorted((left_out | self._replaced).items())]

    def write(self) -> None:
        """Writes the report, if there is anything to tell."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        rows = self.report()
        if self._path and rows:
            write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_replaced(path: Path) -> dict[int, dict]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["sample"]: row for row in rows if "replaced_by" in row}


def _require_few(config: DataConfig, count: int, total: int, problem: str) -> None:
    if count > max(1, config.max_bad_share * total):
        raise DataError(
            f"{count:,} of {total:,} samples cannot be used, more than data.max_bad_share={config.max_bad_share:g} "
            f"allows; for example {problem}"
        )
