"""The samples of a run: which records of which files, in which order, how often, and what is kept to evaluate on."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data.dataset_info import read_dataset_info
from llava_jax.data.formats import LLAVA, Format
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.json_index import JsonIndex
from llava_jax.data.records import Record, parse_record
from llava_jax.errors import ConfigError, DataError

# Each sets one use of the seed apart from the others.
_VALIDATION_SPLIT, _WEIGHTED_SUBSET, _NUM_SAMPLES = 101, 102, 103


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, how its records are written, and where their images are."""

    name: str  # for messages
    index: JsonIndex
    format: Format
    folder: ImageFolder


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Samples by number, read and checked when asked for.

    `picks` int64[num_samples, 2]: for each sample, its file in `sources` and its record therein. `pieces`
    int64[num_samples]: which piece of its document a sample is, once these are cut. Beyond that only the places of the
    records in their files are held, so that it is cheap to send to other processes.
    """

    sources: tuple[Source, ...]
    picks: np.ndarray
    video_frames: int
    pieces: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, id: int) -> Record:
        """Raises DataError naming the record if it is broken."""
        if not 0 <= id < len(self):
            raise IndexError(f"there is no sample {id} among {len(self)}")
        file, number = map(int, self.picks[id])
        source = self.sources[file]
        prefix = source.name if len(self.sources) > 1 else ""
        try:
            value = source.index[number]
        except DataError as error:
            raise DataError(f"{prefix}{': ' if prefix else ''}record {number}: {error}") from error
        return parse_record(
            value,
            number,
            format=source.format,
            folder=source.folder,
            video_frames=self.video_frames,
            source=prefix,
        )

    def piece(self, id: int) -> int:
        """Which piece of its document a sample is; 0 for a conversation."""
        return 0 if self.pieces is None else int(self.pieces[id])

    def folder(self, id: int) -> ImageFolder:
        """Where the images of a sample are."""
        return self.sources[self.picks[id, 0]].folder

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of what the files hold, how it is read, and which samples are taken.

        It depends neither on where the files lie nor on what the image files hold.
        """
        files = [
            (source.index.digest, type(source.format).__name__, dataclasses.asdict(source.format))
            for source in self.sources
        ]
        picks = hashlib.sha256(self.picks.astype("<i8").tobytes()).hexdigest()
        parts = {"files": files, "picks": picks, "video_frames": self.video_frames}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """For a person: each file with its number of samples, one per line."""
        counts = np.bincount(self.picks[:, 0], minlength=len(self.sources))
        return "\n".join(
            f"{source.name}: {count:,} samples from {len(source.index):,} records"
            for source, count in zip(self.sources, counts, strict=True)
        )


