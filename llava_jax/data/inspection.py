"""Looks at all of a dataset before it is trained on: what is wrong with it, and what is learnt."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, zip_longest

import numpy as np

from llava_jax.config import Config
from llava_jax.data import shuffling
from llava_jax.data.batching import Sample
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN
from llava_jax.data.dataset import Dataset
from llava_jax.data.documents import cut_documents
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.measuring import Measurements, measure
from llava_jax.data.samples import SampleReader
from llava_jax.data.soundness import find_problems, require_sound
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError
from llava_jax.metrics import Counter

MAX_MESSAGES = 1000  # kept of each kind
_CHUNK = 64  # samples whose images one thread decodes between two signs of progress
_TRIES = 20  # samples looked at for each that is shown; more only if most cannot be read

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_RECORD = re.compile(rf"record \d+(?: \(id (?:{_QUOTED}|.*?)\))?(?:, turn \d+)?: ")
_REPLACEMENT = "\ufffd"  # what tokenizers decode a part of a character to


@dataclasses.dataclass
class Finding:
    """One kind of what was found: in how many samples, and the first messages that name them."""

    title: str
    count: int = 0
    messages: list[str] = dataclasses.field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if self.count <= MAX_MESSAGES:
            self.messages.append(message)


@dataclasses.dataclass(frozen=True)
class Preview:
    """One sample to show: its images, or tiles of them, uint8[M, H, W, 3] and its text in pieces."""

    name: str
    num_tokens: int
    images: np.ndarray
    pieces: Sequence[tuple[str, str]]  # (text, "" or "learnt" or "image")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found out about a dataset."""

    files: str  # each with its number of samples, one per line
    refusal: DataError | None  # why training may not start
    counts: dict[str, str]
    findings: list[Finding]
    histograms: dict[str, np.ndarray]  # what -> a number for each usable sample
    previews: list[Preview]


def inspect(
    dataset: Dataset, config: Config, tokenizer: Tokenizer, *, decode: bool, num_previews: int
) -> Inspection:
    """Reads all samples of a dataset as the stage of this config does; with `decode`, their images too.

    Raises DataError if an image folder is no directory.
    """
    images = ImageProcessor.from_config(config.data, config.model)
    reader = SampleReader(dataset, config.data, tokenizer, images)
    measured = measure(
        reader,
        cache_dir=config.data.cache_dir,
        overwrite_cache=True,  # images may have changed since
        progress=Counter("  measuring samples:"),
    )
    reader, measured = cut_documents(reader, measured)
    dataset = reader.dataset
    problems = find_problems(dataset, measured)
    if decode:
        ids = np.setdiff1d(np.flatnonzero(measured.num_images), list(problems))
        problems |= find_unreadable(
            reader, ids, measured.num_images[ids], num_threads=config.data.num_threads
        )
    usable = np.setdiff1d(np.arange(len(dataset)), list(problems))
    return Inspection(
        dataset.describe(),
        _refusal(config, dataset, measured, problems),
        _counts(measured, usable),
        [
            *by_kind(dataset, problems),
            *_find_truncated(dataset, measured, usable),
            *_find_duplicates(dataset, usable),
        ],
        {
            "tokens per sample, before truncation": measured.full_lengths[usable],
            "supervised tokens per sample": measured.num_supervised[usable],
            "images per sample": measured.num_images[usable],
        },
        list(_previews(reader, usable, count=num_previews, seed=config.seed)),
    )


def by_kind(dataset: Dataset, problems: dict[int, str]) -> list[Finding]:
    """Groups messages about samples that differ in names and numbers alone; the most frequent kind first.

    The title of a kind is what its messages share, with "..." for the rest.
    """
    values_of = [
        re.compile(
            rf"{re.escape(os.path.join(source.folder.path, ''))}(?:.*\.\w+|.*?)(?=: )"  # an image file
            rf"|(?<!\w)(?:{_QUOTED})|\d+(?:[,.]\d+)*"
        )
        for source in dataset.sources
    ]
    shared: dict[tuple[str, ...], list[str]] = {}
    findings: dict[tuple[str, ...], Finding] = {}
    for id, message in problems.items():
        file = dataset.picks[id, 0]
        what = _RECORD.sub("", message.removeprefix(f"{dataset.sources[file].name}: "), count=1)
        kind, values = tuple(values_of[file].split(what)), values_of[file].findall(what)
        findings.setdefault(kind, Finding("")).add(message)
        seen = shared.setdefault(kind, values)
        shared[kind] = [value if value == other else "..." for value, other in zip(values, seen, strict=True)]
    for kind, finding in findings.items():
        finding.title = "".join(map("".join, zip_longest(kind, shared[kind], fillvalue="")))
    return sorted(findings.values(), key=lambda finding: -finding.count)


