"""Whether data can be trained on: what is wrong with samples, and how much of that a run puts up with."""

import threading

import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data.dataset import Dataset
from llava_jax.data.measuring import Measurements
from llava_jax.data.records import raise_problems
from llava_jax.errors import DataError

MAX_USELESS_SHARE = 0.1


def find_problems(dataset: Dataset, measured: Measurements) -> dict[int, str]:
    """Samples that cannot be trained on, and why: what measuring found, and images that are not there."""
    problems = dict(measured.problems)
    sources = dataset.picks[:, 0]
    for number, source in enumerate(dataset.sources):
        (mine,) = np.nonzero(sources[measured.image_owners] == number)
        for position, problem in source.folder.missing(measured.image_paths[index] for index in mine):
            id = int(measured.image_owners[mine[position]])
            problems.setdefault(id, f"{dataset[id].name}: {problem}")
    return dict(sorted(problems.items()))


def require_sound(config: DataConfig, measured: Measurements, problems: dict[int, str]) -> None:
    """Raises DataError if training may not start: on any problem, or, with data.on_bad_sample="skip", on more
    than data.max_bad_share; and if a tenth of the other samples teach nothing."""
    total = len(measured.lengths)
    where = config.path or config.dataset
    if config.on_bad_sample == "error" or len(problems) == total:
        raise_problems(where, list(problems.values()))
    _require_few(config, len(problems), total, next(iter(problems.values()), ""))
    useless = int(np.count_nonzero(measured.num_supervised == 0)) - len(problems)
    if useless == total - len(problems):
        raise DataError(
            f"{where}: nothing is left to learn: data.max_length={config.max_length} cuts off every answer; raise it."
        )
    if useless >= MAX_USELESS_SHARE * total:
        raise DataError(
            f"{where}: {useless:,} of {total:,} samples teach nothing, because data.max_length={config.max_length} cuts "
            f"off their answers or data.mask={config.mask!r} leaves none; raise the one, change the other, or remove "
            "these samples. python -m llava_jax.check_data shows them."
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
