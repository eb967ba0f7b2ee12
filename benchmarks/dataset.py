"""python -m benchmarks.dataset [--json] [--records=665000]: from a list like LLaVA's to the first batch, step by step.

Draws a list like llava_v1_5_mix665k and puts an empty file where each image should be, for images are looked for but
not read here. Each group of steps runs in a process of its own, so that its memory is what these steps take.
Linux only: memory is read from /proc.
"""

import argparse
import concurrent.futures
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from benchmarks.packing import MIX, Part
from llava_jax.config import DataConfig, ModelConfig, VisionConfig
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.measuring import measure
from llava_jax.data.packing import cached_pack, default_max_images, pack
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.samples import Outline, SampleReader
from llava_jax.data.soundness import find_problems
from llava_jax.data.tokenizer import load_tokenizer

FULL_SIZE = 665_000  # llava_v1_5_mix665k has 665,298 records
NUM_WORDS = 40_000  # different ones, as often as words of a language are; commas and full stops stick to some
NUM_DRAWN = 1 << 20  # words of the text that questions and answers are cut from
VOCAB_SIZE = 32_000  # Llama's
TRAINED_ON = 2_000_000  # characters of it
FOLDERS = {  # where the images of parts of MIX lie, and how many the full size has
    "GQA": ("gqa/images", 72_000),
    "OCR-VQA": ("ocr_vqa/images", 80_000),
    "TextCaps": ("textvqa/train_images", 22_000),
    "Visual Genome": ("vg/VG_100K", 86_000),
}
COCO = ("coco/train2017", 118_000)  # those of all others
# As many tokens per image as in LLaVA-1.5, of far smaller images.
MODEL = ModelConfig(vision=VisionConfig(image_size=24, patch_size=1))
IMAGES = ImageProcessor(MODEL)
PACKED = {"packing": True, "batch_size": 16}  # about as many samples as the other's 128 rows
GROUPED = {"group_by_modality_length": True, "batch_size": 128}

DISTINCT = 20_000  # conversations; each process measures as many records, which gives the time for all
ACCESSES = 10_000
NUM_WORKERS = 4  # dataloader_num_workers of the original's scripts
SAMPLING_SECONDS = 0.02


class BlankImages(ImageProcessor):
    """Every image is black: its file is looked for but not read."""

    def read(self, path: str, *, is_frame: bool = False) -> np.ndarray:
        side = self.model.vision.image_size
        return np.zeros((1, side, side, 3), np.uint8)


def draw_text() -> tuple[str, np.ndarray]:
    """NUM_DRAWN words with spaces and punctuation, and where each begins, int64[NUM_DRAWN + 1]."""
    random = np.random.default_rng(0)
    consonants = [*"bcdfghlmnprstvw", "st", "tr", "ch", "sh"]
    syllables = [first + vowel for first in consonants for vowel in "aeiou"]
    syllables += [syllable + end for syllable in syllables for end in "nrst"]
    sizes = 1 + np.arange(NUM_WORDS) ** 0.11 + random.normal(0, 0.4, NUM_WORDS)
    counts = np.maximum(1, sizes / 1.2).astype(int).tolist()
    chosen = iter(random.choice(syllables, sum(counts)).tolist())
    words = ["".join(itertools.islice(chosen, count)) for count in counts]
    # Zipf's law, with Mandelbrot's shift.
    weights = 1 / (np.arange(NUM_WORDS) + 2.7)
    drawn = random.choice(NUM_WORDS, NUM_DRAWN, p=weights / weights.sum())
    ends = random.choice([" ", ", ", ". ", ".\n", '" '], NUM_DRAWN, p=[0.85, 0.06, 0.07, 0.01, 0.01])
    pieces, begins_sentence = [], True
    for number, end in zip(drawn.tolist(), ends.tolist(), strict=True):
        word = words[number]
        pieces.append((word.capitalize() if begins_sentence else word) + end)
        begins_sentence = end[0] == "."
    return "".join(pieces), np.cumsum([0, *map(len, pieces)])