def open_datasets(config: DataConfig, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Opens what a run trains on, and the sets that it evaluates on by name: none, "" alone, or those of NAME=FILE and
    NAME=DATASET.

    Files are indexed, their records not yet read. Raises ConfigError for settings that do not fit together,
    DataError for files that cannot be read.
    """
    sources, counts = _open_sources(config)
    if config.weights and len(config.weights) != len(sources):
        raise ConfigError(
            f"data.weights has {len(config.weights)} numbers for {len(sources)} files; give one for each."
        )
    chosen = Dataset(sources, _choose(sources, counts, config.max_samples, seed), config.video_frames)
    evaluations = _open_evaluations(config, seed)
    if config.val_size:
        chosen, evaluations[""] = split_dataset(chosen, config.val_size, seed)
    # Samples are repeated behind the split: none is both trained and evaluated on.
    return _repeat(chosen, config.weights, seed), evaluations


def split_dataset(dataset: Dataset, val_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Sets samples aside to evaluate on -> (training, evaluation), each in the order of `dataset`.

    `val_size` below 1 is a share of the samples, rounded and at least one; otherwise it is their number.
    Which they are depends on the seed and on the number of samples alone. Raises ConfigError if either side
    would be empty.
    """
    total = len(dataset)
    count = max(1, round(val_size * total)) if val_size < 1 else int(val_size)
    if not 0 < count < total:
        raise ConfigError(
            f"data.val_size={val_size:g} would keep {count} of {total} samples for evaluation; "
            "it must leave some for training."
        )
    kept = np.zeros(total, bool)
    kept[_shuffled(total, seed, _VALIDATION_SPLIT)[:count]] = True
    return tuple(dataclasses.replace(dataset, picks=dataset.picks[side]) for side in (~kept, kept))


def _open_sources(config: DataConfig) -> tuple[tuple[Source, ...], list[int | None]]:
    """The files to train on, and how many of each one's samples are to be drawn; None: all in order."""
    if config.path:
        return _open_files(config.path, config.image_folder, "data.path")
    if not config.dataset:
        raise ConfigError(
            "There is nothing to train on: set data.path to a JSON or JSONL file, or data.dataset to names of "
            "dataset_info.json in data.dataset_dir."
        )
    return _open_entries(config.dataset, config, "data.dataset")


def _open_evaluations(config: DataConfig, seed: int) -> dict[str, Dataset]:
    datasets = {}
    setting = "data.eval_dataset" if config.eval_dataset else "data.eval_path"
    for name, what in _named_sets(config.eval_dataset or config.eval_path, setting).items():
        if config.eval_dataset:
            sources, counts = _open_entries(what, config, setting)
        else:
            sources, counts = _open_files(what, config.image_folder, setting)
        picks = _choose(sources, counts, config.max_samples, seed)
        datasets[name] = Dataset(sources, picks, config.video_frames)
    return datasets


def _named_sets(sets: str, setting: str) -> dict[str, str]:
    """ "a=x.json,b=y.json" -> {"a": "x.json", "b": "y.json"}; without names -> {"": sets}."""
    if not sets:
        return {}
    matches = [re.fullmatch(r"(\w+)=(.+)", part.strip()) for part in sets.split(",")]
    if not any(matches):
        return {"": sets}
    if not all(matches):
        what = "FILE" if setting == "data.eval_path" else "DATASET"
        raise ConfigError(
            f"{setting}={sets!r} names some of its sets; write NAME={what} for all, or for none."
        )
    names = [match[1] for match in matches]
    if len(set(names)) < len(names):
        raise ConfigError(f"{setting}={sets!r} gives two sets one name; call them differently.")
    return {match[1]: match[2] for match in matches}


def _open_entries(
    names: str, config: DataConfig, setting: str
) -> tuple[tuple[Source, ...], list[int | None]]:
    """The files of datasets that dataset_info.json names, and how many of each one's samples are to be drawn."""
    entries = read_dataset_info(config.dataset_dir, _split_names(names, setting), setting)
    default_folder = config.image_folder or config.dataset_dir
    folder_of = functools.cache(ImageFolder)  # lists a directory that several datasets use once
    sources = tuple(
        Source(
            entry.name,
            _open_index(entry.path, f"'file_name' of {entry.name!r} in dataset_info.json"),
            entry.format,
            folder_of(default_folder if entry.image_folder is None else entry.image_folder),
        )
        for entry in entries
    )
    return sources, [entry.num_samples for entry in entries]


def _open_files(paths: str, image_folder: str, setting: str) -> tuple[tuple[Source, ...], list[int | None]]:
    paths = _split_names(paths, setting)
    folder = ImageFolder(image_folder)
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    sources = tuple(
        Source(name, _open_index(path, setting), LLAVA, folder)
        for name, path in zip(names, paths, strict=True)
    )
    return sources, [None] * len(sources)


def _split_names(text: str, setting: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"{setting}={text!r} has an empty name between its commas.")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{setting} names {name!r} twice; to repeat its samples use data.weights.")
    return names


def _open_index(path: str, setting: str) -> JsonIndex:
    index = JsonIndex(path, setting)
    if not len(index):
        raise DataError(f"{path}: there is no record in this file.")
    return index


def _choose(
    sources: Sequence[Source], counts: Sequence[int | None], max_samples: int | None, seed: int
) -> np.ndarray:
    """The samples of all files, file after file, each once -> picks int64[num_samples, 2]."""
    picks = []
    for file, (source, count) in enumerate(zip(sources, counts, strict=True)):
        total = len(source.index)
        if count is not None and count > total:
            raise ConfigError(
                f"'num_samples' of {source.name!r} in dataset_info.json is {count}, but the file has {total} "
                "records; to repeat them use data.weights."
            )
        numbers = np.arange(total)
        if count is not None:
            numbers = np.sort(_shuffled(total, seed, _NUM_SAMPLES, file)[:count])
        numbers = numbers[:max_samples]
        picks.append(np.stack([np.full_like(numbers, file), numbers], axis=1))
    return np.concatenate(picks)


def _repeat(dataset: Dataset, weights: Sequence[float], seed: int) -> Dataset:
    """Takes each file's samples as often as its weight says; for its fraction, a part drawn once and for all."""
    if not weights:
        return dataset
    picks = []
    for file, weight in enumerate(weights):
        own = dataset.picks[dataset.picks[:, 0] == file]
        whole, rest = divmod(round(weight * len(own)), max(len(own), 1))
        drawn = np.sort(_shuffled(len(own), seed, _WEIGHTED_SUBSET, file)[:rest])
        picks += [own] * whole + [own[drawn]]
    picks = np.concatenate(picks)
    if not len(picks):
        raise ConfigError(f"data.weights={tuple(weights)} leave no sample to train on; raise them.")
    return dataclasses.replace(dataset, picks=picks)


def _shuffled(count: int, *key: int) -> np.ndarray:
    """The numbers below `count`, shuffled: int64[count]; a function of the arguments alone."""
    bits = np.random.Philox(np.random.SeedSequence(key))
    # Sorting raw random bits is specified down to the bit; Generator.permutation may change with numpy.
    return np.argsort(bits.random_raw(count), kind="stable")
