"""trainer_state.json, as transformers reads it."""

import json
from pathlib import Path

import pytest
from transformers import TrainerState

from llava_jax.metrics import MetricsLog
from llava_jax.trainer_state import trainer_state, write_trainer_state

ROWS = [
    {"stage": "one", "step": 2, "epoch": 0.5, "loss": 3.0, "tokens_per_second": 30.0, "seconds": 0.5}
    | {"flops": 1e12},
    {"stage": "one", "step": 2, "eval_loss": None, "eval_runtime": 1.0},
    {"stage": "one", "step": 4, "epoch": 1.0, "loss": None, "tokens_per_second": 10.0, "seconds": 1.0}
    | {"flops": 2e12},
    {"stage": "one", "step": 4, "eval_loss": 2.0, "eval_runtime": 1.0},
]


def loaded(path: Path) -> TrainerState:
    return TrainerState.load_from_json(str(path / "trainer_state.json"))


def test_transformers_reads_what_rows_come_to(tiny_config, tmp_path):
    (tmp_path / "4").mkdir()
    state = trainer_state(
        tiny_config,
        ROWS,
        step=4,
        num_steps=10,
        steps_per_epoch=4,
        best=(4, 2.0, tmp_path / "4"),
        results={"train_loss": 3.0, "train_runtime": 1.5, "steps": 4, "epoch": 1.0, "eval_loss": 2.0},
    )
    write_trainer_state(MetricsLog(tmp_path / "metrics.jsonl"), "one", state)
    found = loaded(tmp_path)
    assert json.loads((tmp_path / "trainer_state_one.json").read_text()) == state
    assert found.log_history == [
        {"step": 2, "epoch": 0.5, "loss": 3.0, "tokens_per_second": 30.0, "seconds": 0.5, "flops": 1e12},
        {"step": 2, "epoch": 0.5, "eval_runtime": 1.0},
        {"step": 4, "epoch": 1.0, "tokens_per_second": 10.0, "seconds": 1.0, "flops": 2e12},
        {"step": 4, "epoch": 1.0, "eval_loss": 2.0, "eval_runtime": 1.0},
        {"step": 4, "epoch": 1.0, "train_loss": 3.0, "train_runtime": 1.5},
    ]
    assert (found.global_step, found.max_steps, found.epoch, found.num_train_epochs) == (4, 10, 1.0, 3)
    assert (found.best_global_step, found.best_metric) == (4, 2.0)
    assert found.best_model_checkpoint == str(tmp_path / "4")
    assert (found.num_input_tokens_seen, found.total_flos) == (25, 3e12)
    assert (found.logging_steps, found.eval_steps, found.save_steps) == (1, 10, 500)
    assert (found.train_batch_size, found.is_world_process_zero) == (8, True)
    assert vars(found).keys() == state.keys()


def test_a_process_that_does_not_write_the_log_writes_no_state(tmp_path):
    write_trainer_state(MetricsLog(tmp_path / "metrics.jsonl", read_only=True), "", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    write_trainer_state(MetricsLog(tmp_path / "metrics.jsonl"), "", {})
    assert "trainer_state.json cannot be written now (No space left)" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [{"step": 1, "eval_loss": 1.0}]])
def test_a_log_that_somebody_deleted_leaves_a_state(tiny_config, rows):
    state = trainer_state(
        tiny_config, rows, step=1, num_steps=2, steps_per_epoch=2, best=None, results={"steps": 1}
    )
    assert TrainerState(**state).total_flos == 0
