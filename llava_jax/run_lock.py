"""The lock of a run directory: only one run works in it, on this host or another."""

import contextlib
import errno
import fcntl
import json
import os
import sys
import threading
from pathlib import Path

from llava_jax.errors import InUseError

_HEARTBEAT = 10.0  # seconds
_STALE = 6 * _HEARTBEAT  # a holder that was silent for so long is gone
# File systems without flock say one of these; there the heartbeat alone tells.
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Held from the start of the block to its end. The file tells host, process and, by its time, the last heartbeat.

    On one host the system releases the lock when the process ends, however it ends. Another host may not see that
    lock, hence the heartbeat. Raises InUseError naming the holder.
    """

    def __init__(self, workdir: Path):
        self.path = workdir / ".lock"
        self.released = threading.Event()
        self.file = self.path.open("a+", errors="replace")
        try:
            self._acquire()
        except InUseError:
            self.file.close()
            raise
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        self.released.set()
        self.file.truncate(0)
        self.file.close()

    def _acquire(self) -> None:
        self.file.seek(0)
        holder = _parse(self.file.read())
        has_flock = self._flock(holder)
        here = os.uname().nodename
        if holder:
            is_gone = holder["host"] == here and (has_flock or not _lives(holder["pid"]))
            if not is_gone and self._silence() < _STALE:
                raise self._in_use(holder)
            print(f"The lock of {_name(holder)} is stale; it is taken over.", file=sys.stderr, flush=True)
        self.file.truncate(0)
        self.file.write(json.dumps({"host": here, "pid": os.getpid()}))
        self.file.flush()

    def _flock(self, holder: dict | None) -> bool:
        """Takes the system's lock; False if the file system has none."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(holder) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        return True

    def _in_use(self, holder: dict | None) -> InUseError:
        return InUseError(
            f"{self.path.parent} is in use by {_name(holder)} (heartbeat {self._silence():.0f} s ago); wait for it, or "
            f"choose another --workdir. A process that is gone loses it after {_STALE:.0f} s."
        )

    def _silence(self) -> float:
        """Seconds since the last heartbeat, both times by the clock of the file system."""
        probe = self.path.with_name(f".lock.{os.uname().nodename}.{os.getpid()}")
        probe.touch()
        try:
            return max(0.0, probe.stat().st_mtime - self.path.stat().st_mtime)
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self.released.wait(_HEARTBEAT):
            with contextlib.suppress(OSError):  # the file system may be away for a moment
                os.utime(self.path)


def _parse(text: str) -> dict | None:
    try:
        holder = json.loads(text)
        return {"host": str(holder["host"]), "pid": int(holder["pid"])}
    except (ValueError, KeyError, TypeError):
        return None


def _name(holder: dict | None) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
