"""kill -9: a run that is killed and started again takes the steps of one that is not."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kill import POINTS


def measure(*arguments: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.kill", "--json", *arguments]
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_random_times_takes_the_same_steps():
    result = measure("--kills=2", "--stages=1", "--seed=1")
    assert (result["kills"] >= 2, result["differing_steps"]) == (True, 0)
    assert result["max_lost_steps"] <= 2 * result["save_steps"]


@pytest.mark.slow
def test_a_run_killed_at_every_point_of_a_save_takes_the_same_steps():
    result = measure("--kills=0", "--points")
    assert (result["kills"], result["differing_steps"]) == (2 * len(POINTS), 0)
