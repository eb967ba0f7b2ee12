"""python -m benchmarks.conversion [--size=tiny|7b|13b] [--layers=N] [--directory=DIR] [--json]: speed, memory of converting.

Makes a llava-hf checkpoint with the shapes of that size, converts it to ours and back with the real commands, and
loads and saves it with transformers. Every command is a process of its own that finds none of its input in memory.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from llava_jax.config import ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.export import write_hf
from llava_jax.convert.names import VOCABULARY, idle_vision_rows, model_rows
from llava_jax.convert.source import Index, Leaf, completed, extent

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "tools/convert_weights.py")]
POOL_SIZE = 2**25 + 39  # bfloat16 values drawn once; no power of two, so that no two layers begin alike
EXTRA_TOKENS = 64  # <image>, <pad> and rows up to a multiple of 64, as in llava-hf/llava-1.5-7b-hf
COPY_BYTES = 4 * 10**9  # how much is copied at most to measure the disk
BLOCK = 16 * 2**20

# CLIP ViT-L/14-336 is ModelConfig's default tower. Sizes of lmsys/vicuna-7b-v1.5 and vicuna-13b-v1.5.
MODELS = {
    "tiny": ModelConfig(
        vision=VisionConfig(64, 256, 3, 4, 28, 14), text=TextConfig(32000, 256, 688, 4, 4, 4, 64)
    ),
    "7b": ModelConfig(),
    "13b": ModelConfig(text=TextConfig(32000, 5120, 13824, 40, 40, 40, 128)),
}
# A process counts the memory of the one that it was forked from, so a small one stands between.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(code)
"""
TORCH = """
import sys, torch
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


class RandomTensors:
    """Random bfloat16 values in any amount, cut from a small pool."""

    def __init__(self):
        values = np.random.default_rng(0).standard_normal(POOL_SIZE, np.float32)
        self._pool = (0.02 * values).astype(ml_dtypes.bfloat16)

    def draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The same for the same name and shape."""
        begin = zlib.crc32(name.encode()) % (POOL_SIZE // 2)
        return np.resize(self._pool[begin:], shape)

    def leaf(self, name: str, shape: tuple[int, ...]) -> Leaf:
        def read(index: Index = ()) -> np.ndarray:
            index = completed(index, shape)
            return self.draw(f"{name} {index}", extent(index))

        return Leaf(shape, np.dtype(ml_dtypes.bfloat16), read, axis=0)


def make_checkpoint(model: ModelConfig, directory: Path) -> None:
    """A llava-hf directory with random values in every tensor that the published ones hold."""
    tensors = RandomTensors()
    leaves = {row.leaf: tensors.leaf(row.leaf, row.shape) for row in model_rows(model)}
    aside = {
        row.leaf: tensors.draw(row.leaf, row.shape)
        for row in idle_vision_rows(model.vision, model.num_vision_layers_run, head=False)
    }
    for name in VOCABULARY:
        aside[name] = tensors.draw(name, (EXTRA_TOKENS, model.text.hidden_size))
    write_hf(directory, layout="llava-hf", model=model, read=leaves.__getitem__, set_aside=aside)


def digests(directory: Path) -> dict[str, tuple]:
    """(shape, dtype, CRC-32 of the bytes) of every tensor in a directory's safetensors files."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (the handle is not iterable)
                tensor = file.get_tensor(name)
                found[name] = tensor.shape, tensor.dtype.name, zlib.crc32(tensor.reshape(-1).view(np.uint8))
    return found


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def forget(directory: Path) -> None:
    """Takes a directory's files out of the page cache, so that they are read from the disk again."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_speed(directory: Path, destination: Path) -> float:
    """GB/s of copying a directory's largest files one after the other, until the copy is on the disk."""
    forget(directory)
    copied, start = 0, time.perf_counter()
    with open(destination, "wb") as target:
        for path in sorted(directory.glob("*.safetensors"), key=lambda path: -path.stat().st_size):
            with open(path, "rb") as source:
                while copied < COPY_BYTES and (block := source.read(BLOCK)):
                    copied += target.write(block)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    destination.unlink()
    return copied / 1e9 / seconds


def run(command: list[str], directory: Path) -> dict[str, float]:
    """Runs a command whose input is `directory`; -> {seconds, peak_rss_gb}. Ends with its output if it fails."""
    forget(directory)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    kibibytes = int(output.splitlines()[-1])
    return {"seconds": time.perf_counter() - start, "peak_rss_gb": kibibytes * 1024 / 1e9}


def measure(size: str, model: ModelConfig, directory: Path) -> dict:
    """Makes, converts, verifies and removes; never more than two copies of the model lie on the disk."""
    source, ours, back, saved = (directory / name for name in ("source", "ours", "back", "saved"))
    make_checkpoint(model, source)
    model_gb = num_bytes(source) / 1e9
    expected = digests(source)
    print(f"{size}: {model_gb:.2f} GB in {len(expected)} tensors", flush=True)
    disk = copy_speed(source, directory / "copy")
    print(f"{'':32}{'seconds':>9}{'GB/s':>8}{'peak RSS, GB':>14}")
    tell("copy", model_gb / disk, model_gb)

    results = {}

    def timed(label: str, name: str, command: list, input_directory: Path) -> None:
        results[name] = run([str(word) for word in command], input_directory)
        tell(label, results[name]["seconds"], model_gb, results[name]["peak_rss_gb"])

    timed("from-hf", "from_hf", [*COMMAND, "from-hf", source, ours], source)
    timed("verify (reads both)", "verify", [*COMMAND, "verify", source, ours], source)
    shutil.rmtree(source)
    timed("to-hf", "to_hf", [*COMMAND, "to-hf", ours, back], ours)
    bit_exact = digests(back) == expected
    shutil.rmtree(ours)
    again = copy_speed(back, directory / "copy")
    tell("copy again", model_gb / again, model_gb)
    if free_memory() > 1.25e9 * model_gb + 1e9:
        timed("transformers, load and save", "transformers", [sys.executable, "-c", TORCH, back, saved], back)
    else:
        print("transformers needs more memory than is free here to hold the model")
    print(f"there and back: {'bit for bit the same' if bit_exact else 'DIFFERENT'}")
    disk = (disk + again) / 2  # others may use it too, and it is not always as fast
    ways = [results["from_hf"], results["to_hf"]]
    shares = [f"{100 * model_gb / way['seconds'] / disk:.0f} %" for way in ways]
    print(
        f"from-hf and to-hf run at {' and '.join(shares)} of the speed of the copies, {disk:.3f} GB/s on average"
    )
    return {
        "size": size,
        "layers": model.text.num_hidden_layers,
        "model_gb": model_gb,
        "seconds": sum(way["seconds"] for way in ways),
        "peak_rss_gb": max(way["peak_rss_gb"] for way in ways),
        "gb_per_second": min(model_gb / way["seconds"] for way in ways),
        "disk_gb_per_second": disk,
        "bit_exact": bit_exact,
        **results,
    }


def tell(label: str, seconds: float, model_gb: float, peak: float | None = None) -> None:
    memory = "" if peak is None else f"{peak:14.2f}"
    print(f"  {label:30}{seconds:9.1f}{model_gb / seconds:8.3f}{memory}", flush=True)


def free_memory() -> int:
    """Bytes that programs can still get."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("--size", choices=MODELS, default="tiny")
    parser.add_argument("--layers", type=int, help="of the decoder, where there is no room for all of them")
    parser.add_argument("--directory", help="where there is room for the model twice; default: temporary")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the directory is removed
    model = MODELS[options.size]
    if options.layers:
        model = dataclasses.replace(
            model, text=dataclasses.replace(model.text, num_hidden_layers=options.layers)
        )
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="conversion-") as directory:
        model_bytes = 2 * sum(math.prod(row.shape) for row in model_rows(model))
        needed = 1.02 * model_bytes + max(model_bytes, COPY_BYTES)
        free = shutil.disk_usage(directory).free
        if options.size != "tiny" and free < needed:
            sys.exit(
                f"{directory} has {free / 1e9:.0f} GB free, but {needed / 1e9:.0f} are needed; give another "
                "--directory, or fewer --layers."
            )
        results = measure(options.size, model, Path(directory))
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
