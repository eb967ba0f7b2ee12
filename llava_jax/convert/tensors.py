"""The tensors of a checkpoint, in whatever files and format they are stored."""

from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np

from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.safetensors_file import SafetensorsFile
from llava_jax.convert.torch_file import MAGIC, TorchFile
from llava_jax.convert.weight_files import weight_files

_DTYPES = ("float64", "float32", "float16", "bfloat16")


class TensorFiles:
    """The tensors of one file, safetensors or torch.save's, or of a directory that holds a model's weights.

    Only what describes the tensors is read at construction. Raises ConversionError for missing, damaged,
    hostile or escaping files.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files = {}  # tensor name -> file
        files, expected = weight_files(path)
        for file in map(_open, files):
            for name in file.tensors:
                if len(name) > 1000 or not name.isprintable():
                    raise ConversionError(f"{file.path} has a tensor called {name[:50]!r}, which is no name.")
                if name in self._files:
                    raise ConversionError(
                        f"{path}: tensor {name} is in {self._files[name].path.name} and in {file.path.name}; "
                        "remove the file that belongs to another model, or fetch them again."
                    )
                self._files[name] = file
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise ConversionError(
                f"{path}: the index lists {len(missing)} tensors that its shards do not hold "
                f"({listing(missing)}); the download is incomplete or the index belongs to another model."
            )

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].tensors[name][0]

    def dtype(self, name: str) -> np.dtype:
        """Raises ConversionError for integer and 8-bit tensors, which are no LLaVA weights."""
        file = self._files[name]
        dtype = file.tensors[name][1]
        if dtype not in _DTYPES:
            raise ConversionError(
                f"{file.path}: tensor {name} is stored as {dtype}; only {', '.join(_DTYPES)} can be read. "
                "Convert an unquantised copy of the model."
            )
        return np.dtype(dtype)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` of a tensor; no other bytes of the file are read."""
        self.dtype(name)
        return self._files[name].read(name, begin, end)


def _open(path: Path) -> SafetensorsFile | TorchFile:
    """The format is told by the first bytes, since files are renamed and half-fetched."""
    try:
        with open(path, "rb") as file:
            first = file.read(24)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}).") from error
    if first.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is Git LFS's pointer to the file, not the file; run git lfs pull.")
    if first.startswith(MAGIC) and first[8:9] != b"{":  # a safetensors header may be as long as "PK.." says
        return TorchFile(path)
    if path.suffix == ".safetensors" or first[8:9] == b"{":
        return SafetensorsFile(path)
    raise ConversionError(
        f"{path} is neither a safetensors file nor one by torch.save; fetch it again, or check its name."
    )
