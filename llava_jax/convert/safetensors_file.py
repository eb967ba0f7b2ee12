"""One safetensors file, read tensor by tensor."""

import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and through it safetensors, the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.file_bytes import read_run
from llava_jax.convert.json_files import repeated_keys

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFile:
    """`tensors` maps names to (shape, dtype name); rarer dtypes go by safetensors' name (F8_E4M3).

    Only the header is read at construction. The library checks that offsets cover the file without gap or
    overlap and agree with shapes and dtypes. Raises ConversionError.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors = {}
        self._begins = {}  # of each tensor's bytes
        try:
            with safe_open(path, framework="np") as handle:
                names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} cannot be read as a safetensors file ({error}); fetch or write it again."
            ) from error
        begin, header = self._header()
        for name in names:
            entry = header[name]
            self.tensors[name] = tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"])
            self._begins[name] = begin + entry["data_offsets"][0]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` of a tensor; no other bytes of the file are read."""
        shape, dtype = self.tensors[name]
        if shape:
            begin, end, _ = slice(begin, end).indices(shape[0])
            shape = (max(end - begin, 0), *shape[1:])
        row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        return read_run(self.path, self._begins[name] + begin * row_bytes, shape, dtype, name)

    def _header(self) -> tuple[int, dict]:
        """Where the tensors begin, and what the library has found right, but for names that are there twice.

        The library takes the last of two entries of one name, other readers may take the first.
        """
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length).decode()
        repeated = repeated_keys(header)
        if repeated:
            raise ConversionError(
                f"{self.path} cannot be read as a safetensors file (its header lists {listing(repeated)} twice); "
                "fetch or write it again."
            )
        return 8 + length, json.loads(header)
