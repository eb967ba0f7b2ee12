"""The files of a run directory that tell what came out: results, plot, model card."""

import json
import os
from pathlib import Path

from llava_jax.config import Config
from llava_jax.metrics import plot_loss, write_atomically, write_json
from llava_jax.recipe import Recipe


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
    if any("eval_loss" in row for row in rows):
        plot_loss(rows, workdir / "training_eval_loss.png", key="eval_loss")


def write_evaluation(workdir: Path, results: dict, answered: list[dict], name: str) -> None:
    """Writes eval_results.json and, as JSONL under `name`, the answers; adds the results to all_results.json."""
    together = json.loads((workdir / "all_results.json").read_text()) | results
    write_json(workdir / "all_results.json", together)
    write_json(workdir / "eval_results.json", _evaluated(together))
    write_atomically(workdir / name, "".join(json.dumps(row) + "\n" for row in answered))


def _evaluated(results: dict) -> dict:
    return {key: value for key, value in results.items() if key.startswith("eval_")}


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
        "| stage | data | samples | template | trains | steps | batch | learning rate | mean loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    stages = results.get("stages", {}) | {list(recipe.stages)[-1]: results}
    for stage, config in recipe.stages.items():
        lines.append(_stage_row(stage, config, summaries[stage], stages[stage]))
    accuracies = {key: value for key, value in results.items() if key.startswith("eval_accuracy")}
    if accuracies:
        lines += ["", f"Exact match on {results['eval_samples']} questions of `{config.evaluate.path}`:", ""]
        lines += ["| | |", "|---|---|", *(f"| `{key}` | {value:.1%} |" for key, value in accuracies.items())]
    if results.get("eval_predicted"):
        lines += ["", f"Answers to the {results['eval_predicted']:,} samples kept out of training:"]
        lines[-1] += f" exact match {results['eval_exact_match']:.1%}, ROUGE-L {results['eval_rouge_l']:.3f}."
    lines += ["", "![training loss](training_loss.png)", ""]
    if (workdir / "samples.png").exists():
        lines += ["![sample answers](samples.png)", ""]
    write_atomically(workdir / "README.md", "\n".join(lines))


def _stage_row(stage: str, config: Config, summary: dict, result: dict) -> str:
    modes = {name: getattr(config.tune, name) for name in ("vision_tower", "projector", "language_model")}
    trains = ", ".join(
        name if mode == "full" else f"{name} ({mode})" for name, mode in modes.items() if mode != "frozen"
    )
    cells = (
        stage or config.name,
        f"`{os.path.basename(config.data.path) or config.data.dataset}`",
        f"{summary['samples']:,}",
        config.data.template,
        trains,
        f"{result['steps']:,}",
        str(config.data.batch_size),
        f"{config.optimizer.learning_rate:g}",
        f"{result['train_loss']:.4f}" if "train_loss" in result else "",
    )
    return "| " + " | ".join(cells) + " |"
