"""Trains one stage: from weights and data to a saved state, or on from where an earlier run stopped."""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax.checkpoint import Checkpoints
from llava_jax.config import Config
from llava_jax.convert.source import ModelSource
from llava_jax.data.pipeline import Pipeline
from llava_jax.errors import CheckpointError, DivergedError
from llava_jax.metrics import MetricsLog, Progress
from llava_jax.optimizer import MODULES, is_trainable, learning_rates, make_optimizer, make_schedule
from llava_jax.sharding import (
    attention_placement,
    constrain_rows,
    parameter_sharding,
    place_batch,
    replicated,
    state_shardings,
)
from llava_jax.step import TrainState, abstract_model, make_eval_step, make_train_step, model_settings
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
    Raises CheckpointError when the newest checkpoint cannot be continued, DivergedError when the loss is no
    longer a number.
    """
    checkpoints = Checkpoints(stage.checkpoints, stage.config.checkpoint)
    try:
        saved_step = checkpoints.latest_step()
        evaluated = stage.evaluation is None or "eval_loss" in _results(stage, log)
        if saved_step != stage.num_steps or not evaluated:
            _print_plan(stage, weights, saved_step)
            _train(stage, before_stage(weights, stage.config), mesh, log, checkpoints)
    finally:
        checkpoints.close()
    return _results(stage, log)


def _train(stage: Stage, weights: ModelSource, mesh: Mesh, log: MetricsLog, checkpoints: Checkpoints) -> None:
    config = stage.config
    settings = model_settings(config, constrain_rows(mesh), attention_placement(mesh))
    graphdef, shapes = abstract_model(config.model, **settings)
    trained = {name: leaf for name, leaf in shapes.items() if is_trainable(name, config.tune)}
    optimizer = make_optimizer(config.optimizer, stage.num_steps)

    sharding = partial(parameter_sharding, mesh)
    others = [name for name in shapes if name not in trained]
    checksums = {}
    frozen = load(weights, others, jnp.dtype(config.train.frozen_dtype), sharding, checksums)
    meta = {"dataset": stage.pipeline.fingerprint, "frozen": checksums}
    first_step = checkpoints.latest_step() or 0
    if first_step:
        _check_meta(checkpoints.read_meta(first_step), meta, stage.checkpoints / str(first_step))
        state = checkpoints.restore(first_step, _abstract_state(trained, optimizer, mesh))
    else:
        state = _new_state(load(weights, trained, jnp.float32, sharding), optimizer, mesh)

    train_step = jax.jit(
        make_train_step(graphdef, optimizer, config.loss),
        donate_argnums=0,
        out_shardings=(state_shardings(mesh, state), replicated(mesh)),
    )
    log.forget_after(stage.name, first_step)
    for pipeline in filter(None, (stage.pipeline, stage.evaluation)):
        pipeline.bad_samples.write()
    recorder = _Recorder(stage, first_step, log)
    batches = stage.pipeline.iterate(first_step, stage.num_steps)
    for step in range(first_step + 1, stage.num_steps + 1):
        before = time.monotonic()
        batch = next(batches)
        # As long as the device still computes the step before, it does not wait.
        data_wait = time.monotonic() - before if state.step.is_ready() else 0.0
        state, metrics = train_step(state, frozen, place_batch(mesh, batch))
        recorder.add(step, metrics, data_wait)
        if step % config.checkpoint.save_steps == 0 or step == stage.num_steps:
            recorder.flush()  # a run that continues from here has told all that came before
            checkpoints.save(state, {"step": step} | meta)
    if stage.evaluation:
        loss = _evaluation_loss(stage.evaluation, graphdef, config, state.trainable | frozen, mesh)
        recorder.log_evaluation(stage.num_steps, loss)


def _evaluation_loss(data: Pipeline, graphdef, config: Config, parameters: dict, mesh: Mesh) -> float:
    """The mean loss of all supervised tokens of an epoch."""
    eval_step = jax.jit(make_eval_step(graphdef, config.loss))
    total, count = 0.0, 0
    for batch in data.iterate(0, data.steps_per_epoch):
        step_total, step_count = eval_step(parameters, place_batch(mesh, batch))
        total += float(step_total)
        count += int(step_count)
    return total / max(1, count)


def _new_state(trainable: dict[str, jax.Array], optimizer, mesh: Mesh) -> TrainState:
    init = jax.jit(
        optimizer.init, out_shardings=state_shardings(mesh, jax.eval_shape(optimizer.init, trainable))
    )
    return TrainState(jax.device_put(jnp.int32(0), replicated(mesh)), trainable, init(trainable))


def _abstract_state(shapes: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    trainable = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in shapes.items()}
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )


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


def _print_plan(stage: Stage, weights: ModelSource, saved_step: int | None) -> None:
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
    rates = learning_rates(config.optimizer)
    for prefix, module in MODULES.items():
        count = sum(math.prod(weights.shape(name)) for name in weights.names() if name.startswith(prefix))
        how = f"trains at {rates[module]:g}" if getattr(config.tune, module) else "frozen"
        print(f"  {module:<15} {count:>15,} parameters  {how}", flush=True)


@dataclasses.dataclass(frozen=True)
class _Done:
    """A step that is not logged yet; its metrics may still be on their way from the device."""

    step: int
    metrics: dict[str, jax.Array]
    num_tokens: int
    num_images: int
    data_wait: float


class _Recorder:
    """Logs every `log_steps` steps as one row, one step late so that devices never wait."""

    def __init__(self, stage: Stage, first_step: int, log: MetricsLog):
        self.stage = stage
        self.log = log
        self.progress = Progress(stage.name, stage.num_steps, first_step)
        self.schedule = make_schedule(stage.config.optimizer, stage.num_steps)
        self.pending: list[_Done] = []
        self.num_bad_samples = 0
        self.since = time.monotonic()

    def add(self, step: int, metrics: dict, data_wait: float) -> None:
        if self.pending and self.pending[-1].step % self.stage.config.train.log_steps == 0:
            self.flush()
        num_tokens, num_images = self.stage.pipeline.count(step - 1)
        self.pending.append(_Done(step, metrics, num_tokens, num_images, data_wait))

    def flush(self) -> None:
        """Logs what is pending: means and rates over its steps, the learning rate of the last."""
        if not self.pending:
            return
        metrics = [jax.device_get(done.metrics) for done in self.pending]
        for done, values in zip(self.pending, metrics, strict=True):
            self._check_finite(done.step, float(values["loss"]))
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        step = self.pending[-1].step
        row = {"stage": self.stage.name} if self.stage.name else {}
        row |= {
            "step": step,
            "epoch": round(step / self.stage.pipeline.steps_per_epoch, 4),
            "loss": float(np.mean([values["loss"] for values in metrics])),
            "grad_norm": float(np.mean([values["grad_norm"] for values in metrics])),
            **self._learning_rates(step),
            "num_supervised_tokens": int(sum(values["num_supervised_tokens"] for values in metrics)),
            "tokens_per_second": sum(done.num_tokens for done in self.pending) / seconds,
            "images_per_second": sum(done.num_images for done in self.pending) / seconds,
            "data_wait": sum(done.data_wait for done in self.pending) / seconds,
            "seconds": seconds,
        }
        self.pending = []
        self.log.append(row)
        self.progress.show(row)
        self._tell_bad_samples()

    def log_evaluation(self, step: int, loss: float) -> None:
        """Logs the loss on the data that was kept out of training."""
        row = {"stage": self.stage.name} if self.stage.name else {}
        self.log.append(row | {"step": step, "eval_loss": loss})
        print(f"{self.stage.name or 'step'} {step}: eval_loss {loss:.4f}", flush=True)

    def _tell_bad_samples(self) -> None:
        count = len(self.stage.pipeline.bad_samples.report())
        if count > self.num_bad_samples:
            self.num_bad_samples = count
            print(f"{count:,} samples could not be used; bad_samples.jsonl tells which", flush=True)

    def _learning_rates(self, step: int) -> dict[str, float]:
        """`learning_rate`, and each module's own where they differ."""
        config, share = self.stage.config, float(self.schedule(step - 1))
        rates = {
            module: share * rate
            for module, rate in learning_rates(config.optimizer).items()
            if getattr(config.tune, module)
        }
        common = {"learning_rate": rates.get("language_model", max(rates.values()))}
        if len(set(rates.values())) == 1:
            return common
        return common | {f"learning_rate_{module}": rate for module, rate in rates.items()}

    def _check_finite(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss of {self.stage.name or 'the run'} is {loss} at step {step}. No checkpoint was made of it; "
                "lower optimizer.learning_rate or set optimizer.max_grad_norm=1.0 and run again."
            )


def _results(stage: Stage, log: MetricsLog) -> dict[str, float]:
    rows = [row for row in log.rows() if row.get("stage", "") == stage.name]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    rows = [row for row in rows if "loss" in row]
    if not rows:  # somebody deleted the log of a finished stage
        return {"steps": stage.num_steps}
    seconds = sum(row["seconds"] for row in rows)
    return {
        "train_loss": float(np.mean([row["loss"] for row in rows])),
        "train_runtime": seconds,
        "train_steps_per_second": stage.num_steps / seconds,
        "steps": stage.num_steps,
        "epoch": rows[-1]["epoch"],
    } | ({"eval_loss": evaluations[-1]} if evaluations else {})
