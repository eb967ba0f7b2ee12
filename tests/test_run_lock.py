"""The lock of a run directory: who holds it is told, and a holder that is gone loses it."""

import json
import os
import subprocess
import sys
import time

import pytest

from llava_jax import run_lock
from llava_jax.errors import InUseError
from llava_jax.run_lock import RunLock


def write_holder(workdir, host: str, pid: int, silent_for: float) -> None:
    path = workdir / ".lock"
    path.write_text(json.dumps({"host": host, "pid": pid}))
    os.utime(path, (time.time() - silent_for,) * 2)


def test_the_holder_is_named(tmp_path):
    with (
        RunLock(tmp_path),
        pytest.raises(InUseError, match=rf"process {os.getpid()} on {os.uname().nodename}"),
    ):
        RunLock(tmp_path)
    with RunLock(tmp_path):
        pass


def test_a_killed_holder_loses_the_lock_at_once(tmp_path, capsys):
    program = (
        "import os, pathlib; from llava_jax.run_lock import RunLock; "
        f"RunLock(pathlib.Path({str(tmp_path)!r})); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with RunLock(tmp_path):
        assert "is stale; it is taken over" in capsys.readouterr().err


def test_a_lock_that_says_nothing_is_nobodys(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_holder_on_another_host_is_believed_while_its_heart_beats(tmp_path):
    write_holder(tmp_path, "elsewhere", 12, silent_for=30)
    with pytest.raises(InUseError, match=r"in use by process 12 on elsewhere \(heartbeat 3[0-9] s ago\)"):
        RunLock(tmp_path)
    write_holder(tmp_path, "elsewhere", 12, silent_for=61)
    with RunLock(tmp_path):
        pass


def test_without_system_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(run_lock.errno.ENOLCK, "no locks")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    write_holder(tmp_path, os.uname().nodename, os.getppid(), silent_for=5)
    with pytest.raises(InUseError):
        RunLock(tmp_path)
    write_holder(tmp_path, os.uname().nodename, 2**22 + 1, silent_for=5)  # no process has that number
    with RunLock(tmp_path):
        pass


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_HEARTBEAT", 0.05)
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > time.time() - 60
