"""Several processes as one run: how they find each other, agree, wait for each other and learn of an end.

One process needs nothing of this: without others every function here returns at once.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import jax

from llava_jax.errors import ConfigError, HangError, StoppedError, UserError
from llava_jax.interruption import before_end

_BEAT = 5.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a process counts as dead
_exchanges = itertools.count()


def start(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of the run.

    On TPU pods, under SLURM, Kubernetes and Open MPI, JAX finds the others itself; elsewhere `coordinator`
    (HOST:PORT of process 0), `num_processes` and `process_id` say where they are. Without either this process is
    alone. From here on a watcher ends this process when another one has failed or has not been heard of.
    Raises ConfigError when the arguments do not fit, HangError when the others do not come within five minutes.
    """
    given = [bool(coordinator), num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator, --num_processes and --process_id go together; set all three or none."
        )
    if coordinator and not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
        raise ConfigError(f"--coordinator={coordinator} should be HOST:PORT, like 10.0.0.2:8476.")
    # Its handler would swallow the SIGTERM that asks for a checkpoint (llava_jax/interruption.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator or None, num_processes, process_id)
    except ValueError as error:
        if any(given):
            raise ConfigError(f"The processes cannot be joined: {error}") from error
        if "coordinator_address" not in str(error):
            raise ConfigError(
                f"This looks like a cluster, but the processes cannot be joined: {error} Say where they are with "
                "--coordinator, --num_processes and --process_id."
            ) from error
        _require_alone()
        return
    except RuntimeError as error:
        if "mpi4py" in str(error):
            raise ConfigError(
                "JAX finds the processes that Open MPI 5 has started by mpi4py alone: pip install mpi4py. Or set "
                "JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK in the environment of each, and say where they are with "
                "--coordinator, --num_processes and --process_id."
            ) from error
        raise HangError(
            f"The processes of this run did not find each other: {_first_line(error)} "
            "Start the same command on every host, and see that process 0 can be reached from the others."
        ) from error
    if jax.process_count() > 1:
        watcher = _Watcher()
        watcher.start()
        atexit.register(watcher.stop)  # called before JAX leaves the others, which was registered earlier
        before_end(_tell)


def _require_alone() -> None:
    """Raises ConfigError if a launcher of which JAX knows nothing has started several processes: each would train by
    itself."""
    for size, rank, local_rank in (
        # Open MPI 5 says no more where its processes are.
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
        ("WORLD_SIZE", "RANK", "LOCAL_RANK"),  # torchrun
    ):
        count = os.environ.get(size, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{size}={count}: a launcher has started {count} processes, but JAX cannot find the others by it; add "
                f"--coordinator=HOST_OF_PROCESS_0:8476 --num_processes=${size} --process_id=${rank}, and with one process "
                f"per GPU set JAX_LOCAL_DEVICE_IDS=${local_rank} in its environment, or each takes all GPUs of its host."
            )


def is_first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def exchange(name: str, value, timeout: float = 600.0) -> list:
    """Gives every process the JSON value of each, in the order of processes.

    All processes must call it, in the same order. Raises HangError naming those that did not within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    client, key = _client(), f"llava_jax/{next(_exchanges)}/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    until = time.monotonic() + timeout
    values, missing = [], []
    for process in range(jax.process_count()):
        left = max(1, int(1000 * (until - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{key}/{process}", left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(process)
    if missing:
        raise HangError(
            f"{_names(missing)} did not come to {name!r} within {timeout:.0f} s; look at what they printed last."
        )
    return values


def wait_for_all(name: str, timeout: float = 600.0) -> None:
    """Returns when every process has come here; raises as `exchange` does."""
    exchange(name, None, timeout)


def from_first(name: str, value):
    """The JSON value of process 0."""
    return exchange(name, value if is_first() else None)[0]


@contextlib.contextmanager
def together(name: str, timeout: float = 3600.0) -> Iterator[None]:
    """A block that succeeds on all processes or on none: a UserError on one of them is raised on all."""
    own = None
    try:
        yield
    except UserError as error:
        own = error
    failures = exchange(name, own and [own.exit_code, str(own)], timeout)
    if own:
        raise own
    for process, failure in enumerate(failures):
        if failure:
            raise _Elsewhere(process, *failure)


def agree(facts: dict[str, object]) -> None:
    """Raises ConfigError, on all processes, when they do not have the same JSON values under the same keys."""
    texts = {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
    others = exchange("comparing settings", texts)
    differing = [
        f"{key} is {theirs.get(key, 'absent')} on process {process}, {others[0].get(key, 'absent')} on process 0"
        for process, theirs in enumerate(others)
        for key in sorted(theirs.keys() | others[0].keys())
        if theirs.get(key) != others[0].get(key)
    ]
    if differing:
        raise ConfigError(
            f"The processes of this run differ: {'; '.join(differing[:5])}"
            f"{f'; and {len(differing) - 5} more' if len(differing) > 5 else ''}. Start the same command with the same "
            "code and the same data everywhere."
        )


def code_version() -> dict[str, str]:
    """What the processes must have in common beside the settings: JAX and every line of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {"code": digest.hexdigest()[:12], "jax": version("jax"), "jaxlib": version("jaxlib")}


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """With several processes, an error that leaves the block ends all of them at once, each of them saying why."""
    try:
        yield
    except StoppedError:
        wait_for_all("the end of the run")  # all were asked to stop
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # Most likely another process has died. In time the watcher knows which and ends this one.
            print(
                f"A computation over all processes failed: {_first_line(error)}", file=sys.stderr, flush=True
            )
            time.sleep(SILENCE + 3 * _BEAT)
        if not isinstance(error, UserError):
            traceback.print_exc()
        _end(jax.process_index(), getattr(error, "exit_code", 1), str(error))


