"""Writes safetensors files, sharded, as a stream."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ShardWriter:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes and their index.

    The safetensors library needs all tensors of a file in memory at once. The format is a length, a JSON
    header and the bytes, so here a header's room is left free, the bytes are streamed part by part, and the
    header is filled in last.
    """

    def __init__(self, directory: Path, *, names: list[str], max_shard_size: int):
        """`names`: every tensor that will come, which tells how long a header can get."""
        self._directory = directory
        self._max_shard_size = max_shard_size
        room = 64 + sum(len(json.dumps(name)) + 128 for name in names)
        self._room = -(-room // 8) * 8
        self._headers = []  # per shard: name -> entry
        self._position = 0

    def add(self, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
        """Appends a tensor of a dtype that `TensorFiles` reads; `parts` hold its values one after the other."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not self._headers or (self._position and self._position + num_bytes > self._max_shard_size):
            self._finish_shard()
            self._headers.append({})
            self._shard().write_bytes(bytes(8 + self._room))
            self._position = 0
        end = self._position + num_bytes
        self._headers[-1][name] = {
            "dtype": _CODES[dtype.name],
            "shape": list(shape),
            "data_offsets": [self._position, end],
        }
        with open(self._shard(), "ab") as file:
            for part in parts:
                assert part.dtype == dtype
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            assert file.tell() == 8 + self._room + end
        self._position = end

    def _shard(self) -> Path:
        return self._directory / f"shard-{len(self._headers)}"

    def close(self) -> None:
        """Completes the last file and gives all of them their final names."""
        self._finish_shard()
        count = len(self._headers)
        weight_map = {}
        for i, header in enumerate(self._headers, 1):
            name = "model.safetensors" if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
            os.rename(self._directory / f"shard-{i}", self._directory / name)
            weight_map |= dict.fromkeys(header, name)
        if count > 1:
            total = sum(
                max(entry["data_offsets"][1] for entry in header.values()) for header in self._headers
            )
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _finish_shard(self) -> None:
        if not self._headers:
            return
        header = {"__metadata__": {"format": "pt"}} | self._headers[-1]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        assert len(encoded) <= self._room
        with open(self._shard(), "r+b") as file:
            file.write(self._room.to_bytes(8, "little") + encoded.ljust(self._room))