def draw_records(num_records: int, text: str, begins: np.ndarray) -> Iterator[dict]:
    """Records with the rounds and words of MIX in random order, DISTINCT conversations again and again."""
    random = np.random.default_rng(1)
    shares = np.array([part.num_samples for part in MIX])
    parts = [MIX[number] for number in random.choice(len(MIX), DISTINCT, p=shares / shares.sum())]
    conversations = [_conversation(part, random, text, begins) for part in parts]
    for number in range(num_records):
        part = parts[number % DISTINCT]
        record = {"id": f"{number:012d}", "conversations": conversations[number % DISTINCT]}
        if part.has_image:
            folder, num_files = FOLDERS.get(part.name, COCO)
            record["image"] = f"{folder}/{random.integers(_num_files(num_files, num_records)):012d}.jpg"
        yield record


def _num_files(of_all: int, num_records: int) -> int:
    return -(-of_all * num_records // FULL_SIZE)


def _conversation(part: Part, random: np.random.Generator, text: str, begins: np.ndarray) -> list[dict]:
    rounds = int(random.integers(part.rounds[0], part.rounds[1] + 1))
    mean, deviation = part.words
    shape = (mean / deviation) ** 2
    turns = []
    for words in random.gamma(shape, mean / shape, rounds).astype(int).clip(4):
        first = int(random.integers(NUM_DRAWN - words))
        middle, last = first + max(2, words // 4), first + words
        turns.append({"from": "human", "value": text[begins[first] : begins[middle]].strip() + "?"})
        turns.append({"from": "gpt", "value": text[begins[middle] : begins[last]].strip()})
    if part.has_image:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def write_files(directory: Path, num_records: int) -> None:
    """records.json, tokenizer.model, and an empty file for every image."""
    text, begins = draw_text()
    with open(directory / "records.json", "w") as file:
        for number, record in enumerate(draw_records(num_records, text, begins)):
            file.write((",\n" if number else "[") + json.dumps(record))
        file.write("]")
    for folder, num_files in [*FOLDERS.values(), COCO]:
        (directory / "images" / folder).mkdir(parents=True)
        for number in range(_num_files(num_files, num_records)):
            os.mknod(f"{directory}/images/{folder}/{number:012d}.jpg")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:TRAINED_ON].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        max_sentence_length=1 << 16,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())


class Laps:
    """Seconds between calls, and resident memory at each."""

    def __init__(self):
        self.seconds, self.mb = {}, {"at start": resident_mb()}
        self._before = time.perf_counter()

    def take(self, name: str) -> None:
        self.seconds[name] = time.perf_counter() - self._before
        self.mb[name] = resident_mb()
        self._before = time.perf_counter()


def in_fresh_process(function: Callable, *args) -> tuple[object, dict[str, float]]:
    """What function(*args) returns, and the most memory in MB that it and its child processes held."""
    context = multiprocessing.get_context("spawn")
    peak = {"own_mb": 0.0, "children_mb": 0.0}
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        pid = executor.submit(os.getpid).result()
        result = executor.submit(function, *args)
        while not result.done():
            children = sum(resident_mb(child) for child in descendants(pid))
            peak["own_mb"] = max(peak["own_mb"], resident_mb(pid))
            peak["children_mb"] = max(peak["children_mb"], children)
            time.sleep(SAMPLING_SECONDS)
        return result.result(), peak


def resident_mb(pid: int | str = "self") -> float:
    """0 for a process that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def descendants(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        texts = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for text in texts for child in text.split()]
    return children + [other for child in children for other in descendants(child)]


def original_load(path: str) -> dict:
    """The original's start: LazySupervisedDataset.__init__ and `modality_lengths`, then its forked workers."""
    laps = Laps()
    with open(path) as file:
        records = json.load(file)
    laps.take("json.load of the file")
    for record in records:
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
        words = words if "image" in record else -words
    laps.take("counting words")
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    if os.fork() == 0:
        sender.send(_private_after_reading(records))
        os._exit(0)
    worker_mb = receiver.recv()
    os.wait()
    return {"seconds": laps.seconds, "mb": laps.mb, "worker_private_mb": worker_mb}


