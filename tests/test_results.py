"""What rows come to, by hand."""

import pytest

from llava_jax.results import evaluations, training_results, where_time_went

ROWS = [
    {
        "step": 2,
        "epoch": 0.5,
        "loss": 3.0,
        "seconds": 10.0,
        "data_wait": 0.1,
        "compile_seconds": 4.0,
        "compilations": 2,
        "flops": 1e12,
        "x_peak_gib": 2.0,
    },
    {"step": 2, "eval_loss": 2.0, "eval_runtime": 3.0},
    {
        "step": 4,
        "epoch": 1.0,
        "loss": None,
        "seconds": 5.0,
        "data_wait": 0.0,
        "checkpoint_seconds": 1.0,
        "x_peak_gib": 1.0,
    }
    | {"skipped_steps": 2},
]


def test_results_are_those_of_all_rows():
    assert training_results(ROWS) == {
        "train_loss": 3.0,
        "train_runtime": 15.0,
        "train_steps_per_second": pytest.approx(4 / 15),
        "total_flos": 1e12,
        "steps": 4,
        "epoch": 1.0,
        "compilations": 2,
        "x_peak_gib": 2.0,
        "skipped_steps": 2,
    }
    assert evaluations(ROWS) == {2: {"eval_loss": 2.0, "eval_runtime": 3.0}}


def test_every_second_is_counted_once():
    assert where_time_went(ROWS, {"checkpoint_seconds": 2.0}) == {
        "compile_seconds": 4.0,
        "input_seconds": 1.0,
        "step_seconds": 9.0,
        "checkpoint_seconds": 3.0,
        "evaluation_seconds": 3.0,
        "goodput": 9 / 20,
    }
