"""One safetensors file, read tensor by tensor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy, and through it safetensors, the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_jax.convert.errors import ConversionError, listing
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
        with self._open() as handle:
            self._refuse_repeated_names()
            for name in handle.keys():  # noqa: SIM118 (the handle is not iterable)
                part = handle.get_slice(name)
                self.tensors[name] = (
                    tuple(part.get_shape()),
                    _DTYPES.get(part.get_dtype(), part.get_dtype()),
                )

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` of a tensor; no other bytes of the file are read."""
        shape, _ = self.tensors[name]
        with self._open() as handle:
            if (begin, end) in ((0, None), (0, shape[0] if shape else None)):
                return handle.get_tensor(name)
            return handle.get_slice(name)[begin:end]

    def _refuse_repeated_names(self) -> None:
        """The library takes the last of two entries of one name, other readers may take the first."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            repeated = repeated_keys(file.read(length).decode())
        if repeated:
            raise ConversionError(
                f"{self.path} cannot be read as a safetensors file (its header lists {listing(repeated)} twice); "
                "fetch or write it again."
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[safe_open]:
        try:
            handle = safe_open(self.path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{self.path} cannot be read as a safetensors file ({error}); fetch or write it again."
            ) from error
        with handle:
            yield handle
