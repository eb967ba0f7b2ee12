"""What the benchmark of attention counts, and that it notices wrong results."""

import json
import sys

import numpy as np
import pytest

from benchmarks import attention
from benchmarks.attention import Shape


def test_only_pairs_that_attend_are_counted_and_causal_ones_once():
    assert attention.num_pairs(Shape(2, 5, 1, 64, causal=False), None) == 50
    assert attention.num_pairs(Shape(2, 5, 1, 64, causal=True), None) == 30
    ids = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    assert attention.num_pairs(Shape(2, 6, 1, 64, causal=True), ids) == 3 + 6 + 21
    seen = attention.seen_keys(2, 6, 6, ids, causal=True)
    assert seen.sum() == 3 + 6 + 21


def test_drawn_segments_are_as_many_as_asked_in_one_run_each():
    ids = Shape(4, 400, 1, 64, True, 5).segment_ids(np.random.default_rng(0))
    for row in ids:
        assert sorted(set(row)) == [0, 1, 2, 3, 4, 5]
        assert (np.diff(row[row > 0]) >= 0).all() and not row[-8:].any()


def test_operations_follow_from_the_pairs():
    row = attention.rated(Shape(1, 4, 3, 64, causal=False), 16, "forward+backward", taken=1e-6)
    assert row["tflops"] == pytest.approx(7 * 2 * 16 * 3 * 64 / 1e6)


def test_a_wrong_implementation_is_not_timed():
    slightly_wrong = lambda *x: lambda q, k, v: 1.05 * attention.of_jax(*x, implementation="xla")(q, k, v)
    [row] = attention.measure("wrong", slightly_wrong, attention.TINY[1], 0, dict(rounds=1, calls=1))
    assert row["wrong"] and "differs from float64" in row["failed"]


def test_it_runs_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention", "--platform=cpu", "--tiny", "--json", "--only=77"])
    with pytest.raises(SystemExit) as stop:
        attention.main()
    assert stop.value.code == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["pass"] for row in rows if row["implementation"] == "xla"] == ["forward", "forward+backward"]
    assert all(row["tflops"] > 0 and row["error"] < attention.TOLERANCE for row in rows)
