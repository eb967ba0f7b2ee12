"""python -m benchmarks.pipeline [--json]: images per second from JPEG files to batches, beside the original's way.

Both decode 640 x 480 photographs, pad them to a square and resize it to 336 pixels. The original's way is LLaVA's
dataset in a torch DataLoader with one worker; ours is `ImageProcessor` under grain with one thread. They take turns
in one run, on one core each, and their pixels are compared before anything is timed.
"""

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable

import grain
import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from llava_jax.commands import run_command
from llava_jax.config import ModelConfig, VisionConfig
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import pad_color

TOWER = VisionConfig()
IMAGE_SIZE = TOWER.image_size
PHOTOGRAPH = (640, 480)
BATCH_SIZE = 16
NUM_IMAGES = 64  # per pass
REPEATS = 7
EXACT = ImageProcessor(ModelConfig())
FAST = ImageProcessor(ModelConfig(), fast_decode=True)

ORIGINAL, OURS = "original, DataLoader with 1 worker", "ours, grain with 1 thread"
JSON = flags.DEFINE_bool("json", False, "Print the figures as JSON in the last line.")


class Photographs:
    """The original's dataset, cut down to its images: float32[3, H, W] each, normalised."""

    def __init__(self, paths: list[str]):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.paths = paths
        crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = Image.open(self.paths[index]).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), pad_color(TOWER))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.processor.preprocess(square, return_tensors="pt")["pixel_values"][0]


def main() -> None:
    """Draws the photographs, prints the table and, if asked, the figures as JSON."""
    print(f"drawing {NUM_IMAGES} photographs of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        paths = [f"{directory}/{number}.jpg" for number in range(NUM_IMAGES)]
        for number, path in enumerate(paths):
            draw_photograph(number).save(path, quality=90)
        print(f"  {statistics.mean(map(os.path.getsize, paths)) / 1000:.0f} kB each on average", flush=True)
        results = measure(paths)
    if JSON.value:
        print(json.dumps(results))


def measure(paths: list[str]) -> dict[str, float]:
    """Prints the table and returns its figures."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    photographs = Photographs(paths)
    require_same_pixels(photographs)
    difference = np.mean([np.abs(FAST.read(path).astype(int) - EXACT.read(path)).mean() for path in paths])
    # A worker is forked before grain starts threads; it stays for all passes.
    loader = torch.utils.data.DataLoader(
        photographs, batch_size=BATCH_SIZE, num_workers=1, persistent_workers=True
    )
    passes = {
        ORIGINAL: lambda: loader,
        OURS: lambda: batches(paths, EXACT, num_threads=1),
        "original, plain loop": lambda: (photographs[i] for i in range(len(paths))),
        "ours, plain loop": lambda: map(EXACT.read, paths),
        "ours with fast_decode, plain loop": lambda: map(FAST.read, paths),
        "decoding alone, plain loop": lambda: map(decode, paths),
        "ours, grain with 2 threads": lambda: batches(paths, EXACT, num_threads=2),
    }
    seconds = take_turns(passes)
    rates = {name: len(paths) / statistics.median(values) for name, values in seconds.items()}
    for workers in (1, 2):
        name = f"ours, grain with {workers} process{'es' * (workers > 1)}"
        rates[name] = rate_of_processes(paths, workers)
    theirs, ours = rates[ORIGINAL], rates[OURS]
    ratio = typical_ratio(seconds[ORIGINAL], seconds[OURS])
    print(f"{'images per second':<40} {'':>7} {'x original':>11}")
    for name, rate in rates.items():
        print(f"  {name:<38} {rate:7.0f} {rate / theirs:11.2f}")
    print(
        f"pixels: ours equal the original's; with fast_decode they differ by {difference:.2f} levels on average"
    )
    print(f"one core: {ours:.0f} images per second, {ratio:.2f} x the original", flush=True)
    return {
        "ratio": ratio,
        "images_per_second_per_core": ours,
        "original_images_per_second_per_core": theirs,
        "ratio_plain_loop": typical_ratio(seconds["original, plain loop"], seconds["ours, plain loop"]),
        "ratio_fast_decode": typical_ratio(
            seconds["original, plain loop"], seconds["ours with fast_decode, plain loop"]
        ),
        "rates": rates,
    }


def take_turns(passes: dict[str, Callable[[], Iterable]]) -> dict[str, list[float]]:
    """Seconds of each pass in each of REPEATS rounds, in which every one has its turn."""
    seconds = {name: [] for name in passes}
    for round in range(REPEATS + 1):  # the first one warms up
        for name, start in passes.items():
            before = time.perf_counter()
            for _ in start():
                pass
            if round:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def typical_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios, which a machine that is busy for a while disturbs least."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def batches(paths: list[str], processor: ImageProcessor, *, num_threads: int) -> Iterable[np.ndarray]:
    """Batches uint8[BATCH_SIZE, H, W, 3], as the training pipeline makes them."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * BATCH_SIZE)
    rows = grain.MapDataset.source(paths).map(functools.partial(_first_tile, processor))
    return rows.to_iter_dataset(options).batch(BATCH_SIZE)


def _first_tile(processor: ImageProcessor, path: str) -> np.ndarray:
    return processor.read(path)[0]


def rate_of_processes(paths: list[str], num_workers: int) -> float:
    """Images per second from grain's worker processes once they run."""
    rows = grain.MapDataset.source(paths).repeat(4).map(functools.partial(_first_tile, EXACT))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * BATCH_SIZE)
    rows = rows.to_iter_dataset(options).batch(BATCH_SIZE)
    iterator = iter(rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers)))
    for _ in range(len(paths) // BATCH_SIZE):
        next(iterator)
    before = time.perf_counter()
    count = sum(len(batch) for batch in iterator)
    return count / (time.perf_counter() - before)


def decode(path: str) -> None:
    with Image.open(path) as image:
        image.load()


def require_same_pixels(photographs: Photographs) -> None:
    """Raises AssertionError unless ours, normalised as the original does it, equal the original's bit for bit."""
    for index, path in enumerate(photographs.paths):
        scaled = (EXACT.read(path)[0] * (1 / 255)).astype(np.float32)
        ours = (scaled - np.array(TOWER.image_mean, np.float32)) / np.array(TOWER.image_std, np.float32)
        assert np.array_equal(ours.transpose(2, 0, 1), photographs[index].numpy()), path


def draw_photograph(seed: int) -> Image.Image:
    """Light and shade at all scales, as photographs have them, behind things with sharp edges."""
    rng = np.random.default_rng(seed)
    width, height = PHOTOGRAPH
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width) ** rng.uniform(1.3, 1.7)
    noise = np.fft.rfft2(rng.normal(size=(3, height, width)))
    noise[1:] = 0.8 * noise[:1] + 0.2 * noise[1:]  # colours change less than brightness
    field = np.fft.irfft2(noise * amplitude, s=(height, width))
    field = 50 * field / field.std() + rng.uniform(90, 150, (3, 1, 1))
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    pencil = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 12)):
        (x, y), (w, h) = rng.uniform(0, PHOTOGRAPH), rng.uniform(10, 150, 2)
        shape = pencil.ellipse if rng.random() < 0.5 else pencil.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(level) for level in rng.integers(0, 256, 3)))
    return image


if __name__ == "__main__":
    run_command(main)
