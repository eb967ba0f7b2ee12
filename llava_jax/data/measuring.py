"""How long every sample is: measured once, in parallel, and kept in a cache."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from llava_jax.data.conversation import IGNORE
from llava_jax.data.samples import SampleReader
from llava_jax.errors import DataError

_FORMAT = 1  # raise it when the same settings give other measurements
_CHUNK = 1000  # samples measured between two signs of progress
_WORTH_A_PROCESS = 5 * _CHUNK  # starting one takes as long as measuring a few thousand samples
_MAX_PROCESSES = 16
COLUMNS = ("lengths", "full_lengths", "num_supervised", "num_images", "num_tiles")


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

    cache_dir: where to keep the result; "" is nowhere. num_processes: None is what the machine has, 0 measures
    in this process. progress(done, total) is called now and then.
    """
    path = _cache_path(reader, cache_dir) if cache_dir else None
    if path and not overwrite_cache:
        cached = _load(path, len(reader.dataset))
        if cached:
            return cached
    chunks = list(_measure_chunks(reader, num_processes, progress))
    measured = Measurements(
        *(np.concatenate([getattr(chunk, column) for chunk in chunks]) for column in COLUMNS),
        problems={id: problem for chunk in chunks for id, problem in chunk.problems.items()},
        image_owners=np.concatenate([chunk.image_owners for chunk in chunks]),
        image_paths=[image for chunk in chunks for image in chunk.image_paths],
    )
    if path:
        _save(path, measured)
    return measured


def _measure_chunks(
    reader: SampleReader, num_processes: int | None, progress: Callable[[int, int], None]
) -> Iterator[Measurements]:
    total = len(reader.dataset)
    if num_processes is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_processes = min(available, _MAX_PROCESSES, total // _WORTH_A_PROCESS)
    chunks = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    if num_processes <= 1:
        for chunk in chunks:
            yield _measure_chunk(reader, chunk)
            progress(chunk.stop, total)
        return
    # Not forked: the process may hold JAX's threads, which a fork does not take along.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_worker, (reader,)) as executor:
        for chunk, measured in zip(chunks, executor.map(_measure_in_worker, chunks), strict=True):
            yield measured
            progress(chunk.stop, total)


_worker_reader: SampleReader  # of a worker process


def _start_worker(reader: SampleReader) -> None:
    global _worker_reader
    _worker_reader = reader


def _measure_in_worker(ids: range) -> Measurements:
    return _measure_chunk(_worker_reader, ids)


def _measure_chunk(reader: SampleReader, ids: range) -> Measurements:
    columns = np.zeros((len(COLUMNS), len(ids)), np.int32)
    problems, owners, paths = {}, [], []
    for index, id in enumerate(ids):
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
        )
        paths += outline.record.images
        owners += [id] * len(outline.record.images)
    return Measurements(*columns, problems, np.array(owners, np.int32), paths)


def _cache_path(reader: SampleReader, cache_dir: str) -> Path:
    key = json.dumps([_FORMAT, reader.settings()], sort_keys=True)
    return Path(cache_dir).expanduser() / f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _load(path: Path, num_samples: int) -> Measurements | None:
    """What `_save` wrote; None if it is not there or damaged."""
    try:
        with np.load(path) as file:
            columns = [file[column] for column in COLUMNS]
            owners, texts = file["image_owners"], json.loads(file["texts"].tobytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"{path} is damaged; measuring anew.", flush=True)
        return None
    if any(len(column) != num_samples for column in columns):
        return None
    problems = {int(id): problem for id, problem in texts["problems"].items()}
    return Measurements(*columns, problems, owners, texts["image_paths"])


def _save(path: Path, measured: Measurements) -> None:
    texts = json.dumps({"problems": measured.problems, "image_paths": measured.image_paths}).encode()
    arrays = {column: getattr(measured, column) for column in COLUMNS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays, image_owners=measured.image_owners, texts=np.frombuffer(texts, np.uint8))
        os.replace(file.name, path)
    except OSError as error:
        print(
            f"The measured lengths cannot be kept in {path.parent} ({error.strerror}); set data.cache_dir to "
            "another directory, or every start measures them again.",
            flush=True,
        )