def find_unreadable(
    reader: SampleReader, ids: np.ndarray, num_images: np.ndarray, *, num_threads: int
) -> dict[int, str]:
    """Decodes the first `num_images` int[n] images of the samples `ids` int64[n], each file once.

    -> what is wrong with the samples of which one cannot be used.
    """
    verdicts: dict[tuple[str, str, bool], str] = {}

    def find(start: int) -> dict[int, str]:
        chunk = slice(start, start + _CHUNK)
        found = {
            id: _unreadable(reader, id, count, verdicts)
            for id, count in zip(ids[chunk].tolist(), num_images[chunk].tolist(), strict=True)
        }
        return {id: problem for id, problem in found.items() if problem}

    progress = Counter("  decoding the images of samples:")
    starts = range(0, len(ids), _CHUNK)
    problems = {}
    executor = ThreadPoolExecutor(max(1, num_threads))
    try:
        for start, found in zip(starts, executor.map(find, starts), strict=True):
            problems |= found
            progress(min(start + _CHUNK, len(ids)), len(ids))
    finally:
        executor.shutdown(cancel_futures=True)  # of an interrupted check
    return problems


def _unreadable(
    reader: SampleReader, id: int, num_images: int, verdicts: dict[tuple[str, str, bool], str]
) -> str:
    """What is wrong with the first unusable image of a sample, or "". `verdicts` are those on images so far."""
    try:
        record = reader.dataset[id]
    except DataError as error:  # a directory of frames is gone since they were measured
        return str(error)
    folder = reader.dataset.folder(id)
    for image, is_frame in islice(zip(record.images, record.is_frame, strict=True), num_images):
        key = (folder.path, image, is_frame)
        if key not in verdicts:
            try:
                reader.images.read(folder.locate(image), is_frame=is_frame)
                verdicts[key] = ""
            except DataError as error:
                verdicts[key] = str(error)
        if verdicts[key]:
            return f"{record.name}: {verdicts[key]}"
    return ""


def _refusal(
    config: Config, dataset: Dataset, measured: Measurements, problems: dict[int, str]
) -> DataError | None:
    try:
        require_sound(
            config.data, measured, problems, where=", ".join(source.name for source in dataset.sources)
        )
    except DataError as error:
        return error
    return None


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
        "images": num_images.sum(dtype=np.int64),
        "tokens": lengths.sum(dtype=np.int64),
        "supervised tokens": supervised.sum(dtype=np.int64),
        "tokens of the longest sample": lengths.max(initial=0),
        "tokens of a sample, median": int(np.median(lengths)) if len(lengths) else 0,
    }
    share = counts["supervised tokens"] / max(1, counts["tokens"])
    return {name: f"{count:,}" for name, count in counts.items()} | {
        "share of supervised tokens": f"{share:.1%}"
    }


def _find_duplicates(dataset: Dataset, ids: np.ndarray) -> list[Finding]:
    """Samples whose images and conversation an earlier record has too; data.weights repeats no record here."""
    _, firsts = np.unique(dataset.picks[ids], axis=0, return_index=True)
    ids = ids[np.sort(firsts)]
    progress = Counter("  looking for duplicates:")
    digests = np.zeros(len(ids), np.uint64)  # a false one among a million samples: one in 10^7
    for index, id in enumerate(ids.tolist()):
        record = dataset[id]
        said = repr((record.images, record.turns, record.system)).encode()
        digests[index] = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")
        if (index + 1) % 1000 == 0 or index + 1 == len(ids):
            progress(index + 1, len(ids))
    _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
    earlier = ids[firsts[groups]]
    repeats = np.flatnonzero(earlier != ids)
    messages = (
        f"{dataset[int(ids[index])].name}: has the images and the conversation of {dataset[int(earlier[index])].name}."
        for index in repeats[:MAX_MESSAGES]
    )
    return [Finding("the same as an earlier record", len(repeats), list(messages))] if len(repeats) else []


def _find_truncated(dataset: Dataset, measured: Measurements, ids: np.ndarray) -> list[Finding]:
    """Samples that teach nothing, and others that lose tokens to truncation."""
    useless = measured.num_supervised[ids] == 0
    cut = ~useless & (measured.full_lengths[ids] > measured.lengths[ids])
    findings = []
    for title, chosen in {"nothing is learnt": ids[useless], "cut to data.max_length": ids[cut]}.items():
        messages = [
            f"{dataset[id].name}: {measured.lengths[id]:,} of {measured.full_lengths[id]:,} tokens are kept, "
            f"{measured.num_supervised[id]:,} of them learnt."
            for id in chosen[:MAX_MESSAGES].tolist()
        ]
        if messages:
            findings.append(Finding(title, len(chosen), messages))
    return findings


def _previews(reader: SampleReader, ids: np.ndarray, *, count: int, seed: int) -> Iterator[Preview]:
    """Some of the samples `ids` int64[n] as they are trained on; those with unreadable images are passed over."""
    order = shuffling.permutation(len(ids), seed, shuffling.PREVIEWS)
    shown = 0
    for id in ids[order[: _TRIES * count]].tolist():
        if shown == count:
            return
        try:
            sample = reader.read(id)
        except DataError:  # among the problems, unless images are not decoded
            continue
        shown += 1
        yield Preview(
            reader.dataset[id].name, len(sample.tokens), sample.images, _pieces(sample, reader.tokenizer)
        )


def _pieces(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, str]]:
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
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        if end < len(kinds):
            text = text.rstrip(_REPLACEMENT)  # a character whose last token comes later is told there
        pieces.append((text[len(told) :], "learnt" if kinds[start] else ""))
        told = text
    return pieces
