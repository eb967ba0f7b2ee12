"""python -m benchmarks.dispatch [--json]: the milliseconds of Python that a step of the trainer's loop takes.

The run is a real one, of a model with as many leaves as LLaVA-1.5-7B in stage 2 (32 and 24 layers) and tiny shapes. In
place of the compiled step stands one that takes, donates and gives the same arrays and computes nothing, so that what
is left is the interpreter's: the batch's placement, the call, metrics a step late, the recorder. Processor time of the
main thread is counted, which neither waits nor other threads disturb.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from benchmarks import startup_recipe
from llava_jax import trainer
from llava_jax.program import Program
from llava_jax.quickstart.dataset import prepare
from llava_jax.recipe import parse
from llava_jax.recorder import Recorder
from llava_jax.sharding import replicated
from llava_jax.step import TrainState

NUM_STEPS = 400
WARM = 50  # steps that are not counted
GROUP = 50  # steps whose mean is one figure: logging comes every tenth


def make_recipe(scratch: Path, num_steps: int):
    """The quickstart's last stage with LLaVA-1.5-7B's layers, 8 wide, frozen tower."""
    dataset = str(scratch / "dataset")
    prepare(dataset, num_train=80, num_dev=2, num_test=2)
    config = startup_recipe.get_config(dataset)
    config.model.vision.update(
        num_hidden_layers=24, hidden_size=8, intermediate_size=8, num_attention_heads=2
    )
    config.model.text.update(
        num_hidden_layers=32, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2
    )
    config.model.text.head_dim = 4
    config.stages.finetune.train.update(max_steps=num_steps, log_steps=10, compiled_dir="")
    return parse(config)


def idle_step(program: Program):
    """A step with the arguments and results of `Program.train_step` that computes nothing."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state())

    def step(state: TrainState, frozen: dict, batch: dict):
        metrics = {
            "loss": jnp.float32(0),
            "grad_norm": jnp.float32(1),
            "num_supervised_tokens": jnp.int32(1),
            "skipped": jnp.bool(False),
        }
        return TrainState(state.step + 1, state.trainable, state.opt_state), metrics

    return jax.jit(
        step, donate_argnums=0, keep_unused=True, out_shardings=(shardings, replicated(program.mesh))
    )


def measure(num_steps: int = NUM_STEPS, warm: int = WARM, group: int = GROUP) -> dict[str, float]:
    """-> milliseconds per step: the median of the means of groups of steps; and the number of leaves."""
    logging.set_verbosity(logging.FATAL)  # as llava_jax.commands does
    times, leaves = [], []
    add, train_step = Recorder.add, Program.train_step

    def added(recorder, *arguments):
        times.append(time.thread_time())
        add(recorder, *arguments)

    def idle(program):
        leaves.append(len(jax.tree.leaves((program.abstract_state(), program.abstract_frozen()))))
        return idle_step(program)

    Recorder.add, Program.train_step = added, idle
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trainer.run(make_recipe(Path(scratch), num_steps), Path(scratch) / "run")
    finally:
        Recorder.add, Program.train_step = add, train_step
    marks = times[warm::group]
    per_step = [1e3 * (end - begin) / group for begin, end in itertools.pairwise(marks)]
    return {
        "dispatch_ms": statistics.median(per_step),
        "dispatch_ms_highest": max(per_step),
        "leaves": leaves[0],
    }


def main() -> None:
    """Prints the figure and, if asked, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    figures = measure()
    print(
        f"{figures['dispatch_ms']:.2f} ms of Python per step with {figures['leaves']} leaves "
        f"(at most {figures['dispatch_ms_highest']:.2f} in a group of {GROUP})"
    )
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
