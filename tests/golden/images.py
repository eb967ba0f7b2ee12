"""Set B: pixels after padding, resizing and cropping, and after normalisation."""

import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.images import IMAGE_MEAN, IMAGE_STD, load_image, preprocess
from tests.golden import Skipped
from tests.golden.files import load_json, load_npz, read_bytes


def check(folder: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    del tokenizer
    manifest = load_json(folder / "manifest.json")
    for image in manifest["images"]:
        for result in image["results"]:
            name = f"{image['file']} {result['aspect']} {result['crop']}"
            yield name, _compare(folder, image["file"], result)
    sample = manifest.get("float_sample")
    if sample:
        yield sample["file"], _compare_floats(folder, sample)


def _preprocess(path: Path, size: int, aspect_ratio: str) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as plain:  # the file itself may be packed
        plain.write(read_bytes(path))
        plain.flush()
        return preprocess(load_image(plain.name), size, aspect_ratio)


def _compare(folder: Path, file: str, result: dict) -> str | None:
    if result["aspect"] not in ("pad", "square"):
        return Skipped(f"aspect ratio {result['aspect']} is not built yet")
    if result.get("error") or result.get("quirk"):
        return Skipped("the original misreads images 1 or 3 pixels tall")
    pixels = _preprocess(folder / file, result["crop"], result["aspect"])
    with Image.open(io.BytesIO(read_bytes(folder / result["expected"]))) as image:
        expected = np.asarray(image.convert("RGB"))
    if pixels.shape != expected.shape:
        return f"shape {pixels.shape}, not {expected.shape}"
    if not np.array_equal(pixels, expected):
        wrong = np.abs(pixels.astype(int) - expected)
        return f"{np.count_nonzero(wrong)} values differ, by up to {wrong.max()}"
    digest = hashlib.sha256(_normalize(pixels).astype("<f4").tobytes()).hexdigest()
    return (
        None if digest == result["pixel_values_sha256_f32"] else "normalised pixels differ in the last bits"
    )


def _compare_floats(folder: Path, sample: dict) -> str | None:
    (expected,) = load_npz(folder / sample["file"]).values()
    ours = _normalize(_preprocess(folder / sample["source"], sample["crop"], sample["aspect"]))
    return None if np.array_equal(ours, expected) else f"differ by up to {np.abs(ours - expected).max()}"


def _normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] -> float32[3, H, W], in the order of operations of the original."""
    scaled = (pixels * (1 / 255)).astype(np.float32)
    normal = (scaled - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return normal.transpose(2, 0, 1)
