"""What a run tells."""

import json

from llava_jax.metrics import MetricsLog, Progress, format_seconds, plot_loss, smooth, write_json


def test_rows_behind_a_checkpoint_are_forgotten_for_their_stage_only(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rows = [{"stage": stage, "step": step} for stage in ("one", "two") for step in (1, 2, 3)]
    for row in rows:
        log.append(row)
    log.forget_after("two", 1)
    assert log.rows() == rows[:4]
    log.forget_after("two", 0)
    assert log.rows() == rows[:3]


def test_a_line_that_is_no_row_is_told_and_costs_no_other(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '?"step": 2}', '{"step": "3"}', '{"step": 4}', '{"step": 5']
    path.write_text("\n".join(lines))
    log = MetricsLog(path)
    assert log.rows() == log.rows() == [{"step": 1}, {"step": 4}]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        f"a line is no row and left out: {line!r}" for line in lines[1:3]
    ]


def test_progress_prints_plain_lines_when_not_on_a_terminal(capsys):
    progress = Progress("pretrain", num_steps=20, first_step=0)
    row = {
        "step": 10,
        "loss": 1.23456,
        "learning_rate": 2e-5,
        "tokens_per_second": 12345.6,
        "images_per_second": 7.0,
    }
    progress.show(row)
    line = capsys.readouterr().out
    assert line.startswith(
        "pretrain step 10/20  loss 1.2346  lr 2.00e-05  12,346 tokens/s  7 images/s  ETA 0:00:0"
    )
    assert line.endswith("\n") and "\r" not in line


def test_durations_are_hours_minutes_seconds():
    assert [format_seconds(s) for s in (0, 59.6, 3599, 90061)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "25:01:01",
    ]


def test_smoothing_starts_at_the_first_value():
    assert smooth([4.0, 4.0, 4.0]) == [4.0, 4.0, 4.0]
    assert smooth([1.0, 3.0], weight=0.5) == [1.0, (0.5 * 0.5 * 1 + 0.5 * 3) / 0.75]


def test_files_are_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_loss_plot_has_a_panel_per_stage(tmp_path):
    rows = [
        {"stage": stage, "step": step, "loss": 1 / step} for stage in ("one", "two") for step in range(1, 5)
    ]
    plot_loss(rows, tmp_path / "loss.png")
    plot_loss(rows[:4], tmp_path / "one.png")
    assert (tmp_path / "loss.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 1000
