"""Trains one stage: from weights and data to a saved state, or on from where an earlier run stopped."""

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.agreement import Agreement
from llava_jax.checkpoint import Checkpoints, read_meta
from llava_jax.config import Config
from llava_jax.convert.source import ModelSource
from llava_jax.data.pipeline import Pipeline
from llava_jax.errors import CheckpointError, StoppedError
from llava_jax.interruption import StopRequest
from llava_jax.metrics import MetricsLog
from llava_jax.processes import exchange, from_first
from llava_jax.program import Program
from llava_jax.recorder import Recorder
from llava_jax.sharding import place_batch
from llava_jax.step import TrainState
from llava_jax.tuning import kernel_name, table
from llava_jax.watchdog import Watchdog
from llava_jax.weights import before_stage, load


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe, its data checked. The only stage of an ordinary recipe is called ''."""

    name: str
    config: Config
    pipeline: Pipeline
    evaluation: Pipeline | None  # data that is kept out of training, for the loss at the end of the stage
    checkpoints: Path

    @property
    def num_steps(self) -> int:
        train = self.config.train
        return train.max_steps or math.ceil(train.num_epochs * self.pipeline.steps_per_epoch)


def train_stage(stage: Stage, weights: ModelSource, mesh: Mesh, log: MetricsLog) -> dict[str, float]:
    """Trains a stage to its last step, which is saved, and returns its results.

    What an earlier run did of it, evaluation included, is not done again. `weights` is the model before the stage.
    Raises CheckpointError when no checkpoint can be continued or the last one not be written, DivergedError when
    losses are no longer numbers, StoppedError when a signal asked for it.
    """
    watchdog = Watchdog(stage.config.train.hang_timeout_minutes)
    checkpoints = Checkpoints(stage.checkpoints, stage.config.checkpoint, watchdog)
    try:
        start = checkpoints.starting_point(stage.num_steps)
        evaluated = from_first(
            "is evaluated", stage.evaluation is None or "eval_loss" in _results(stage, log)
        )
        if not (start and evaluated and int(start.name) == stage.num_steps):
            program = Program(stage.config, mesh, stage.num_steps)
            _print_plan(stage, program, int(start.name) if start else None)
            _train(stage, program, before_stage(weights, stage.config), log, checkpoints, start)
    finally:
        checkpoints.close()
        watchdog.close()
    return _results(stage, log)


def _train(
    stage: Stage,
    program: Program,
    weights: ModelSource,
    log: MetricsLog,
    checkpoints: Checkpoints,
    start: Path | None,
) -> None:
    config = stage.config
    frozen, checksums = _load_frozen(weights, program)
    meta = {"dataset": stage.pipeline.fingerprint, "frozen": checksums}
    if start:
        _check_meta(read_meta(start), meta, start)
    first_step = int(start.name) if start else 0
    log.forget_after(stage.name, first_step)
    for pipeline in filter(None, (stage.pipeline, stage.evaluation)):
        pipeline.bad_samples.write()
    recorder = Recorder(
        stage.name, config, stage.pipeline, log, first_step, stage.num_steps, checkpoints.watchdog
    )
    if first_step == stage.num_steps:
        trainable = checkpoints.restore_parameters(start, program.abstract_trainable())
    else:
        if start:
            state = checkpoints.restore(start, program.abstract_state())
        else:
            state = program.new_state(
                load(weights, program.abstract_trainable(), jnp.float32, program.parameter_sharding)
            )
        trainable = _run_steps(stage, program, state, frozen, checkpoints, meta, recorder, first_step)
    if stage.evaluation:
        parameters = trainable | frozen
        loss = _evaluation_loss(program, stage.evaluation, parameters, checkpoints.watchdog)
        recorder.log_evaluation(stage.num_steps, loss)


def _load_frozen(weights: ModelSource, program: Program) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """The frozen parameters and their checksums. A checksum takes all of a parameter's bytes, so that several
    processes share them out; of the others each reads what its devices hold."""
    names = list(dict.fromkeys(map(kernel_name, program.abstract_frozen())))
    dtype, quantized = jnp.dtype(program.config.train.frozen_dtype), program.quantized()
    own = names[jax.process_index() :: jax.process_count()]
    others = [name for name in names if name not in own]
    checksums = {}
    frozen = load(weights, own, dtype, program.parameter_sharding, checksums, quantized=quantized)
    frozen |= load(weights, others, dtype, program.parameter_sharding, quantized=quantized)
    for share in exchange("checksums of frozen weights", checksums, timeout=3600.0):
        checksums |= share
    return frozen, checksums


def _run_steps(
    stage: Stage,
    program: Program,
    state: TrainState,
    frozen: dict,
    checkpoints: Checkpoints,
    meta: dict,
    recorder: Recorder,
    first_step: int,
) -> dict[str, jax.Array]:
    """Trains from `first_step` to the last step, saves what is due and returns the trained parameters."""
    watchdog = checkpoints.watchdog
    save_interval = stage.config.checkpoint.save_interval(stage.num_steps)
    train_step = program.train_step()
    agree = Agreement(program.mesh)
    batches = stage.pipeline.iterate(first_step, stage.num_steps)
    with contextlib.closing(StopRequest()) as request:
        for step in range(first_step + 1, stage.num_steps + 1):
            before = time.monotonic()
            with watchdog.waiting(f"the batch of step {step}"):
                batch = next(batches)
            # As long as the device still computes the step before, it does not wait.
            data_wait = time.monotonic() - before if state.step.is_ready() else 0.0
            state, metrics = train_step(state, frozen, place_batch(program.mesh, batch))
            if step == first_step + 1:  # compiled; until here nothing is lost if a signal ends the process
                request.listen()
            recorder.add(step, metrics, data_wait)
            stop, minutes_passed = agree(request.asked, checkpoints.is_due())
            if stop or minutes_passed or step % save_interval == 0 or step == stage.num_steps:
                recorder.flush()  # a run that continues from here has told all that came before
                checkpoints.save(state, {"step": step} | meta, whole=stop)
            if stop or step == stage.num_steps:
                checkpoints.finish()
            if stop:
                raise StoppedError(
                    f"Stopped after step {step:,}, which is saved; the same command continues."
                )
    return state.trainable


def _evaluation_loss(program: Program, data: Pipeline, parameters: dict, watchdog: Watchdog) -> float:
    """The mean loss of all supervised tokens of an epoch."""
    eval_step = program.eval_step()
    total, count = 0.0, 0
    batches = data.iterate(0, data.steps_per_epoch)
    for step in range(data.steps_per_epoch):
        with watchdog.waiting(f"evaluation batch {step + 1}"):
            batch = next(batches)
        sums = eval_step(parameters, place_batch(program.mesh, batch))
        with watchdog.waiting(f"the devices' result of evaluation batch {step + 1}"):
            step_total, step_count = jax.device_get(sums)
        total += float(step_total)
        count += int(step_count)
    return total / max(1, count)


def _check_meta(found: dict, expected: dict, path: Path) -> None:
    if found["dataset"] != expected["dataset"]:
        raise CheckpointError(
            f"{path} was trained on other data: the records, the sizes or presence of their images, the tokenizer or "
            "the data settings have changed since. Restore them, or start anew with another --workdir."
        )
    changed = [name for name, crc in expected["frozen"].items() if found["frozen"].get(name) != crc]
    if changed:
        raise CheckpointError(
            f"{path} was trained with other frozen weights: {changed[0]} and {len(changed) - 1} more have changed since. "
            "Put back what init.* names, or start anew with another --workdir."
        )


def _print_plan(stage: Stage, program: Program, saved_step: int | None) -> None:
    """What trains, on what, at which rate."""
    config, summary = stage.config, stage.pipeline.summary()
    print(
        f"{stage.name or config.name}: {stage.num_steps:,} steps of {config.data.batch_size} rows "
        f"from {summary['samples']:,} samples "
        f"({summary['samples_text_only']:,} text only, {summary['samples_truncated']:,} truncated, "
        f"{summary['samples_teaching_nothing']:,} with nothing to learn, {summary['samples_unusable']:,} unusable)"
        + (f", continuing after step {saved_step:,}" if saved_step else ""),
        flush=True,
    )
    shapes = stage.pipeline.schedule.shapes((saved_step or 0) // stage.pipeline.steps_per_epoch)
    listed = ", ".join(f"{length} x {images}" for length, images in shapes)
    print(f"  an epoch's rows of tokens x images: {listed}; each shape is compiled once", flush=True)
    for line in table(config, program.abstract_trainable(), program.abstract_frozen()):
        print(f"  {line}", flush=True)


def _results(stage: Stage, log: MetricsLog) -> dict[str, float]:
    rows = [row for row in log.rows() if row.get("stage", "") == stage.name]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    rows = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    if not losses:  # somebody deleted the log of a finished stage
        return {"steps": stage.num_steps}
    seconds = sum(row["seconds"] for row in rows)
    num_skipped = sum(row.get("skipped_steps", 0) for row in rows)
    return {
        "train_loss": float(np.mean(losses)),
        "train_runtime": seconds,
        "train_steps_per_second": stage.num_steps / seconds,
        "steps": stage.num_steps,
        "epoch": rows[-1]["epoch"],
        **({"skipped_steps": num_skipped} if num_skipped else {}),
        **({"eval_loss": evaluations[-1]} if evaluations else {}),
    }
