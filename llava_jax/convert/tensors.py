"""Safetensors files: read tensor by tensor, and written, sharded, as a stream."""

import contextlib
import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and through it safetensors, the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_jax.convert.errors import ConversionError, listing

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _DTYPES.items()}


class TensorFiles:
    """The tensors of one safetensors file, or of a directory with `model.safetensors` or an index of shards.

    Only headers are read at construction. Raises ConversionError for missing, damaged or escaping files.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries = {}  # name -> (file, shape, dtype code)
        for file in _files(path):
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 (the handle is not iterable)
                    part = handle.get_slice(name)
                    self._entries[name] = (file, tuple(part.get_shape()), part.get_dtype())
        missing = [name for name in _indexed(path) if name not in self._entries]
        if missing:
            raise ConversionError(
                f"{path}: the index lists {len(missing)} tensors that its shards do not hold "
                f"({listing(missing)}); the download is incomplete or the index belongs to another model."
            )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Raises ConversionError for integer and 8-bit tensors, which are no LLaVA weights."""
        file, _, code = self._entries[name]
        if code not in _DTYPES:
            raise ConversionError(
                f"{file}: tensor {name} is stored as {code}; only {', '.join(_DTYPES)} can be read. "
                "Convert an unquantised copy of the model."
            )
        return np.dtype(_DTYPES[code])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` of a tensor; no other bytes of the file are read."""
        self.dtype(name)
        file, shape, _ = self._entries[name]
        with _open(file) as handle:
            if (begin, end) in ((0, None), (0, shape[0] if shape else None)):
                return handle.get_tensor(name)
            return handle.get_slice(name)[begin:end]


@contextlib.contextmanager
def _open(file: Path):
    try:
        handle = safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file} cannot be read as a safetensors file ({error}); fetch or write it again."
        ) from error
    with handle:
        yield handle


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = _index(path)
    if index is not None:
        return [_shard(index, name) for name in sorted(set(_indexed(path).values()))]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ConversionError(
            f"{path} holds {len(found)} safetensors files ({listing(file.name for file in found)}) but no "
            "model.safetensors.index.json that says which belong together; add the index or name one file."
        )
    if list(path.glob("*.bin")):
        raise ConversionError(
            f"{path} holds its weights in .bin files, which are pickles and are not read yet; save the model "
            "as safetensors first (in transformers: model.save_pretrained(directory))."
        )
    raise ConversionError(
        f"{path} holds no safetensors file and no llava_jax model; is it the right directory?"
    )


def _index(path: Path) -> Path | None:
    index = path / "model.safetensors.index.json"
    return index if index.exists() else None


def _indexed(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, where the directory's files are listed by an index."""
    index = _index(path) if path.is_dir() else None
    if index is None or (path / "model.safetensors").exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map; fetch or write it again.")
    return weight_map


def _shard(index: Path, name: str) -> Path:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConversionError(
            f"{index} points outside its directory, to {name!r}; such an index is not followed."
        )
    shard = index.parent / name
    if not shard.exists():
        raise ConversionError(f"{index} lists the shard {name}, which is not there; fetch or write it again.")
    return shard


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises ConversionError naming the file otherwise."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}); fetch or write it again.") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} should hold a JSON object, not a {type(fields).__name__}.")
    return fields


class ShardWriter:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes and their index.

    The safetensors library needs all tensors of a file in memory at once. The format is a length, a JSON
    header and the bytes, so here a header's room is left free, the bytes are streamed tensor by tensor, and
    the header is filled in last.
    """

    def __init__(self, directory: Path, *, names: list[str], max_shard_size: int):
        """`names`: every tensor that will come, which tells how long a header can get."""
        self._directory = directory
        self._max_shard_size = max_shard_size
        room = 64 + sum(len(json.dumps(name)) + 128 for name in names)
        self._room = -(-room // 8) * 8
        self._headers = []  # per shard: name -> entry
        self._position = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor of a dtype that `TensorFiles` reads."""
        if not self._headers or (self._position and self._position + array.nbytes > self._max_shard_size):
            self._finish_shard()
            self._headers.append({})
            self._shard().write_bytes(bytes(8 + self._room))
            self._position = 0
        end = self._position + array.nbytes
        self._headers[-1][name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [self._position, end],
        }
        with open(self._shard(), "ab") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
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
