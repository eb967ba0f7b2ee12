"""python -m llava_jax.plan --config=configs/NAME.py[:ARGS] --topology=v5e:8x8: what training will need, before it runs.

Compiles the step that training would run, for devices that are only described (a TPU slice, GPUs) or for those of this
machine (--topology=here). Neither weights nor data have to be there. Ends with 0 if every stage fits, else with 16.
"""

import json
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from llava_jax.commands import read_recipe, run_command

if TYPE_CHECKING:
    from llava_jax.config import Config
    from llava_jax.planning.stage_plan import StagePlan
    from llava_jax.planning.targets import Target
    from llava_jax.recipe import Recipe

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A recipe, as for training.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "v5e:8x8, v5p:4x4x4, v6e:4x4, ... (chips along a slice's sides), h200:1, h100:8; 2xv5e:16x16 (slices), 4xh100:8 "
    "(hosts); or here.",
)
STAGE = flags.DEFINE_string("stage", None, "The one stage of the recipe to plan; default: all of them.")
TOKENS = flags.DEFINE_integer(
    "tokens", None, "Tokens per row, instead of what the data makes.", lower_bound=2
)
IMAGES = flags.DEFINE_integer("images", None, "Image slots per row, likewise.", lower_bound=0)
SAMPLES = flags.DEFINE_integer(
    "samples", None, "Samples of an epoch, where the data is not here.", lower_bound=1
)
SEARCH = flags.DEFINE_bool(
    "search", False, "Look for the most rows that fit with each rematerialisation, lightest first."
)
JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """Plans the stages of the flags."""
    recipe = read_recipe(CONFIG)
    stages = _stages(recipe)
    print(f"llava_jax: planning recipe {recipe.name} for {TOPOLOGY.value}", flush=True)

    from llava_jax.planning import targets

    targets.prepare(TOPOLOGY.value)

    from llava_jax.errors import OutOfMemoryError  # from here on JAX is imported, which takes a few seconds
    from llava_jax.planning.report import devices_line

    target = targets.find(TOPOLOGY.value)
    print(devices_line(target), flush=True)
    plans = {name: _plan(name, config, target) for name, config in stages.items()}
    misfits = [name for name, plan in plans.items() if plan.compiled.fits is False]
    if JSON.value:
        print(json.dumps(_to_json(plans)), flush=True)
    if misfits:
        raise OutOfMemoryError(
            f"{'Stage ' + ', '.join(misfits) if misfits != [''] else 'The step'} does not fit {target.name}; the "
            "tables above tell by how much and what would help."
        )


def _plan(name: str, config: "Config", target: "Target") -> "StagePlan":
    """Plans a stage and tells of it; with --search the best plan that fits, if any does."""
    from llava_jax.metrics import Counter
    from llava_jax.planning import report
    from llava_jax.planning.search import flags as search_flags
    from llava_jax.planning.search import plan_lightest, search
    from llava_jax.planning.stage_plan import make_plan
    from llava_jax.planning.workload import Given, find_workload

    label = f"stage {name}: " if name else ""
    given = Given(TOKENS.value, IMAGES.value, SAMPLES.value)
    workload = find_workload(config, given, Counter(f"{name} measuring samples:".strip()))
    print(f"\n{label}{report.workload_line(config, workload)}", flush=True)
    if SEARCH.value:
        print("Searching; what fits takes minutes to compile ...", flush=True)
        fitting = search(config, target, workload, lambda plan: print(report.search_line(plan), flush=True))
        if fitting:
            print(f"Best: {search_flags(fitting[0])}\n\n{report.describe(fitting[0])}", flush=True)
            return fitting[0]
        print("Nothing fits. The recipe as it is:")
    print("Compiling; a model of 7B takes one to four minutes ...", flush=True)
    if config.train.remat == "auto":
        plan = plan_lightest(config, target, workload, lambda how: print(how, flush=True))
    else:
        plan = make_plan(config, target, workload)
    print(f"\n{report.describe(plan)}", flush=True)
    return plan


def _stages(recipe: "Recipe") -> dict[str, "Config"]:
    from llava_jax.errors import ConfigError

    if STAGE.value is None:
        return recipe.stages
    if STAGE.value not in recipe.stages:
        names = ", ".join(filter(None, recipe.stages)) or "not named, for it has one"
        raise ConfigError(f"--stage={STAGE.value}: the stages of this recipe are {names}.")
    return {STAGE.value: recipe.stages[STAGE.value]}


def _to_json(plans: dict[str, "StagePlan"]) -> dict:
    """The plan of the stage that needs most; where there are several, all of them under `stages`."""
    largest = max(plans.values(), key=lambda plan: plan.compiled.peak).to_json()
    if len(plans) == 1:
        return largest
    return largest | {"stages": {name: plan.to_json() for name, plan in plans.items()}}


if __name__ == "__main__":
    run_command(main)
