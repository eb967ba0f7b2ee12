"""Rows of metrics: what was computed of what could be, memory, and time that is not training's."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llava_jax import memory_peak as memory_module
from llava_jax.flops import Work, causal_pairs, training_flops
from llava_jax.memory_peak import memory_peak
from llava_jax.metrics import MetricsLog
from llava_jax.planning.chips import peak_flops
from llava_jax.recorder import Recorder
from llava_jax.watchdog import Watchdog


@pytest.fixture
def data():
    """Two steps of samples of 5 and 7 tokens, then of 9, in rows of 16 tokens and 2 image slots."""
    rows = [[np.array([0]), np.array([1])], [np.array([2]), np.array([], int)]]
    return SimpleNamespace(
        steps_per_epoch=2,
        count=lambda step: (12, 2),
        step_rows=rows.__getitem__,
        schedule=SimpleNamespace(step_shape=lambda step: (16, 2)),
        measured=SimpleNamespace(lengths=np.array([5, 7, 9], np.int32)),
        bad_samples=SimpleNamespace(report=list),
    )


def recorded(config, data, path, **settings) -> Recorder:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_steps=2))
    return Recorder("", config, data, MetricsLog(path / "metrics.jsonl"), 0, 2, Watchdog(None), **settings)


def add_steps(recorder: Recorder) -> dict:
    """Logs two steps; -> their row."""
    values = {"loss": 1.0, "grad_norm": 1.0, "num_supervised_tokens": 6, "skipped": False}
    for step in (1, 2):
        recorder.add(step, {key: np.asarray(value) for key, value in values.items()}, 0.0)
    recorder.flush()
    return json.loads(recorder.log.path.read_text().splitlines()[-1])


def test_mfu_is_the_work_of_whole_rows_over_what_the_devices_can_do(tiny_config, data, tmp_path):
    row = add_steps(recorded(tiny_config, data, tmp_path, peak_flops=1e9))
    size = tiny_config.data.batch_size
    pairs = causal_pairs(5) + causal_pairs(7) + causal_pairs(9)
    work = Work(tokens=2 * size * 16, pairs=pairs, images=2 * size * 2, supervised=12)
    flops = sum(training_flops(tiny_config.model, tiny_config.tune, work).values())
    assert row["flops"] == pytest.approx(flops)
    assert row["mfu"] == pytest.approx(flops / (row["seconds"] * 1e9))
    assert "mfu" not in add_steps(recorded(tiny_config, data, tmp_path))


def test_time_of_other_things_is_told_once_and_evaluation_belongs_to_no_row(tiny_config, data, tmp_path):
    recorder = recorded(tiny_config, data, tmp_path)
    with recorder.spending("checkpoint"):
        time.sleep(0.02)
    row = add_steps(recorder)
    assert row["seconds"] > row["checkpoint_seconds"] >= 0.02
    time.sleep(0.05)
    recorder.log_evaluation(2, {"eval_loss": None, "eval_runtime": 0.05})
    row = add_steps(recorder)
    assert "checkpoint_seconds" not in row and row["seconds"] < 0.05


def test_skipped_steps_after_the_one_that_is_continued_do_not_count(tiny_config, data, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 4, "skipped_steps": 1})
    log.append({"step": 6, "skipped_steps": 2})
    assert Recorder("", tiny_config, data, log, 4, 8, Watchdog(None)).num_skipped == 1


def test_memory_is_the_fullest_devices_or_the_process_where_devices_do_not_tell(monkeypatch):
    assert memory_peak().keys() == {"process_memory_peak_gib"}
    stats = [{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**29}, None]
    devices = [SimpleNamespace(memory_stats=lambda own=own: own) for own in stats]
    monkeypatch.setattr(memory_module.jax, "local_devices", lambda: devices)
    assert memory_peak() == {"device_memory_peak_gib": 1.5}


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_are_those_of_the_whole_name(kind, tflops):
    assert peak_flops(kind) == 1e12 * tflops


def test_nobody_knows_the_peak_of_a_cpu():
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None