class _Elsewhere(UserError):
    """Another process's error."""

    def __init__(self, process: int, exit_code: int, message: str):
        super().__init__(f"process {process}: {message}")
        self.exit_code = exit_code


_ALIVE, _ENDED = "llava_jax/alive", "llava_jax/ended"


class _Watcher(threading.Thread):
    """Tells the other processes that this one lives, and ends it when one of them has failed or is silent.

    A collective operation waits forever for a process that is gone, so the end has to come from beside.
    """

    def __init__(self):
        super().__init__(name="llava_jax watcher", daemon=True)
        self.stopped = threading.Event()
        self.beats = {}  # process -> (its last sign of life, when that was first seen)

    def run(self) -> None:
        client, own = _client(), jax.process_index()
        for beat in itertools.count():
            try:
                sign = f"{socket.gethostname()} {beat}"
                client.key_value_set(f"{_ALIVE}/{own}", sign, allow_overwrite=True)
                ended, alive = client.key_value_dir_get(_ENDED), client.key_value_dir_get(_ALIVE)
            except jax.errors.JaxRuntimeError:
                return  # process 0 is gone; JAX ends this process and says so
            for _, value in ended:
                _end(*json.loads(value))
            self._look_for_silent(dict(alive))
            if self.stopped.wait(_BEAT):
                return

    def stop(self) -> None:
        """Lets it finish what it asks the others: a call that outlasts the interpreter aborts the process."""
        self.stopped.set()
        self.join(2 * _BEAT)

    def _look_for_silent(self, alive: dict[str, str]) -> None:
        now = time.monotonic()
        for key, sign in alive.items():
            last, since = self.beats.get(key, (None, now))
            self.beats[key] = (sign, since if sign == last else now)
            if now - self.beats[key][1] > SILENCE:
                process, host = key.rpartition("/")[2], sign.split()[0]
                message = (
                    f"no sign of life on {host} for {SILENCE:.0f} s. "
                    "The same command continues from the last checkpoint."
                )
                _end(int(process), HangError.exit_code, message)


def _end(process: int, exit_code: int, message: str) -> NoReturn:
    """Ends this process, and with it all others, because of what happened on `process`."""
    own = process == jax.process_index()
    print(f"error: {'' if own else f'process {process}: '}{message}", file=sys.stderr, flush=True)
    _tell(exit_code, message, process)
    os._exit(exit_code)  # other threads may wait for a collective operation that never ends


def _tell(exit_code: int, message: str, process: int | None = None) -> None:
    """Makes the other processes end in the same way, because of what happened on `process` (None: on this one).

    Process 0 waits a moment for them: whoever asks it when it is gone is aborted by JAX.
    """
    client, own = _client(), jax.process_index()
    process = own if process is None else process
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others may be gone already
        told = json.dumps([process, exit_code, message])
        client.key_value_set(f"{_ENDED}/{own}", told, allow_overwrite=True)
        others = set(range(jax.process_count())) - {own, process}
        until = time.monotonic() + 3 * _BEAT
        while own == 0 and time.monotonic() < until:
            if {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(_ENDED)} >= others:
                break
            time.sleep(0.1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _names(processes: list[int]) -> str:
    return ("process " if len(processes) == 1 else "processes ") + ", ".join(map(str, processes))


def _client():
    # The only way to exchange small values with a timeout; orbax reaches for it in the same way.
    from jax._src import distributed

    return distributed.global_state.client
