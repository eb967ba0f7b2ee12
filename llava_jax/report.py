"""The files of a run directory that tell what came out: results and plots."""

import json
from pathlib import Path

from llava_jax.metrics import plot_loss, write_atomically, write_json


def write_training(workdir: Path, results: dict[str, dict], rows: list[dict]) -> None:
    """Writes train_results.json, all_results.json and the loss plot. results: per stage, its figures.

    The last stage's figures stand at the top; earlier stages' under `stages`.
    """
    *earlier, last = results.items()
    summary = dict(last[1])
    if earlier:
        summary["stages"] = dict(earlier)
    write_json(workdir / "train_results.json", summary)
    write_json(workdir / "all_results.json", summary)
    if "eval_loss" in last[1]:
        write_json(workdir / "eval_results.json", _evaluated(last[1]))
    if rows:
        plot_loss(rows, workdir / "training_loss.png")
    evaluated = dict.fromkeys(
        key for row in rows for key in row if key.startswith("eval_") and key.endswith("loss")
    )
    if evaluated:
        plot_loss(rows, workdir / "training_eval_loss.png", keys=list(evaluated))


def write_evaluation(workdir: Path, results: dict, answered: list[dict], name: str) -> None:
    """Writes eval_results.json and, as JSONL under `name`, the answers; adds the results to all_results.json."""
    together = json.loads((workdir / "all_results.json").read_text()) | results
    write_json(workdir / "all_results.json", together)
    write_json(workdir / "eval_results.json", _evaluated(together))
    write_atomically(workdir / name, "".join(json.dumps(row) + "\n" for row in answered))


def _evaluated(results: dict) -> dict:
    return {key: value for key, value in results.items() if key.startswith("eval_")}
