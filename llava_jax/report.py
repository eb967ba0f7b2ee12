"""The files of a run directory that tell what was asked for and what came out."""

import json
import os
from pathlib import Path

from llava_jax.config import Config, Recipe, to_json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.metrics import plot_loss, write_atomically, write_json
from llava_jax.weights import RUN_FORMAT

# Settings that may differ when a run is continued: they change neither samples nor weights.
HARMLESS = (
    "train.log_steps",
    "train.remat",
    "train.scan_unroll",
    "checkpoint.",
    "data.num_threads",
    "mesh.",
    "evaluate.",
    "export.",
)


def open_run(recipe: Recipe, workdir: Path) -> None:
    """Makes the run directory and writes `config.json`; one that holds checkpoints must be of the same run.

    Raises ConfigError naming the settings that differ, and CheckpointError when nothing can be written there.
    """
    asked = {
        "format": RUN_FORMAT,
        "name": recipe.name,
        "stages": {n: to_json(c) for n, c in recipe.stages.items()},
    }
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text()) if path.exists() else None
        if found is None and any(workdir.iterdir()):
            raise ConfigError(f"{workdir} holds files but no run (no config.json); choose another --workdir.")
        if found is not None and any(workdir.glob("checkpoints/**/commit_success.txt")):
            _check_same_run(found, json.loads(json.dumps(asked)), workdir)
        write_json(path, asked)
    except OSError as error:
        raise CheckpointError(
            f"The run directory {workdir} cannot be written ({error.strerror}); choose another --workdir."
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); choose another --workdir.") from error


def _check_same_run(found: dict, asked: dict, workdir: Path) -> None:
    before, now = _flatten(found.get("stages", {})), _flatten(asked["stages"])
    differing = [
        f"{key}={now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_harmless(key)
    ]
    if differing:
        raise ConfigError(
            f"{workdir} holds a run with other settings: {', '.join(differing[:5])}"
            f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}. "
            "Continue it with the same settings, or choose another --workdir."
        )


def _is_harmless(key: str) -> bool:
    _, setting = key.split("/", 1)
    return setting.startswith(HARMLESS)


def _flatten(stages: dict) -> dict:
    """{"pretrain/optimizer.learning_rate": 0.001, ...}"""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix[-1] != "/" else prefix + key, inner)
        else:
            flat[prefix] = value

    for stage, config in stages.items():
        visit(f"{stage}/", config)
    return flat


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
    if rows:
        plot_loss(rows, workdir / "training_loss.png")


def write_evaluation(workdir: Path, results: dict, answered: list[dict]) -> None:
    """Writes eval_results.json and predictions.jsonl, and adds the results to all_results.json."""
    write_json(workdir / "eval_results.json", results)
    write_atomically(workdir / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in answered))
    together = json.loads((workdir / "all_results.json").read_text()) | results
    write_json(workdir / "all_results.json", together)


def write_model_card(workdir: Path, recipe: Recipe, summaries: dict[str, dict]) -> None:
    """Writes README.md: what was trained, on which data, with which settings and results."""
    results = json.loads((workdir / "all_results.json").read_text())
    config = recipe.last
    model = config.model
    lines = [
        "---",
        "library_name: llava_jax",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"CLIP vision tower ({model.vision.num_hidden_layers} layers, {model.vision.image_size} px in patches of "
        f"{model.vision.patch_size}), projector `{model.projector_type}`, decoder of {model.text.num_hidden_layers} "
        f"layers and width {model.text.hidden_size}. Trained with llava_jax; every setting is in `config.json`.",
        "",
        "| stage | data | samples | template | trains | steps | batch | learning rate | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    stages = results.get("stages", {}) | {list(recipe.stages)[-1]: results}
    for stage, config in recipe.stages.items():
        lines.append(_stage_row(stage, config, summaries[stage], stages[stage]))
    accuracies = {key: value for key, value in results.items() if key.startswith("eval_accuracy")}
    if accuracies:
        lines += ["", f"Exact match on {results['eval_samples']} questions of `{config.evaluate.path}`:", ""]
        lines += ["| | |", "|---|---|", *(f"| `{key}` | {value:.1%} |" for key, value in accuracies.items())]
    lines += ["", "![training loss](training_loss.png)", ""]
    if (workdir / "samples.png").exists():
        lines += ["![sample answers](samples.png)", ""]
    write_atomically(workdir / "README.md", "\n".join(lines))


def _stage_row(stage: str, config: Config, summary: dict, result: dict) -> str:
    trains = ", ".join(
        name for name in ("vision_tower", "projector", "language_model") if getattr(config.tune, name)
    )
    cells = (
        stage or config.name,
        f"`{os.path.basename(config.data.path)}`",
        f"{summary['samples']:,}",
        config.data.template,
        trains,
        f"{result['steps']:,}",
        str(config.data.batch_size),
        f"{config.optimizer.learning_rate:g}",
        f"{result['train_loss']:.4f}",
    )
    return "| " + " | ".join(cells) + " |"
