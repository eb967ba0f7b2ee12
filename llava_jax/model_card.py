"""The model card of a run: README.md in its directory, for the hub too."""

import json
import os
from importlib.metadata import version
from pathlib import Path

from llava_jax.config import CLIP, SIGLIP, Config, InitConfig, ModelConfig
from llava_jax.metrics import write_atomically
from llava_jax.optimizer import described
from llava_jax.recipe import Recipe
from llava_jax.tuning import described_form

_PARTS = ("model", "vision_tower", "language_model", "projector", "adapters")


def write_model_card(workdir: Path, recipe: Recipe, summaries: dict[str, dict]) -> None:
    """Writes README.md: what was trained from what, on which data, with which settings and results.

    summaries: of each stage's data.
    """
    results = json.loads((workdir / "all_results.json").read_text())
    lines = [
        "---",
        "library_name: llava_jax",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# {recipe.name}",
        "",
        _architecture(recipe.first.model),
        _origin(recipe.first.init),
        "",
        "| stage | data | samples | template | steps | batch | learning rate | mean loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of_stages = results.get("stages", {}) | {list(recipe.stages)[-1]: results}
    for stage, config in recipe.stages.items():
        lines.append(_row(stage, config, summaries[stage], of_stages[stage]))
    lines += ["", *(_training(stage, config, of_stages[stage]) for stage, config in recipe.stages.items())]
    lines += _evaluation(results, recipe.last)
    lines += ["", "![training loss](training_loss.png)", ""]
    if (workdir / "samples.png").exists():
        lines += ["![sample answers](samples.png)", ""]
    lines += [f"Trained with llava_jax, jax {version('jax')}. Every setting is in `config.json`.", ""]
    write_atomically(workdir / "README.md", "\n".join(lines))


def _architecture(model: ModelConfig) -> str:
    tower = {CLIP: "CLIP", SIGLIP: "SigLIP"}[model.vision.model_type]
    return (
        f"{tower} vision tower ({model.vision.num_hidden_layers} layers, {model.vision.image_size} px in patches of "
        f"{model.vision.patch_size}), projector `{model.projector_type}`, decoder of {model.text.num_hidden_layers} "
        f"layers and width {model.text.hidden_size}."
    )


def _origin(init: InitConfig) -> str:
    named = [f"{part.replace('_', ' ')} `{getattr(init, part)}`" for part in _PARTS if getattr(init, part)]
    return f"Trained from {', '.join(named)}." if named else "Trained from weights drawn at random."


def _row(stage: str, config: Config, summary: dict, result: dict) -> str:
    cells = (
        stage or config.name,
        f"`{os.path.basename(config.data.path) or config.data.dataset}`",
        f"{summary['samples']:,}",
        config.data.template,
        f"{result['steps']:,}",
        str(config.data.batch_size),
        f"{config.optimizer.learning_rate:g}",
        f"{result['train_loss']:.4f}" if "train_loss" in result else "",
    )
    return "| " + " | ".join(cells) + " |"


def _training(stage: str, config: Config, result: dict) -> str:
    """What trains, how, and whether it ended before its time."""
    modules = ("vision_tower", "projector", "language_model")
    trains = "; ".join(
        f"{module}: {described_form(module, config)}" for module in modules if config.tune.trains(module)
    )
    text = f"- {stage or 'Trains'}: {trains}. {described(config.optimizer)}."
    if "stopped_early_after" in result:
        text += f" Stopped early: no evaluation after step {result['stopped_early_after']} was better."
    return text


def _evaluation(results: dict, config: Config) -> list[str]:
    lines = []
    accuracies = {key: value for key, value in results.items() if key.startswith("eval_accuracy")}
    if accuracies:
        lines += ["", f"Exact match on {results['eval_samples']} questions of `{config.evaluate.path}`:", ""]
        lines += ["| | |", "|---|---|", *(f"| `{key}` | {value:.1%} |" for key, value in accuracies.items())]
    losses = {
        key: value for key, value in results.items() if key.startswith("eval_") and key.endswith("loss")
    }
    if losses:
        lines += ["", "On data kept out of training:", "", "| | |", "|---|---|"]
        lines += [f"| `{key}` | {'' if value is None else f'{value:.4f}'} |" for key, value in losses.items()]
    if results.get("eval_predicted"):
        lines += ["", f"Answers to the {results['eval_predicted']:,} samples kept out of training:"]
        lines[-1] += f" exact match {results['eval_exact_match']:.1%}, ROUGE-L {results['eval_rouge_l']:.3f}."
    return lines
