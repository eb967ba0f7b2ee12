"""python -m llava_jax.train --config=configs/NAME.py[:ARGS] [--workdir=DIR] [--config.KEY=VALUE]: trains a recipe.

The same command again continues an interrupted run.
"""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llava_jax.commands import read_recipe, run_command
from llava_jax.gpus import require_found
from llava_jax.host_memory import start_anew_with_tunables
from llava_jax.interruption import listening, stop_at_once

CONFIG = config_flags.DEFINE_config_file(
    "config", lock_config=True, help_string="A recipe, e.g. configs/quickstart.py."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; default: runs/ and the recipe's name.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where JAX cannot find it itself."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Trains the recipe of the flags."""
    recipe = read_recipe(CONFIG)
    workdir = Path(WORKDIR.value or f"runs/{recipe.name}").expanduser()
    stages = " -> ".join(name for name in recipe.stages if name) or "one stage"
    print(f"llava_jax: recipe {recipe.name} ({stages}), run directory {workdir}", flush=True)

    from llava_jax import processes  # imports JAX, which takes a few seconds
    from llava_jax.trainer import run

    processes.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    require_found()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end; one process tells what they all do
    with processes.ending_together():
        run(recipe, workdir)


if __name__ == "__main__":
    start_anew_with_tunables()
    with listening(stop_at_once):
        run_command(main)
