"""Reads golden files, gzipped (.gz), xz-compressed (.xz) or plain."""

import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np


def read_bytes(path: Path) -> bytes:
    """The content of `path`, or of `path` with .gz or .xz appended."""
    if path.exists():
        return path.read_bytes()
    for suffix, module in ((".gz", gzip), (".xz", lzma)):
        compressed = path.with_name(path.name + suffix)
        if compressed.exists():
            return module.decompress(compressed.read_bytes())
    raise FileNotFoundError(path)


def unpacked(folder: Path, scratch: Path) -> Path:
    """Copies the models in `folder` to `scratch` with compressed files decompressed, for loaders that want plain ones."""
    for path in folder.rglob("*"):
        if path.name.removesuffix(".gz").removesuffix(".xz").endswith((".json", ".safetensors")):
            plain = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
            target = scratch / plain.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(plain))
    return scratch


def load_json(path: Path):
    return json.loads(read_bytes(path))


def load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(read_bytes(path))) as arrays:
        return {name: arrays[name] for name in arrays.files}
