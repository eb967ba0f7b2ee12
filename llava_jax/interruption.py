"""SIGTERM and Ctrl-C: heard at once, whatever the main thread computes, and answered in order."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from llava_jax.errors import StoppedError


@contextlib.contextmanager
def listening(callback: Callable[[int], None]) -> Iterator[None]:
    """Calls callback(number of the signal) for every SIGTERM or SIGINT while the block runs.

    From a thread of its own: Python's handlers would wait until a compilation or a collective returns. Outside
    the main thread, where Python sets no handlers, nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in numbers:
                    callback(number[0])

    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    earlier = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        os.close(write)


class StopRequest:
    """Whether the process was asked to stop. Asked twice, it ends at once."""

    def __init__(self):
        self.asked = False
        self._listening = contextlib.ExitStack()

    def listen(self) -> None:
        """From now on a signal only asks; before, it does what it does elsewhere."""
        self._listening.enter_context(listening(self._ask))

    def close(self) -> None:
        self._listening.close()

    def _ask(self, number: int) -> None:
        if self.asked:
            end_process(
                f"{signal.Signals(number).name} again: stopped at once, nothing more is saved.", 128 + number
            )
        self.asked = True
        name = signal.Signals(number).name
        print(
            f"\n{name}: finishing the step and saving; once more stops at once.", file=sys.stderr, flush=True
        )


def stop_at_once(number: int) -> None:
    """The answer to a signal while nothing is unsaved."""
    end_process(
        f"{signal.Signals(number).name}: stopped. Nothing that was saved is lost; the same command continues.",
        StoppedError.exit_code,
    )


_farewells: list[Callable[[int, str], None]] = []


def before_end(farewell: Callable[[int, str], None]) -> None:
    """Calls farewell(exit code, message) before a signal ends the process."""
    _farewells.append(farewell)


def end_process(message: str, exit_code: int) -> None:
    """Ends the process without waiting for anything it computes."""
    print(f"\n{message}", file=sys.stderr, flush=True)
    for farewell in _farewells:
        farewell(exit_code, message)
    os._exit(exit_code)
