"""python -m llava_jax.check_data --config=configs/NAME.py[:ARGS]: reads all training data and tells what is wrong.

Exits with 0 if training may start, with 11 if not. Of the model only the tokenizer has to be there.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_jax.commands import read_recipe, run_command

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A recipe, as for training.")
STAGE = flags.DEFINE_string(
    "stage", None, "The stage of the recipe whose data is checked; default: its first."
)
REPORT = flags.DEFINE_string("report", "report.html", "Where the page is written.")
DECODE = flags.DEFINE_bool("decode", True, "Decode every image; otherwise only its file is looked for.")
SAMPLES = flags.DEFINE_integer("samples", 12, "How many samples the page shows.", lower_bound=0)
flags.mark_flag_as_required("config")


def main() -> None:
    """Checks the data of the flags."""
    from llava_jax.errors import ConfigError

    recipe = read_recipe(CONFIG)
    stage = next(iter(recipe.stages)) if STAGE.value is None else STAGE.value
    if stage not in recipe.stages:
        raise ConfigError(f"--stage={stage}: the stages of this recipe are {', '.join(recipe.stages)}.")
    print(f"llava_jax: checking the data of recipe {recipe.name} {stage}".rstrip(), flush=True)
    if recipe.prepare:
        recipe.prepare()

    from llava_jax.data.inspection import inspect
    from llava_jax.data.inspection_page import write_page
    from llava_jax.data.tokenizer import load_tokenizer
    from llava_jax.weights import find_tokenizer

    config = recipe.stages[stage]
    tokenizer = load_tokenizer(find_tokenizer(config.init))
    inspection = inspect(config, tokenizer, decode=DECODE.value, num_previews=SAMPLES.value)
    for name, count in inspection.counts.items():
        print(f"{name:<28} {count:>15}")
    for kind, messages in inspection.findings.items():
        print(f"{len(messages):,} x {kind}\n    {messages[0]}")
    write_page(Path(REPORT.value), f"Data of {recipe.name} {stage}".rstrip(), inspection)
    print(f"{REPORT.value} shows all of it.", flush=True)
    if inspection.refusal:
        raise inspection.refusal
    print("Training may start.")


if __name__ == "__main__":
    run_command(main)
