"""Reads a run of a file's bytes as an array."""

from pathlib import Path

import numpy as np

from llava_jax.convert import recycled
from llava_jax.convert.errors import ConversionError


def read_run(path: Path, begin: int, shape: tuple[int, ...], dtype, name: str) -> np.ndarray:
    """The array that lies at byte `begin`. Raises ConversionError, which speaks of `name`, if the file ends before it does.

    Reading is faster than mapping the file, which costs a page fault for every few pages.
    """
    array = recycled.empty(shape, dtype)
    left = array.reshape(-1).view(np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while left.size:
            count = file.readinto(left)
            if not count:
                raise ConversionError(
                    f"{path} ends within {name}; it was cut after it was opened. Fetch or write it again."
                )
            left = left[count:]
    return array
