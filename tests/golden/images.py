"""Set B: pixels after padding, resizing, cropping and tiling, after normalisation, and the sizes on the way."""

import ast
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.config import ModelConfig, VisionConfig
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import size_before_crop
from llava_jax.data.tiles import select_best_resolution
from tests.golden import Skipped
from tests.golden.files import load_json, load_npz, read_bytes

# The grid of the published LLaVA-1.6 models, width and height.
GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# Pillow's versions resize in different orders where one side shrinks and the other grows.
TILE_TOLERANCE = 1  # levels
_MISREAD = Skipped("the original misreads images 1 or 3 pixels tall")


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
    if any(folder.glob("geometry.json*")):
        for case in load_json(folder / "geometry.json"):
            yield f"geometry {case['w']} x {case['h']} to {case['shortest_edge']}", _compare_sizes(case)


def _preprocess(path: Path, result: dict) -> np.ndarray:
    """-> uint8[tiles, H, W, 3]."""
    model = ModelConfig(
        vision=VisionConfig(image_size=result["crop"], patch_size=1),
        image_grid_pinpoints=ast.literal_eval(result.get("grid_pinpoints", "()")),
    )
    with tempfile.NamedTemporaryFile() as plain:  # the file itself may be packed
        plain.write(read_bytes(path))
        plain.flush()
        return ImageProcessor(model, aspect_ratio=result["aspect"]).read(plain.name)


def _compare(folder: Path, file: str, result: dict) -> str | None:
    if result.get("error") or result.get("quirk"):
        return _MISREAD
    pixels = _preprocess(folder / file, result)
    with Image.open(io.BytesIO(read_bytes(folder / result["expected"]))) as image:
        expected = np.asarray(image.convert("RGB"))
    if pixels.shape[1:] != (result["crop"], *expected.shape[1:]) or len(pixels) != result.get("tiles", 1):
        return f"shape {pixels.shape}, not that of {expected.shape} in {result.get('tiles', 1)} tiles"
    wrong = np.abs(pixels.reshape(expected.shape).astype(int) - expected)
    if wrong.max() > (TILE_TOLERANCE if result["aspect"] == "anyres" else 0):
        return f"{np.count_nonzero(wrong)} values differ, by up to {wrong.max()}"
    digest = hashlib.sha256(_normalize(pixels).astype("<f4").tobytes()).hexdigest()
    if not wrong.any() and digest != result["pixel_values_sha256_f32"]:
        return "normalised pixels differ in the last bits"
    return None


def _compare_floats(folder: Path, sample: dict) -> str | None:
    (expected,) = load_npz(folder / sample["file"]).values()
    (ours,) = _normalize(_preprocess(folder / sample["source"], sample))
    return None if np.array_equal(ours, expected) else f"differ by up to {np.abs(ours - expected).max()}"


def _compare_sizes(case: dict) -> str | None:
    size = (case["w"], case["h"])
    resized, best = size_before_crop(size, case["shortest_edge"]), select_best_resolution(size, GRID)
    if [*best] != case["anyres_best_wh"]:
        return f"tiled to {best}, not {case['anyres_best_wh']}"
    if case["h"] in (1, 3):
        return _MISREAD
    return None if [*resized] == case["resized_wh"] else f"resized to {resized}, not {case['resized_wh']}"


def _normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8[N, H, W, 3] -> float32[N, 3, H, W], in the order of operations of the original."""
    scaled = (pixels * (1 / 255)).astype(np.float32)
    clip = VisionConfig()
    normal = (scaled - np.array(clip.image_mean, np.float32)) / np.array(clip.image_std, np.float32)
    return normal.transpose(0, 3, 1, 2)
