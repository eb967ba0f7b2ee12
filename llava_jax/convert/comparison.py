"""Compares two models leaf by leaf."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llava_jax.convert.progress import Progress, silent
from llava_jax.convert.source import Leaf, ModelSource, read_ahead


@dataclasses.dataclass(frozen=True)
class Difference:
    """What was found out about one leaf."""

    name: str
    equal: bool
    detail: str


def compare(first: ModelSource, second: ModelSource, *, progress: Progress = silent) -> Iterator[Difference]:
    """Every leaf of either model, then the tensors set aside, each as soon as it is read.

    Equal means the same values; where the dtypes differ, values are compared exactly after widening, and
    `detail` says so. Tensors set aside in only one of them, or in other numbers of rows, are no
    difference: layouts keep different ones. `progress` is told of the bytes of the first.
    """
    for name in dict.fromkeys([*first.names(), *second.names()]):
        if name not in second.names():
            yield Difference(name, False, "only in the first")
        elif name not in first.names():
            yield Difference(name, False, "only in the second")
        elif tuple(first.shape(name)) != tuple(second.shape(name)):
            yield Difference(name, False, f"shape {list(first.shape(name))} and {list(second.shape(name))}")
        else:
            yield _compare(name, first.leaves[name], second.leaves[name], progress)
    for name in first.idle.keys() & second.idle.keys():
        if first.idle[name].shape == second.idle[name].shape:
            yield _compare(f"set aside: {name}", first.idle[name], second.idle[name], progress)


def _compare(name: str, first: Leaf, second: Leaf, progress: Progress) -> Difference:
    worst, place, values, equal_bits = 0.0, (), (), True
    same_dtype = first.dtype == second.dtype
    dtypes = str(first.dtype) if same_dtype else f"{first.dtype} and {second.dtype}"
    axis = first.axis if first.axis is not None else second.axis
    parts = (first if first.axis is not None else second).parts()
    for index, a, b in zip(parts, read_ahead(first, parts), read_ahead(second, parts), strict=True):
        progress(a.nbytes)
        if same_dtype and np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)):
            continue
        equal_bits = False
        distance, where = _farthest(a, b)
        if distance > worst:
            begin = index[axis].start if index else 0
            worst, values = distance, (a[where], b[where])
            place = [int(i) + begin * (j == axis) for j, i in enumerate(where)]
    if worst:
        detail = f"max difference {worst:.3g} at {place}: {values[0]} and {values[1]}, {dtypes}"
        return Difference(name, False, detail)
    return Difference(name, True, f"{'bit-equal' if equal_bits and same_dtype else 'equal values'}, {dtypes}")


def _farthest(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """The greatest distance of two elements, and their index. NaN is infinitely far from everything."""
    worst, place = 0.0, 0
    shape, a, b = a.shape, a.reshape(-1), b.reshape(-1)
    for begin in range(0, a.size, 2**22):  # in pieces, since widening a layer takes memory
        piece = slice(begin, begin + 2**22)
        with np.errstate(invalid="ignore"):
            distances = np.abs(a[piece].astype(np.float64) - b[piece].astype(np.float64))
        distances = np.where(np.isnan(distances), np.inf, distances)
        if distances.max() > worst:
            worst, place = float(distances.max()), begin + int(distances.argmax())
    return worst, np.unravel_index(place, shape)
