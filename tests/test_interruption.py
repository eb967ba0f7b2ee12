"""Signals: one is answered in order, two at once, whatever the main thread does."""

import signal
import subprocess
import sys
import time

import pytest

from llava_jax.interruption import StopRequest, listening

# sha256 of much data keeps the main thread outside of Python, as a compilation does.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 50_000_000)"
AT_ONCE = f"""
from llava_jax.interruption import listening, stop_at_once
with listening(stop_at_once):
    print("ready", flush=True)
    {BUSY}
"""
REQUEST = f"""
from llava_jax.interruption import StopRequest
request = StopRequest()
request.listen()
print("ready", flush=True)
{BUSY}
"""


def end_of(program: str, *signals: int) -> tuple[int, str, float]:
    """Exit code, what was told, and seconds from the last signal to the end."""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(0.2)
        process.send_signal(number)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    return process.returncode, told, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_nothing_is_unsaved_a_signal_ends_the_process_at_once(number):
    code, told, seconds = end_of(AT_ONCE, number)
    assert (code, seconds < 2) == (15, True)
    assert "Nothing that was saved is lost; the same command continues." in told


def test_the_second_signal_ends_a_run_at_once(tmp_path):
    code, told, seconds = end_of(REQUEST, signal.SIGTERM, signal.SIGINT)
    assert (code, seconds < 2) == (128 + signal.SIGINT, True)
    assert told.split("\n")[1] == "SIGTERM: finishing the step and saving; once more stops at once."


def test_a_request_is_heard_and_earlier_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    heard = []
    with listening(heard.append):
        request = StopRequest()
        request.listen()
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: request.asked)
        request.close()
        assert heard == []
        signal.raise_signal(signal.SIGINT)
        wait_for(lambda: heard)
    assert heard == [signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
