"""A model to read from, whatever it is stored as: our leaf names, read one at a time or part by part."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_jax.config import ModelConfig, TextConfig, VisionConfig

Index = tuple[slice, ...]  # one slice per axis, with a step of 1; () is the whole array
# One layer of a 7B decoder's widest projection takes 90 MB in bfloat16.
_PART_BYTES = 96 * 2**20


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that is not read yet.

    `read()` gives the whole array. With an `axis`, `read(index)` gives a part and reads little else, least if
    the part is a range of that axis: layers of a stacked leaf, rows or columns of another. With None, `read`
    takes no index, and there is nothing to gain from parts.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    axis: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: Index = ()) -> np.ndarray:
        """What `index`, completed or (), selects."""
        if not index or extent(index) == self.shape:
            return self.read()
        return self.read(index) if self.axis is not None else self.read()[index]

    def parts(self) -> list[Index]:
        """Ranges of `axis` that follow each other and cover the array, of about 100 MB or one layer each."""
        if self.axis is None or self.num_bytes <= _PART_BYTES:
            return [()]
        length = self.shape[self.axis]
        step = length
        while step > 1 and self.num_bytes // length * step > _PART_BYTES:
            step = -(-step // 2)
        whole = [slice(0, size) for size in self.shape]
        ranges = [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]
        return [(*whole[: self.axis], part, *whole[self.axis + 1 :]) for part in ranges]


def read_ahead(leaf: Leaf, indices: list[Index]) -> Iterator[np.ndarray]:
    """What each index selects; while one is used, a thread reads the next."""
    if len(indices) == 1:
        yield leaf.part(indices[0])
        return
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(leaf.part, indices[0])
        for index in indices[1:]:
            values = pending.result()
            pending = reader.submit(leaf.part, index)
            yield values
        yield pending.result()


def completed(index: Index, shape: tuple[int, ...]) -> Index:
    """`index` with a slice for every axis of `shape` and begins and ends in numbers."""
    index = index + (slice(None),) * (len(shape) - len(index))
    return tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True))


def extent(index: Index) -> tuple[int, ...]:
    """The shape of what a completed index selects."""
    return tuple(max(0, one.stop - one.start) for one in index)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model, or a part of one, under our names.

    `config` is a ModelConfig; for the layouts "clip" and "siglip" a VisionConfig, for "llama" a TextConfig, for
    "projector" None. `layout` is "ours", "llava-hf", "llava", "clip", "siglip", "llama", "projector" or "parts".
    `leaves` maps our flat names to arrays. `idle` maps canonical names to the tensors that are not run but
    belong to the model: the tower's layers above the one that is read, what follows them, token rows above ours.
    """

    layout: str
    config: ModelConfig | VisionConfig | TextConfig | None
    leaves: dict[str, Leaf]
    idle: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    tokenizer_path: str = ""  # a directory or file, "" if there is none
    template: str = "v1"
    image_aspect_ratio: str = "pad"

    def names(self) -> list[str]:
        return list(self.leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.leaves[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.leaves[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One leaf, layers stacked, kernels [in, out]. Reads only the bytes it needs."""
        return self.leaves[name].read()

    def num_bytes(self) -> int:
        """Of all leaves."""
        return sum(leaf.num_bytes for leaf in self.leaves.values())

    def with_leaves(self, leaves: dict[str, Leaf], layout: str = "") -> "ModelSource":
        """The same model with some leaves replaced or added."""
        return dataclasses.replace(self, leaves=self.leaves | leaves, layout=layout or self.layout)

    def set_aside(self) -> dict[str, np.ndarray]:
        """The tensors of `idle`, for an export to restore."""
        return {name: leaf.read() for name, leaf in self.idle.items()}
