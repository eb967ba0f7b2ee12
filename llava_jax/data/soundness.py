"""Whether data can be trained on: what is wrong with samples, and how much of that a run puts up with."""

import os
import threading

import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data.dataset import Dataset
from llava_jax.data.measuring import Measurements
from llava_jax.data.records import raise_problems
from llava_jax.errors import DataError

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
    """Samples whose images turned out unusable during training, and what took their place."""

    def __init__(self, config: DataConfig, num_samples: int, before_training: dict[int, str]):
        self.before_training = before_training
        self._config = config
        self._num_samples = num_samples
        self._found: dict[int, dict] = {}
        self._lock = threading.Lock()

    def add(self, id: int, problem: str, replacement: str) -> None:
        """Notes a sample; raises DataError if there are too many by now."""
        with self._lock:
            self._found[id] = {"problem": problem, "replaced_by": replacement}
            count = len(self._found) + len(self.before_training)
        _require_few(self._config, count, self._num_samples, problem)

    def report(self) -> list[dict]:
        """One row for each sample that was left out or replaced, in the order of the data."""
        left_out = {id: {"problem": problem} for id, problem in self.before_training.items()}
        with self._lock:
            return [row for _, row in sorted((left_out | self._found).items())]


def _require_few(config: DataConfig, count: int, total: int, problem: str) -> None:
    if count > max(1, config.max_bad_share * total):
        raise DataError(
            f"{count:,} of {total:,} samples cannot be used, more than data.max_bad_share={config.max_bad_share:g} "
            f"allows; for example {problem}"
        )
