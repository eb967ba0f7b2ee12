"""python -m llava_jax.check_data --config=configs/NAME.py[:ARGS]: reads all training data and tells what is wrong.

Exits with 0 if training may start, with 11 if not. Of the model only the tokenizer has to be there.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from llava_jax.commands import read_recipe, run_command

if TYPE_CHECKING:
    from llava_jax.config import Config
    from llava_jax.data.inspection import Inspection
    from llava_jax.data.tokenizer import Tokenizer
    from llava_jax.recipe import Recipe

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A recipe, as for training.")
STAGE = flags.DEFINE_string("stage", None, "The one stage of the recipe to check; default: all of them.")
REPORT = flags.DEFINE_string("report", "report.html", "Where the page is written.")
DECODE = flags.DEFINE_bool("decode", True, "Decode every image; otherwise only its file is looked for.")
SAMPLES = flags.DEFINE_integer("samples", 12, "How many samples the page shows.", lower_bound=0)
flags.mark_flag_as_required("config")

_MAX_KINDS = 20  # told on the terminal


def main() -> None:
    """Checks the data of the flags."""
    recipe = read_recipe(CONFIG)
    stages, report = _stages(recipe), _report()
    print(f"llava_jax: checking the data of recipe {recipe.name}", flush=True)
    if recipe.prepare:
        recipe.prepare()

    from llava_jax.data.dataset import open_datasets
    from llava_jax.data.inspection import inspect
    from llava_jax.data.inspection_page import write_page
    from llava_jax.data.tokenizer import require_room
    from llava_jax.errors import DataError
    from llava_jax.recipe import naming_stage

    tokenizer = _load_tokenizer(recipe.first)
    require_room(tokenizer, recipe.first.model.text.vocab_size)
    opened = []  # all of it before hours are spent on the first
    for name, config in stages.items():
        with naming_stage(name):
            training, evaluations = open_datasets(config.data, config.seed)
        opened.append((f"{name} training data".strip(), training, config))
        for own, evaluation in evaluations.items():
            opened.append((f"{name} evaluation data {own}".strip(), evaluation, config))
    parts = {}
    for name, dataset, config in opened:
        print(f"\n{name}", flush=True)
        parts[name] = inspect(dataset, config, tokenizer, decode=DECODE.value, num_previews=SAMPLES.value)
        _tell(parts[name])
    write_page(report, f"Data of {recipe.name}", parts)
    print(f"\n{report} shows all of it.", flush=True)
    refusals = [f"{name}: {part.refusal}" for name, part in parts.items() if part.refusal]
    if refusals:
        raise DataError("Training may not start.\n" + "\n".join(refusals))
    print("Training may start.")


def _stages(recipe: "Recipe") -> dict[str, "Config"]:
    from llava_jax.errors import ConfigError

    if STAGE.value is None:
        return recipe.stages
    if STAGE.value not in recipe.stages:
        names = ", ".join(filter(None, recipe.stages)) or "not named, for it has one"
        raise ConfigError(f"--stage={STAGE.value}: the stages of this recipe are {names}.")
    return {STAGE.value: recipe.stages[STAGE.value]}


def _report() -> Path:
    """Where the page goes, after making sure that it can be written there."""
    from llava_jax.errors import ConfigError

    path = Path(REPORT.value)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--report={path} cannot be written; name a file in a directory that exists.")
    return path


def _load_tokenizer(config: "Config") -> "Tokenizer":
    from llava_jax.data.tokenizer import load_tokenizer

    path = config.init.tokenizer
    if not path:
        from llava_jax.weights import find_tokenizer  # imports JAX, which takes a few seconds

        path = find_tokenizer(config.init)
    return load_tokenizer(path, config.model.extra_tokens)


def _tell(inspection: "Inspection") -> None:
    print(inspection.files)
    for name, count in inspection.counts.items():
        print(f"  {name:<30} {count:>15}")
    for finding in inspection.findings[:_MAX_KINDS]:
        print(f"  {finding.count:,} x {finding.title}\n      {finding.messages[0]}")
    if len(inspection.findings) > _MAX_KINDS:
        print(f"  ... and {len(inspection.findings) - _MAX_KINDS:,} more kinds")


if __name__ == "__main__":
    run_command(main)
