"""Arrays whose memory is used again, since getting new memory from the system takes longer than filling it."""

import math

import numpy as np

# Smaller arrays are kept by malloc itself.
_LEAST_BYTES = 2**20
# What is kept for later: enough for the few parts of a model that are held at a time.
_KEPT_BYTES = 400 * 2**20

# Memory that nobody uses, by its id, the last used last. Leases end in any thread at any time, so each change is one
# operation of the dictionary.
_kept: dict[int, np.ndarray] = {}


class _Lease:
    """What an array and all views of it hold; with the last of them the memory comes back."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory

    def __del__(self):
        _kept[id(self._memory)] = self._memory
        kept = list(_kept.items())
        excess = sum(memory.nbytes for _, memory in kept) - _KEPT_BYTES
        for key, memory in kept:
            if excess <= 0:
                return
            _kept.pop(key, None)
            excess -= memory.nbytes


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Like np.empty."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LEAST_BYTES:
        return np.empty(shape, dtype)
    lease = _Lease(_memory(num_bytes))
    return np.asarray(lease)[:num_bytes].view(dtype).reshape(shape)


def _memory(num_bytes: int) -> np.ndarray:
    # The last used is the likeliest to lie in the processor's caches.
    for key, memory in reversed(list(_kept.items())):
        if num_bytes <= memory.nbytes <= 2 * num_bytes and _kept.pop(key, None) is not None:
            return memory
    return np.empty(num_bytes, np.uint8)


def forget() -> None:
    """Gives what is kept back to the system."""
    _kept.clear()
