"""One file written by torch.save, read tensor by tensor without torch."""

import dataclasses
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np

from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.file_bytes import read_run
from llava_jax.convert.restricted_pickle import Storage, StoredTensor, run_pickle
from llava_jax.convert.stored_zip import Entry, zip_entries

# A tensor takes 130 to 250 bytes of it, and 4 MiB of the worst instructions 12 seconds and 400 MB (measured).
_MAX_PICKLE = 2**22
# torch/serialization.py: what a file of torch before 1.6 begins with, as pickles.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9")  # the first bytes of the two formats


class TorchFile:
    """`tensors` maps names to (shape, dtype name).

    The file holds a dictionary of tensors, bare or, as trainers save it, under the key "state_dict" beside
    other things. Reads at construction what describes the tensors, and nothing of their values. Raises
    ConversionError for damaged files and for pickles that hold or do anything else.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read_so_far = {}  # storage key -> how many of its first bytes, and their checksum
        try:
            with open(path, "rb") as file:
                is_zip = file.read(4) == MAGIC[0]
            content, self._places = _open_zip(path) if is_zip else _open_legacy(path)
            self._views = _named_tensors(content)
            for name, view in self._views.items():
                self._check_storage(name, view.storage)
        except (UnpicklingError, zipfile.BadZipFile, OSError) as error:
            raise ConversionError(
                f"{path} cannot be read as a file of tensors by torch.save: {error}. Nothing in it was run. Fetch it "
                "again, or save the model's state_dict as safetensors where you trust the file."
            ) from error
        self.tensors = {name: (view.shape, view.storage.dtype) for name, view in self._views.items()}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` of a tensor; no other bytes of the file are read.

        A storage is checked against the zip's checksum when it has been read whole, at once or in parts that follow
        each other.
        """
        view = self._views[name]
        begin, end, _ = slice(begin, end).indices(view.shape[0]) if view.shape else (0, 1, 1)
        shape = (max(end - begin, 0), *view.shape[1:]) if view.shape else ()
        offset = view.offset + (begin * view.strides[0] if view.shape else 0)
        part = dataclasses.replace(view, offset=offset, shape=shape)
        if math.prod(shape) == 0:
            return np.empty(shape, view.storage.dtype)
        return self._read_run(name, part) if _is_contiguous(part) else self._read_strided(part)

    def _check_storage(self, name: str, storage: Storage) -> None:
        place = self._places.get(storage.key)
        size = storage.size * np.dtype(storage.dtype).itemsize
        if place is None:
            raise UnpicklingError(f"the values of {name} are not in it")
        if place.end - place.begin != size:
            raise UnpicklingError(
                f"{name} needs a storage of {size} bytes, but {place.end - place.begin} are there"
            )

    def _read_run(self, name: str, part: StoredTensor) -> np.ndarray:
        dtype, place = np.dtype(part.storage.dtype), self._places[part.storage.key]
        begin = part.offset * dtype.itemsize
        array = read_run(self.path, place.begin + begin, part.shape, dtype, name)
        # torch.save writes 0 where it is told not to compute checksums (torch.serialization.set_crc32_options).
        if place.crc and not self._is_sound(part.storage.key, begin, array.reshape(-1).view(np.uint8)):
            raise ConversionError(
                f"{self.path}: the values of {name} are damaged (checksum); fetch it again."
            )
        return array

    def _is_sound(self, key: str, begin: int, data: np.ndarray) -> bool:
        """False if `data`, which lies at byte `begin` of a storage, completes it and its checksum is another."""
        end, crc = self._read_so_far.get(key, (0, 0)) if begin else (0, 0)
        if end != begin:  # not all that lies before it has just been read
            return True
        end, crc = begin + data.nbytes, zlib.crc32(data, crc)
        self._read_so_far[key] = end, crc
        place = self._places[key]
        return end < place.end - place.begin or crc == place.crc

    def _read_strided(self, part: StoredTensor) -> np.ndarray:
        dtype, place = np.dtype(part.storage.dtype), self._places[part.storage.key]
        return np.ndarray(
            part.shape,
            dtype,
            np.memmap(self.path, np.uint8, "r"),
            place.begin + part.offset * dtype.itemsize,
            [stride * dtype.itemsize for stride in part.strides],
        ).copy(order="C")


