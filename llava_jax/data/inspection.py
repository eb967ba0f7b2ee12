"""Looks at all of a dataset before it is trained on: what is wrong with it, and what is learnt."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_jax.config import Config
from llava_jax.data import shuffling
from llava_jax.data.batching import Sample
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.measuring import Measurements, measure
from llava_jax.data.samples import SampleReader
from llava_jax.data.soundness import find_problems, require_sound
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.metrics import Counter

_RECORD = re.compile(r"^.*?record \d+( \(id .*?\))?(, turn \d+)?: ")
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclasses.dataclass(frozen=True)
class Preview:
    """One sample to show: its images uint8[H, W, 3] and its text in pieces."""

    name: str
    num_tokens: int
    images: Sequence[np.ndarray]
    pieces: Sequence[tuple[str, str]]  # (text, "" or "learnt" or "image")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found out about a dataset."""

    refusal: DataError | None  # why training may not start
    counts: dict[str, str]
    findings: dict[str, list[str]]  # kind -> a message for each record
    histograms: dict[str, np.ndarray]  # what -> a number for each sample
    previews: list[Preview]


def inspect(config: Config, tokenizer: Tokenizer, *, decode: bool, num_previews: int) -> Inspection:
    """Reads all samples that a stage trains on; with `decode`, their images too.

    Raises DataError for files that are no datasets at all.
    """
    dataset, _ = open_datasets(config.data, config.seed)
    reader = SampleReader(
        dataset, config.data, tokenizer, ImageProcessor.from_config(config.data, config.model)
    )
    measured = measure(
        reader,
        cache_dir=config.data.cache_dir,
        overwrite_cache=config.data.overwrite_cache,
        progress=Counter("measuring samples:"),
    )
    problems = find_problems(dataset, measured)
    if decode:
        usable = np.setdiff1d(np.flatnonzero(measured.num_images), list(problems))
        problems |= find_unreadable(reader, usable, num_threads=config.data.num_threads)
    usable = np.setdiff1d(np.arange(len(dataset)), list(problems))
    refusal = None
    try:
        require_sound(config.data, measured, problems)
    except DataError as error:
        refusal = error
    return Inspection(
        refusal,
        _counts(measured, usable),
        by_kind(problems.values())
        | _find_truncated(reader, measured, usable)
        | _find_duplicates(reader, usable),
        {
            "tokens per sample": measured.full_lengths[usable],
            "supervised tokens per sample": measured.num_supervised[usable],
            "images per sample": measured.num_images[usable],
        },
        list(_previews(reader, usable, count=num_previews, seed=config.seed)),
    )


def by_kind(messages: Iterable[str]) -> dict[str, list[str]]:
    """Groups messages about records that differ in names and numbers alone; the most frequent kind first."""
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(_VALUE.sub("...", _RECORD.sub("", message)), []).append(message)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def find_unreadable(reader: SampleReader, ids: np.ndarray, *, num_threads: int) -> dict[int, str]:
    """Decodes the images of the samples `ids` int64[N] -> what is wrong with those that cannot be used."""
    progress = Counter("decoding images of samples:")

    def problem(id: int) -> str:
        try:
            reader.read(id)
        except DataError as error:
            return str(error)
        return ""

    problems = {}
    with ThreadPoolExecutor(max(1, num_threads)) as executor:
        for index, found in enumerate(executor.map(problem, ids.tolist())):
            if found:
                problems[int(ids[index])] = found
            progress(index + 1, len(ids))
    return problems


def _counts(measured: Measurements, usable: np.ndarray) -> dict[str, str]:
    lengths, supervised = measured.lengths[usable], measured.num_supervised[usable]
    num_images = measured.num_images[usable]
    counts = {
        "samples": len(measured.lengths),
        "unusable": len(measured.lengths) - len(usable),
        "with images": np.count_nonzero(num_images),
        "text only": np.count_nonzero(num_images == 0),
        "truncated": np.count_nonzero(measured.full_lengths[usable] > lengths),
        "with nothing to learn": np.count_nonzero(supervised == 0),
        "images": num_images.sum(),
        "tokens": lengths.sum(),
        "supervised tokens": supervised.sum(),
        "longest sample": lengths.max(initial=0),
    }
    share = supervised.sum() / max(1, lengths.sum())
    return {name: f"{count:,}" for name, count in counts.items()} | {
        "share of supervised tokens": f"{share:.1%}"
    }


def _find_duplicates(reader: SampleReader, ids: np.ndarray) -> dict[str, list[str]]:
    """Samples whose images and conversation an earlier one has too."""
    first: dict[bytes, str] = {}
    messages = []
    for id in ids.tolist():
        record = reader.dataset[id]
        said = repr((record.images, record.turns, record.system)).encode()
        name = first.setdefault(hashlib.blake2b(said, digest_size=16).digest(), record.name)
        if name != record.name:
            messages.append(f"{record.name}: has the images and the conversation of {name}.")
    return {"the same as an earlier record": messages} if messages else {}


def _find_truncated(reader: SampleReader, measured: Measurements, ids: np.ndarray) -> dict[str, list[str]]:
    """Samples in which truncation leaves nothing to learn, and others that lose tokens."""
    useless = measured.num_supervised[ids] == 0
    cut = ~useless & (measured.full_lengths[ids] > measured.lengths[ids])
    findings = {}
    for kind, chosen in {"nothing is left to learn": useless, "cut to data.max_length": cut}.items():
        if chosen.any():
            findings[kind] = [
                f"{reader.dataset[id].name}: {measured.lengths[id]:,} of {measured.full_lengths[id]:,} tokens are kept."
                for id in ids[chosen].tolist()
            ]
    return findings


def _previews(reader: SampleReader, ids: np.ndarray, *, count: int, seed: int) -> Iterator[Preview]:
    """Some of the samples `ids` int64[N] as they are trained on; those with unreadable images are passed over."""
    shown = 0
    for position in shuffling.permutation(len(ids), seed, shuffling.PREVIEWS).tolist():
        if shown == count:
            return
        id = int(ids[position])
        try:
            sample = reader.read(id)
        except DataError:  # they are among the problems
            continue
        shown += 1
        pieces = _pieces(sample, reader)
        yield Preview(reader.dataset[id].name, len(sample.tokens), list(sample.images), pieces)


def _pieces(sample: Sample, reader: SampleReader) -> list[tuple[str, str]]:
    """The text between changes of what tokens are: learnt, an image, or neither."""
    is_image = sample.tokens == IMAGE_TOKEN
    kinds = np.where(is_image, 2, sample.labels != IGNORE)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    pieces, told = [], ""
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        if is_image[start]:
            pieces.append((f" {end - start} image tokens ", "image"))
            continue
        # Decoded from the start, because what is in front of a token can change how it is spelled.
        tokens = sample.tokens[:end][~is_image[:end]].tolist()
        text = reader.tokenizer.decode(tokens, skip_special_tokens=False)
        pieces.append((text[len(told) :], "learnt" if kinds[start] else ""))
        told = text
    return pieces
