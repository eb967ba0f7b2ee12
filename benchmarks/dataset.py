"""python -m benchmarks.dataset [--json] [--records=665000]: from a list like LLaVA's to the first batch, step by step."""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import tempfile
import threading
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
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.samples import SampleReader
from llava_jax.data.tokenizer import load_tokenizer

NUM_WORDS = 100_000  # different ones, drawn as words are in a language; behind them come commas and full stops
NUM_DRAWN = 1 << 20  # words of the text that questions and answers are cut from
VOCAB_SIZE = 32_000  # Llama's
FOLDERS = {  # the images' folders and how many of their files the original's list has, by MIX
    "GQA": ("gqa/images", 72_000),
    "OCR-VQA": ("ocr_vqa/images", 80_000),
    "TextCaps": ("textvqa/train_images", 22_000),
    "Visual Genome": ("vg/VG_100K", 86_000),
}
COCO = ("coco/train2017", 118_000)  # all others'
# As many tokens per image as in LLaVA-1.5, of far smaller images.
MODEL = ModelConfig(vision=VisionConfig(image_size=24, patch_size=1))


class BlankImages(ImageProcessor):
    """Every image is black: its file is looked for but not read."""

    def read(self, path: str, *, is_frame: bool = False) -> np.ndarray:
        side = self.model.vision.image_size
        return np.zeros((1, side, side, 3), np.uint8)


def draw_text() -> tuple[str, np.ndarray]:
    """NUM_DRAWN words with spaces and punctuation, and where each begins, int64[NUM_DRAWN + 1]."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "b c d f g h l m n p r s t v w st tr ch sh".split() for b in "aeiou"]
    syllables += [syllable + end for syllable in syllables for end in "nrst"]
    sizes = 1 + np.arange(NUM_WORDS) ** 0.11 + random.normal(0, 0.4, NUM_WORDS)
    words = ["".join(random.choice(syllables, max(1, int(size / 1.2)))) for size in sizes]
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


def draw_records(num_records: int) -> Iterator[dict]:
    """Records with the rounds and words of MIX, shuffled."""
    random = np.random.default_rng(1)
    share = num_records / sum(part.num_samples for part in MIX)
    parts = random.permutation(
        np.repeat(np.arange(len(MIX)), [round(part.num_samples * share) for part in MIX])
    )
    text, begins = draw_text()
    for number, part in enumerate(parts.tolist()):
        yield _record(MIX[part], number, random, text, begins)


def _record(part: Part, number: int, random: np.random.Generator, text: str, begins: np.ndarray) -> dict:
    rounds = int(random.integers(part.rounds[0], part.rounds[1] + 1))
    mean, deviation = part.words
    shape = (mean / deviation) ** 2
    turns = []
    for words in random.gamma(shape, mean / shape, rounds).astype(int).clip(4):
        first = int(random.integers(NUM_DRAWN - words))
        middle, last = first + max(2, words // 4), first + words
        turns.append({"from": "human", "value": text[begins[first] : begins[middle]].strip() + "?"})
        turns.append({"from": "gpt", "value": text[begins[middle] : begins[last]].strip()})
    record = {"id": f"{number:012d}", "conversations": turns}
    if not part.has_image:
        return record
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    folder, num_files = FOLDERS.get(part.name, COCO)
    return record | {"image": f"{folder}/{random.integers(num_files):012d}.jpg"}
