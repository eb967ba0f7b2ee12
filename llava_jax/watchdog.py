"""Ends a process that waits too long, and tells what for and where it stands."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

HANG_EXIT_CODE = 14


class Watchdog:
    """Watches the waits of one thread. timeout_minutes None: none is too long."""

    def __init__(self, timeout_minutes: float | None):
        self.timeout = 60 * timeout_minutes if timeout_minutes else None
        self.wait: tuple[str, float] | None = None  # what for, and since when
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """The block is a wait for `what`: one that takes too long ends the process with all stacks shown."""
        self.wait = what, time.monotonic()
        try:
            yield
        finally:
            self.wait = None

    def close(self) -> None:
        self.timeout = None

    def _watch(self) -> None:
        pause = min(5.0, self.timeout / 10)
        while timeout := self.timeout:
            time.sleep(pause)
            wait = self.wait
            if wait and time.monotonic() - wait[1] > timeout:
                _end(wait[0], timeout)


def _end(what: str, timeout: float) -> None:
    print(
        f"error: waited {timeout / 60:g} minutes for {what} (train.hang_timeout_minutes). Below is where each thread "
        "stands. The same command continues from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    os._exit(HANG_EXIT_CODE)