def _is_contiguous(view: StoredTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _named_tensors(content: object) -> dict[str, StoredTensor]:
    if type(content) is not dict:
        raise UnpicklingError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    if type(content.get("state_dict")) is dict:
        content = content["state_dict"]
    strange = [
        name for name, value in content.items() if type(name) is not str or type(value) is not StoredTensor
    ]
    if strange:
        raise UnpicklingError(f"it holds something else than tensors ({listing(strange)})")
    return content


def _open_zip(path: Path) -> tuple[object, dict[str, Entry]]:
    """The content, and storage key -> place, of a file by torch 1.6 or later."""
    entries = zip_entries(path)
    programs = [name for name in entries if name.endswith("/data.pkl")]
    if len(programs) != 1 or programs[0].count("/") != 1:
        raise zipfile.BadZipFile("it is a zip file without the one data.pkl of torch.save")
    root = programs[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise UnpicklingError("it is a TorchScript program")
    order = f"{root}byteorder"
    if order in entries and _bytes(path, entries[order], 16) != b"little":
        raise UnpicklingError("it was saved on a big-endian machine")
    content = run_pickle(io.BytesIO(_bytes(path, entries[programs[0]], _MAX_PICKLE)))
    prefix = f"{root}data/"
    return content, {key.removeprefix(prefix): entries[key] for key in entries if key.startswith(prefix)}


def _bytes(path: Path, entry: Entry, limit: int) -> bytes:
    size = entry.end - entry.begin
    if size > limit:
        raise UnpicklingError(
            f"what describes its tensors takes {size} bytes, more than the {limit} that are read"
        )
    with open(path, "rb") as file:
        file.seek(entry.begin)
        data = file.read(size)
    if len(data) != size or (entry.crc and zlib.crc32(data) != entry.crc):
        raise zipfile.BadZipFile("what describes its tensors is damaged (checksum)")
    return data


def _open_legacy(path: Path) -> tuple[object, dict[str, Entry]]:
    """The same of a file by an earlier torch: pickles one behind the other, then the storages."""
    with open(path, "rb") as file:
        program = io.BytesIO(file.read(_MAX_PICKLE))
    if run_pickle(program) != _MAGIC_NUMBER:
        raise UnpicklingError("it does not begin as such a file does")
    if run_pickle(program) != _PROTOCOL_VERSION:
        raise UnpicklingError("it has another version of torch's format")
    system = run_pickle(program)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise UnpicklingError("it was saved on a big-endian machine")
    content, keys = run_pickle(program), run_pickle(program)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        raise UnpicklingError("its list of storages is broken")
    sizes = {tensor.storage.key: tensor.storage for tensor in _tensors_within(content)}
    return content, _legacy_places(path, keys, sizes, program.tell())


def _tensors_within(content: object) -> Iterator[StoredTensor]:
    """All tensors, however deep in dictionaries and lists; each container is entered once."""
    seen, left = set(), [content]
    while left:
        value = left.pop()
        if type(value) is StoredTensor:
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


def _legacy_places(path: Path, keys: list[str], storages: dict[str, Storage], begin: int) -> dict[str, Entry]:
    """Each storage is its number of elements as an int64, then the elements."""
    places = {}
    length = path.stat().st_size
    with open(path, "rb") as file:
        for key in keys:
            if key not in storages:
                raise UnpicklingError("it holds a storage that no tensor uses")
            file.seek(begin)
            size = int.from_bytes(file.read(8), "little")
            begin += 8
            end = begin + size * np.dtype(storages[key].dtype).itemsize
            if end > length:
                raise UnpicklingError("it ends before its last tensor; the download is incomplete")
            places[key] = Entry(begin, end, 0)
            begin = end
    return places
