"""The watchdog: a wait that takes too long ends the process, names what for, and shows where all threads stand."""

import subprocess
import sys

from llava_jax.watchdog import Watchdog

PROGRAM = """
import threading, time
from llava_jax.watchdog import Watchdog

def forgotten_door():
    time.sleep(60)

threading.Thread(target=forgotten_door, daemon=True).start()
watchdog = Watchdog(0.01)
for _ in range(3):
    with watchdog.waiting("nothing long"):
        time.sleep(0.25)
print("so far", flush=True)
with watchdog.waiting("the next batch"):
    time.sleep(60)
"""


def test_a_wait_that_takes_too_long_is_named_with_all_stacks():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (14, "so far\n")
    assert "waited 0.01 minutes for the next batch (train.hang_timeout_minutes)" in done.stderr
    assert "forgotten_door" in done.stderr


def test_without_a_timeout_nothing_is_watched():
    watchdog = Watchdog(None)
    with watchdog.waiting("whatever"):
        assert watchdog.timeout is None