def _private_after_reading(records: list[dict]) -> float:
    """Memory in MB that a forked worker no longer shares, once it has read its part of an epoch."""
    order = np.random.default_rng(0).permutation(len(records))
    for number in order[: len(records) // NUM_WORKERS].tolist():
        for turn in records[number]["conversations"]:
            turn["value"].startswith("<image>")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def open_list(config: DataConfig) -> dict:
    laps = Laps()
    dataset, _ = open_datasets(config, seed=0)
    laps.take("open: index of the file")
    index = dataset.sources[0].index
    for number in np.random.default_rng(0).integers(len(index), size=ACCESSES).tolist():
        index[number]
    laps.take("random access")
    dataset.fingerprint  # noqa: B018
    laps.take("SHA-256 of the file")
    access_us = laps.seconds["random access"] / ACCESSES * 1e6
    return {"seconds": laps.seconds, "mb": laps.mb, "access_us": access_us}


def make_reader(config: DataConfig, images: ImageProcessor = IMAGES) -> SampleReader:
    dataset, _ = open_datasets(config, seed=0)
    tokenizer = load_tokenizer(os.path.join(os.path.dirname(config.path), "tokenizer.model"))
    return SampleReader(dataset, config, tokenizer, images)


def measure_some(config: DataConfig, num_processes: int) -> dict:
    """Measures DISTINCT records for each process."""
    reader = make_reader(dataclasses.replace(config, max_samples=DISTINCT * num_processes))
    start = time.perf_counter()
    measured = measure(reader, cache_dir="", num_processes=num_processes)
    return {
        "seconds": time.perf_counter() - start,
        "samples": len(measured.lengths),
        "tokens": float(measured.lengths.mean()),
    }


class RepeatingReader(SampleReader):
    """Tokenizes each of the DISTINCT conversations once; results are those of SampleReader."""

    def __init__(self, reader: SampleReader):
        super().__init__(reader.dataset, reader.config, reader.tokenizer, reader.images)
        self._outlines = {}

    def outline(self, id: int) -> Outline:
        first = id % DISTINCT
        if first not in self._outlines:
            self._outlines[first] = super().outline(first)
        return dataclasses.replace(self._outlines[first], record=self.dataset[id])


def fill_cache(config: DataConfig) -> None:
    measure(RepeatingReader(make_reader(config)), cache_dir=config.cache_dir, num_processes=0)


def start(config: DataConfig) -> dict:
    """What a run pays from the files to its first batch, lengths being known."""
    laps = Laps()
    reader = make_reader(config, BlankImages(MODEL))
    laps.take("open the list")
    pipeline = Pipeline(config, reader.dataset, tokenizer=reader.tokenizer, images=reader.images, seed=0)
    laps.take("build the pipeline")
    pipeline.shapes(0, pipeline.steps_per_epoch)
    pipeline.step_rows(0)
    laps.take("order the first epoch")
    next(pipeline.iterate(0, pipeline.steps_per_epoch))
    laps.take("load the first batch")
    return {
        "seconds": laps.seconds,
        "total_seconds": sum(laps.seconds.values()),
        "mb": laps.mb,
        "step_us": step_us(pipeline),
    }


def parts_of_building(config: DataConfig) -> dict:
    """The parts of building a pipeline that grow with the data."""
    reader = make_reader(config)
    laps = Laps()
    reader.settings()
    laps.take("SHA-256 of the list")
    measured = measure(reader, cache_dir=config.cache_dir)
    laps.take("read lengths from the cache")
    find_problems(reader.dataset, measured)
    laps.take("look for all images")
    lengths, num_tiles, row_length = measured.lengths, measured.num_tiles, 4 * config.max_length
    max_images = default_max_images(lengths, num_tiles, row_length=row_length)
    laps.take("choose the image slots of a packed row")
    limits = {"row_length": row_length, "max_images": max_images, "seed": 0}
    pack(lengths, num_tiles, **limits)
    laps.take("plan the packed rows")
    cached_pack(lengths, num_tiles, cache_dir=config.cache_dir, **limits)
    laps.take("read that plan from the cache")
    return {"seconds": laps.seconds, "mb": laps.mb}


def step_us(pipeline: Pipeline) -> dict[str, float]:
    """Microseconds of Python per step to find its samples, and to count its tokens and images."""
    steps = range(min(200, pipeline.steps_per_epoch))
    result = {}
    for name, function in (("samples", pipeline.step_rows), ("counts", pipeline.count)):
        before = time.perf_counter()
        for step in steps:
            function(step)
        result[name] = (time.perf_counter() - before) / len(steps) * 1e6
    return result


def run(directory: Path, num_records: int) -> dict:
    """Prints the tables and returns their figures."""
    before = time.perf_counter()
    write_files(directory, num_records)
    path = directory / "records.json"
    print(
        f"{num_records:,} records, {path.stat().st_size / 1e6:.0f} MB; drawing them and placing empty image files took "
        f"{time.perf_counter() - before:.0f} s. Vocabulary of {VOCAB_SIZE:,} pieces.\n"
    )
    config = DataConfig(
        path=str(path), image_folder=str(directory / "images"), cache_dir=str(directory / "cache")
    )
    result = {"records": num_records, "mb": path.stat().st_size / 1e6}
    result["original"] = show("original", original_load, str(path))
    print(
        f"  Workers are forked and share what is loaded until they read it: each of {NUM_WORKERS} then holds\n"
        f"  {result['original']['worker_private_mb']:.0f} MB of its own after its part of the first epoch.\n"
    )
    result["open"] = show("open the list", open_list, config)
    print(f"  {result['open']['access_us']:.0f} us per record in random order\n")
    result["measuring"] = [measuring_rate(config, processes, num_records) for processes in (1, num_cores())]
    in_fresh_process(fill_cache, config)
    packed = dataclasses.replace(config, **PACKED)
    result["first_start_packed"] = show("first start, packed, lengths known", start, packed)
    result["restart_packed"] = show("restart, packed", start, packed)
    result["restart_grouped"] = show("restart, grouped", start, dataclasses.replace(config, **GROUPED))
    for name in ("restart_packed", "restart_grouped"):
        times = result[name]["step_us"]
        print(
            f"  {name}: {times['samples']:.0f} us per step to find its samples, {times['counts']:.0f} to count"
        )
    print()
    result["parts"] = show("parts of building a pipeline", parts_of_building, packed)
    return result


def show(title: str, function: Callable, *args) -> dict:
    """Runs the steps of a group in a process of their own and prints them."""
    result, peak = in_fresh_process(function, *args)
    print(f"{title:42}{'seconds':>9}{'MB':>7}   {result['mb']['at start']:.0f} MB before")
    for name, seconds in result["seconds"].items():
        print(f"  {name:40}{seconds:9.2f}{result['mb'][name]:7.0f}")
    print(
        f"  {'together, and at most':40}{sum(result['seconds'].values()):9.2f}{peak['own_mb']:7.0f}",
        flush=True,
    )
    return result | {"peak": peak}


def measuring_rate(config: DataConfig, num_processes: int, num_records: int) -> dict:
    """Of some records; the time for all is in proportion, which counts the start of processes several times."""
    result, peak = in_fresh_process(measure_some, config, num_processes)
    result["seconds_for_all"] = result["seconds"] / result["samples"] * num_records
    print(
        f"measuring {result['samples']:,} records ({result['tokens']:.0f} tokens each), processes: {num_processes}: "
        f"{result['seconds']:.1f} s, so about {result['seconds_for_all']:.0f} s for all; "
        f"{peak['own_mb']:.0f} MB, in worker processes {peak['children_mb']:.0f} MB",
        flush=True,
    )
    return result | {"processes": num_processes, "peak": peak}


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataset", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--records", type=int, default=665_000, help="how many; the original's list has 665,298"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = run(Path(directory), options.records)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
