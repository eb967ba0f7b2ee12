"""A function in several processes at once."""

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from llava_jax.errors import UserError

_PROGRAM = "from llava_jax.data.processes import _serve; _serve()"


@contextmanager
def map_in_processes(function: Callable, items: Iterable, num_processes: int) -> Iterator[Iterator]:
    """Gives an iterator over function(item) of each item in order; all of it must be able to be pickled.

    Unlike those of `multiprocessing`, these processes do not run the caller's script a second time, so it needs no
    `if __name__ == "__main__"`; they hold none of JAX's threads; and they end with the caller, however it ends. What a
    UserError in one of them says is raised here.
    """
    pickled = pickle.dumps(function)
    workers = [_Worker(pickled) for _ in range(num_processes)]
    idle = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(item):
        worker = idle.get()
        try:
            return worker.call(item)
        finally:
            idle.put(worker)

    executor = ThreadPoolExecutor(num_processes)
    try:
        yield executor.map(call, items)
    finally:
        for worker in workers:
            worker.process.kill()
        executor.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """One process, which is sent the function and then item after item."""

    def __init__(self, function: bytes):
        self._unsent = function
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            process_group=0,  # Ctrl-C in a terminal is for the caller, which then ends this
        )

    def call(self, item):
        with suppress(BrokenPipeError):  # it may have told why it ended
            self.process.stdin.write(self._unsent + pickle.dumps(item))
            self.process.stdin.flush()
        self._unsent = b""
        try:
            answer = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"A process that reads data ended early with status {self.process.wait()} (-9: killed, perhaps because "
                "memory ran out); what it said is above."
            ) from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError), self.process:
            pass


def _serve() -> None:
    """What such a process does until its caller closes the pipe or is gone."""
    requests = sys.stdin.buffer
    # What somebody prints must not come between the answers. Unbuffered: nothing is left to write at the end.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        function = pickle.load(requests)
        while True:
            item = pickle.load(requests)
            answers.write(pickle.dumps(function(item)))
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the caller is gone, perhaps amid a request
        return
    except UserError as error:
        answers.write(pickle.dumps(error))
