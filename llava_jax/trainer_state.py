"""trainer_state.json: how far a stage is, as the Hugging Face trainer writes it, for tools that read that."""

import math
import sys
from pathlib import Path

from llava_jax.checkpoint import saved_steps
from llava_jax.config import Config
from llava_jax.metrics import MetricsLog, write_json


def write_trainer_state(log: MetricsLog, stage: str, state: dict) -> None:
    """Writes `state` beside the log, and of a stage with a name also under its name: the next one writes its own.

    Of several processes the one that writes the log does it. A full disk is told, and the next write tries again.
    """
    if log.read_only:
        return
    for name in ("trainer_state.json", *([f"trainer_state_{stage}.json"] if stage else [])):
        path = log.path.parent / name
        try:
            write_json(path, state)
        except OSError as error:
            print(f"{path} cannot be written now ({error.strerror}).", file=sys.stderr, flush=True)


def trainer_state(
    config: Config,
    rows: list[dict],
    *,
    step: int,
    num_steps: int,
    steps_per_epoch: int,
    best: tuple[int, float | None, Path] | None,
    results: dict[str, float] | None,
) -> dict:
    """The fields of transformers' TrainerState after `step`, `rows` being what is logged of the stage up to it.

    best: of the best evaluation its step, its figure, and where its checkpoint is or would be; None: there is none yet.
    results: those of the whole stage, once it has ended.
    """
    best_step, best_metric, checkpoint = best or (None, None, None)
    train = config.train
    return {
        "best_global_step": best_step,
        "best_metric": best_metric,
        "best_model_checkpoint": str(checkpoint) if checkpoint and _is_saved(checkpoint) else None,
        "epoch": step / steps_per_epoch,
        "eval_steps": train.eval_interval(num_steps),
        "global_step": step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": _history(rows, steps_per_epoch) + ([_summary(results)] if results else []),
        "logging_steps": train.log_steps,
        "max_steps": num_steps,
        "num_input_tokens_seen": round(sum(_tokens(row) for row in rows)),
        "num_train_epochs": math.ceil(num_steps / steps_per_epoch),
        "save_steps": config.checkpoint.save_interval(num_steps),
        "stateful_callbacks": {},
        "total_flos": sum(row.get("flops", 0.0) for row in rows),
        # One process drives all its devices, as torch's DataParallel does.
        "train_batch_size": config.data.batch_size // train.accumulation_steps,
        "trial_name": None,
        "trial_params": None,
    }


def _is_saved(checkpoint: Path) -> bool:
    return int(checkpoint.name) in saved_steps(checkpoint.parent)


def _history(rows: list[dict], steps_per_epoch: int) -> list[dict[str, float]]:
    """The rows as that trainer logs them: numbers alone, each with its epoch."""
    return [
        {"epoch": row["step"] / steps_per_epoch}
        | {key: value for key, value in row.items() if key != "stage" and value is not None}
        for row in rows
    ]


def _summary(results: dict[str, float]) -> dict[str, float]:
    """The last entry, by which tools tell that training has ended."""
    kept = {key: value for key, value in results.items() if not key.startswith(("eval_", "best_", "steps"))}
    return kept | {"step": results["steps"]}


def _tokens(row: dict) -> float:
    return row.get("tokens_per_second", 0.0) * row.get("seconds", 0.0)
