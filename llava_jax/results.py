"""What the logged rows of a stage come to: its loss, its evaluations, where its time went."""

import numpy as np


def evaluations(rows: list[dict]) -> dict[int, dict]:
    """The figures of a stage's evaluations, by step."""
    return {
        row["step"]: {key: value for key, value in row.items() if key.startswith("eval_")}
        for row in rows
        if "eval_loss" in row
    }


def training_results(rows: list[dict]) -> dict[str, float]:
    """Mean loss, speed, programs compiled and the most memory. `rows` holds at least one of training."""
    rows = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    seconds = sum(row["seconds"] for row in rows)
    num_skipped = sum(row.get("skipped_steps", 0) for row in rows)
    peaks = {key: max(row.get(key, 0) for row in rows) for key in rows[-1] if key.endswith("_peak_gib")}
    return {
        **({"train_loss": float(np.mean(losses))} if losses else {}),  # all steps may have been skipped
        "train_runtime": seconds,
        "train_steps_per_second": _steps_told(rows) / seconds,
        "total_flos": sum(row.get("flops", 0.0) for row in rows),
        "steps": rows[-1]["step"],
        "epoch": rows[-1]["epoch"],
        "compilations": sum(row.get("compilations", 0) for row in rows),
        **peaks,
        **({"skipped_steps": num_skipped} if num_skipped else {}),
    }


def _steps_told(rows: list[dict]) -> int:
    """How many steps the rows are of: a run that goes on from another's checkpoint has none of the first ones."""
    first, last = rows[0]["step"], rows[-1]["step"]
    of_the_first = min(first, rows[1]["step"] - first) if len(rows) > 1 else first
    return last - first + of_the_first


def where_time_went(rows: list[dict], spent: dict[str, float]) -> dict[str, float]:
    """Seconds by what they were spent on, and `goodput`, the share of them in which the devices trained.

    spent: seconds that no row tells, those of the last save.
    """
    training = [row for row in rows if "loss" in row]
    compiling = sum(row.get("compile_seconds", 0.0) for row in training)
    waiting = sum(row["data_wait"] * row["seconds"] for row in training)
    saving = sum(row.get("checkpoint_seconds", 0.0) for row in training)
    step = max(0.0, sum(row["seconds"] for row in training) - compiling - waiting - saving)
    seconds = {
        "compile_seconds": compiling,
        "input_seconds": waiting,
        "step_seconds": step,
        "checkpoint_seconds": saving + spent.get("checkpoint_seconds", 0.0),
        "evaluation_seconds": sum(row.get("eval_runtime", 0.0) for row in rows),
    }
    return seconds | {"goodput": step / sum(seconds.values())}
