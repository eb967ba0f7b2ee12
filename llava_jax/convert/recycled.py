"""Arrays whose memory is used again, since getting new memory from the system takes longer than filling it."""

import math
import threading

import numpy as np

# Smaller arrays are kept by malloc itself.
_LEAST_BYTES = 2**20
# What is kept for later: enough for the few parts of a model that are held at a time.
_KEPT_BYTES = 400 * 2**20

_kept = []  # uint8 arrays that nobody uses, the last used last
_lock = threading.RLock()  # a lease may end, by garbage collection, within another's begin


class _Lease:
    """What an array and all views of it hold; with the last of them the memory comes back."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory

    def __del__(self):
        with _lock:
            _kept.append(self._memory)
            while sum(memory.nbytes for memory in _kept) > _KEPT_BYTES:
                del _kept[0]


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Like np.empty."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LEAST_BYTES:
        return np.empty(shape, dtype)
    lease = _Lease(_memory(num_bytes))
    return np.asarray(lease)[:num_bytes].view(dtype).reshape(shape)


def _memory(num_bytes: int) -> np.ndarray:
    with _lock:
        # The last used fits best into the processor's caches.
        for i in reversed(range(len(_kept))):
            if num_bytes <= _kept[i].nbytes <= 2 * num_bytes:
                return _kept.pop(i)
    return np.empty(num_bytes, np.uint8)
