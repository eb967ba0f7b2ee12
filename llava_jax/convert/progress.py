"""How far a conversion has come: one line, rewritten in place on a terminal."""

import sys
import time
from collections.abc import Callable

from llava_jax.metrics import format_seconds

Progress = Callable[
    [int], None
]  # is told how many bytes of the model have been handled since it was last told


def silent(num_bytes: int) -> None:
    """Tells nobody."""


class ProgressLine:
    """A Progress that tells GB done of all, GB/s and the time left.

    On a terminal the line is rewritten twice a second; elsewhere a line is added every ten seconds. Its first
    is told after that time, so short work is silent.
    """

    def __init__(self, total_bytes: int, *, clock: Callable[[], float] = time.monotonic):
        self._total = total_bytes
        self._clock = clock
        self._done = 0
        self._start = self._told = clock()
        self._in_place = sys.stderr.isatty()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = self._clock()
        if now - self._told < (0.5 if self._in_place else 10):
            return
        self._told = now
        rate = self._done / (now - self._start)
        left = max(0, self._total - self._done) / rate
        line = (
            f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB  {rate / 1e9:.2f} GB/s  "
            f"ETA {format_seconds(left)}"
        )
        print(
            f"\r{line:<60}" if self._in_place else line,
            end="" if self._in_place else "\n",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        """Takes the line off a terminal, for what is printed next."""
        if self._in_place and self._told > self._start:
            print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)

    close = clear
