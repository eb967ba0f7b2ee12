"""How long every sample is: measured once, in parallel, and kept in a cache."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_jax.data.array_cache import cache_path, load_arrays, save_arrays
from llava_jax.data.conversation import IGNORE
from llava_jax.data.processes import map_in_processes
from llava_jax.data.samples import SampleReader
from llava_jax.errors import DataError

_FORMAT = 3  # raise it when the same settings give other measurements, or are kept in another way
_CHUNK = 1000  # samples measured between two signs of progress
_WORTH_A_PROCESS = 5 * _CHUNK  # starting one takes as long as measuring a few thousand samples
_MAX_PROCESSES = 16
COLUMNS = ("lengths", "full_lengths", "num_supervised", "num_images", "num_tiles", "num_pieces")


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Of every sample, int32[N] each; 0 for those that cannot be trained on.

    Lengths are in tokens, placeholders included; full_lengths before truncation, the others behind it.
    """

    lengths: np.ndarray
    full_lengths: np.ndarray
    num_supervised: np.ndarray
    num_images: np.ndarray
    num_tiles: np.ndarray
    num_pieces: np.ndarray  # that documents are cut into; 1 for conversations
    problems: dict[int, str]  # sample id -> why it cannot be trained on
    image_owners: np.ndarray  # int32[K], the sample of each image
    image_paths: list[str]  # K paths, as the records spell them


def measure(
    reader: SampleReader,
    *,
    cache_dir: str,
    overwrite_cache: bool = False,
    num_processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurements:
    """Measures every sample of a reader, or reads what an earlier call with the same data and settings found.

    Samples that could not be measured then are tried again, because what was wrong with their images may have been
    mended. Of other images a cache assumes that their sizes are the same.

    cache_dir: where to keep the result; "" is nowhere. num_processes: None is what the machine has, 0 measures
    in this process. progress(done, total) is called now and then.
    """
    path = _cache_path(reader, cache_dir) if cache_dir else None
    kept = _load(path) if path and not overwrite_cache else None
    ids = np.arange(len(reader.dataset)) if kept is None else np.array(sorted(kept.problems), np.int64)
    if kept and not len(ids):
        return kept
    measured = _join(list(_measure_chunks(reader, ids, num_processes, progress)))
    if kept:
        measured = _put(kept, ids, measured)
    if path and not (kept and kept.problems.keys() == measured.problems.keys()):
        _save(path, measured)
    return measured


def _measure_chunks(
    reader: SampleReader,
    ids: np.ndarray,
    num_processes: int | None,
    progress: Callable[[int, int], None],
) -> Iterator[Measurements]:
    total = len(ids)
    if num_processes is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_processes = min(available, _MAX_PROCESSES, total // _WORTH_A_PROCESS)
    chunks = [ids[start : start + _CHUNK] for start in range(0, total, _CHUNK)]
    measure_chunk = functools.partial(_measure_chunk, reader)
    with (
        map_in_processes(measure_chunk, chunks, num_processes)
        if num_processes > 1
        else contextlib.nullcontext(map(measure_chunk, chunks))
    ) as measured:
        for index, chunk in enumerate(measured, start=1):
            yield chunk
            progress(min(index * _CHUNK, total), total)


def _measure_chunk(reader: SampleReader, ids: np.ndarray) -> Measurements:
    columns = np.zeros((len(COLUMNS), len(ids)), np.int32)
    problems, owners, paths = {}, [], []
    for index, id in enumerate(ids.tolist()):
        try:
            outline = reader.outline(id)
        except DataError as error:
            problems[id] = str(error)
            continue
        columns[:, index] = (
            len(outline.tokens),
            outline.full_length,
            np.count_nonzero(outline.labels != IGNORE),
            outline.num_images,
            outline.num_tiles,
            outline.num_pieces,
        )
        paths += outline.record.images
        owners += [id] * len(outline.record.images)
    return Measurements(*columns, problems, np.array(owners, np.int32), paths)


def _join(parts: Sequence[Measurements]) -> Measurements:
    return Measurements(
        *(np.concatenate([getattr(part, column) for part in parts]) for column in COLUMNS),
        problems={id: problem for part in parts for id, problem in part.problems.items()},
        image_owners=np.concatenate([part.image_owners for part in parts]),
        image_paths=[image for part in parts for image in part.image_paths],
    )


def _put(measured: Measurements, ids: np.ndarray, again: Measurements) -> Measurements:
    """`measured`, where `again` stands for the samples `ids` int64[n], which had problems."""
    columns = [getattr(measured, column).copy() for column in COLUMNS]
    for column, name in zip(columns, COLUMNS, strict=True):
        column[ids] = getattr(again, name)
    return Measurements(
        *columns,
        problems=again.problems,
        image_owners=np.concatenate([measured.image_owners, again.image_owners]),
        image_paths=measured.image_paths + again.image_paths,
    )


def _cache_path(reader: SampleReader, cache_dir: str) -> Path:
    # Copies of the images in another folder may have other sizes, which matter to tiles.
    folders = [os.path.abspath(source.folder.path) for source in reader.dataset.sources]
    return cache_path(cache_dir, "lengths", [_FORMAT, reader.settings(), folders])


def _load(path: Path) -> Measurements | None:
    arrays = load_arrays(path)
    if arrays is None:
        return None
    texts = json.loads(arrays["texts"].tobytes())
    problems = {int(id): problem for id, problem in texts["problems"].items()}
    columns = [arrays[column] for column in COLUMNS]
    return Measurements(*columns, problems, arrays["image_owners"], texts["image_paths"])


def _save(path: Path, measured: Measurements) -> None:
    texts = json.dumps({"problems": measured.problems, "image_paths": measured.image_paths}).encode()
    columns = {column: getattr(measured, column) for column in COLUMNS}
    save_arrays(path, **columns, image_owners=measured.image_owners, texts=np.frombuffer(texts, np.uint8))
