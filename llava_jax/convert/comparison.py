"""Compares two models leaf by leaf."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llava_jax.convert.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Difference:
    """What was found out about one leaf."""

    name: str
    equal: bool
    detail: str


def compare(first: ModelSource, second: ModelSource) -> Iterator[Difference]:
    """Every leaf of either model, then the tensors set aside, each as soon as it is read.

    Equal means the same values; where the dtypes differ, values are compared exactly after widening, and
    `detail` says so. Tensors set aside in only one of them, or in other numbers of rows, are no
    difference: layouts keep different ones.
    """
    for name in dict.fromkeys([*first.names(), *second.names()]):
        if name not in second.names():
            yield Difference(name, False, "only in the first")
        elif name not in first.names():
            yield Difference(name, False, "only in the second")
        elif tuple(first.shape(name)) != tuple(second.shape(name)):
            yield Difference(name, False, f"shape {list(first.shape(name))} and {list(second.shape(name))}")
        else:
            yield _compare(name, first.read(name), second.read(name))
    aside, other = first.set_aside(), second.set_aside()
    for name in aside.keys() & other.keys():
        if aside[name].shape == other[name].shape:
            yield _compare(f"set aside: {name}", aside[name], other[name])


def _compare(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    shape = a.shape
    if a.dtype == b.dtype:
        dtypes = str(a.dtype)
        if np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)):
            return Difference(name, True, f"bit-equal, {dtypes}")
    else:
        dtypes = f"{a.dtype} and {b.dtype}"
    worst, place = 0.0, 0
    a, b = a.reshape(-1), b.reshape(-1)
    for begin in range(0, a.size, 2**22):  # in pieces, since widening a whole leaf takes memory
        piece = slice(begin, begin + 2**22)
        with np.errstate(invalid="ignore"):
            distances = np.abs(a[piece].astype(np.float64) - b[piece].astype(np.float64))
        distances = np.where(np.isnan(distances), np.inf, distances)
        if distances.max() > worst:
            worst, place = float(distances.max()), begin + int(distances.argmax())
    if worst == 0:
        return Difference(name, True, f"equal values, {dtypes}")
    index = [int(i) for i in np.unravel_index(place, shape)]
    return Difference(
        name, False, f"max difference {worst:.3g} at {index}: {a[place]} and {b[place]}, {dtypes}"
    )
