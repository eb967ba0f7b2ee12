"""The benchmark of CPU steps: both sides do the same work, at a toy size; nothing is timed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import dispatch, step_cpu
from benchmarks.step_sides import our_step, peer_batch, peer_step
from benchmarks.step_workload import WORKLOADS, write_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "toy"
    write_weights(WORKLOADS["toy"], directory)
    return directory


@pytest.mark.parametrize("dtype", step_cpu.TOLERANCES)
def test_losses_of_both_sides_agree_from_step_to_step(dtype, weights):
    sides = our_step(WORKLOADS["toy"], dtype, weights), peer_step(WORKLOADS["toy"], dtype, weights, "sdpa")
    ours, theirs = ([step(number) for number in range(6)] for step in sides)
    np.testing.assert_allclose(ours, theirs, rtol=step_cpu.TOLERANCES[dtype])
    assert ours[4] < ours[0] and ours[5] < ours[1]  # the same batches, after steps that taught something


def test_it_runs():
    command = ["--sizes=toy", "--dtypes=float32", "--rounds=1", "--peers=sdpa", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_cpu", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    [row] = found["rows"]
    assert found["ratio_fp32"] == row["ratio"] > 0
    assert row["largest_difference_of_first_losses"] < step_cpu.TOLERANCES["float32"]
    assert row["peer"] == "sdpa" and row["peak_of_steps_mb"] > 0 and row["peer_peak_of_steps_mb"] > 0


@pytest.mark.parametrize("size", WORKLOADS)
def test_both_sides_get_the_same_samples_padded_as_each_would(size):
    workload = WORKLOADS[size]
    ours, theirs = workload.batch(2, workload.padded_length), peer_batch(workload, 2)
    assert theirs["input_ids"].shape == (workload.num_rows, workload.longest)
    assert ours["tokens"].shape == (workload.num_rows, workload.padded_length)
    assert workload.longest < workload.padded_length <= workload.max_length
    tokens = np.where(theirs["input_ids"].numpy() == workload.image_token, -200, theirs["input_ids"].numpy())
    assert (ours["tokens"][:, : workload.longest] == tokens).all()
    assert ((tokens == -200).sum(axis=1) == workload.model.num_image_tokens).all()
    assert (ours["labels"][:, : workload.longest] == theirs["labels"].numpy()).all()
    assert (ours["labels"][:, workload.longest :] == -100).all()


def test_other_losses_are_noticed(monkeypatch):
    class Side:
        def __init__(self, name, *_):
            self.name, self.losses = name, [5.0 if name == "ours" else 5.01]

        def round(self):
            return 1.0

    monkeypatch.setattr(step_cpu, "Side", Side)
    with pytest.raises(AssertionError, match="different work"):
        step_cpu.measure("toy", "float32", None, peers=("eager",), rounds=1)


def test_the_lowest_ratio_of_all_sizes_is_told():
    rows = [dict(dtype="float32", ratio=ratio) for ratio in (1.5, 1.2, 2.0)]
    assert step_cpu.summary(rows)["ratio_fp32"] == 1.2


def test_dispatch_is_measured_in_the_trainers_loop():
    figures = dispatch.measure(num_steps=12, warm=2, group=3)
    assert figures["leaves"] > 60
    assert figures["dispatch_ms"] > 0
