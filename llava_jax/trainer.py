"""Runs a recipe: its stages in order, each from data to a saved state, then evaluation, export and the report."""

import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llava_jax import report
from llava_jax.checkpoint import Checkpoints
from llava_jax.config import Config, Recipe
from llava_jax.convert.export import write_hf
from llava_jax.convert.source import ModelSource
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from llava_jax.errors import CheckpointError, ConfigError, DivergedError
from llava_jax.evaluation import draw_samples, evaluate, read_questions
from llava_jax.generation import Generator
from llava_jax.metrics import MetricsLog, Progress
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.optimizer import MODULES, is_trainable, learning_rates, make_optimizer, make_schedule
from llava_jax.sharding import (
    constrain_rows,
    make_mesh,
    num_row_shards,
    parameter_sharding,
    place_batch,
    replicated,
    state_shardings,
)
from llava_jax.step import TrainState, abstract_model, make_train_step, model_settings
from llava_jax.weights import after_stage, before_stage, checkpoint_directory, initial_weights, load


def run(recipe: Recipe, workdir: Path) -> None:
    """Trains every stage of a recipe in `workdir`, or continues where an earlier run of it stopped."""
    if recipe.prepare:
        recipe.prepare()
    # Everything that can be found wrong is found here, before any training time is spent.
    last = recipe.last
    mesh = make_mesh(last.mesh)
    weights = initial_weights(recipe.first)
    tokenizer = _load_tokenizer(weights)
    pipelines = {stage: _make_pipeline(config, tokenizer, mesh) for stage, config in recipe.stages.items()}
    if last.evaluate.path:
        read_questions(last.evaluate.path)
    report.open_run(recipe, workdir)

    log = MetricsLog(workdir / "metrics.jsonl")
    results = {}
    for stage, config in recipe.stages.items():
        results[stage] = train_stage(stage, config, weights, pipelines[stage], mesh, workdir, log)
        weights = after_stage(weights, config, checkpoint_directory(workdir, stage))
    report.write_training(workdir, results, log.rows())
    if last.evaluate.path:
        generator = Generator(weights, tokenizer, mesh, template=last.data.template, dtype=last.train.dtype)
        evaluation, answered = evaluate(generator, last.evaluate)
        report.write_evaluation(workdir, evaluation, answered)
        draw_samples(answered, last.evaluate.image_folder, workdir / "samples.png")
        print("\n".join(f"{name:<28} {value:.4g}" for name, value in evaluation.items()), flush=True)
    report.write_model_card(
        workdir, recipe, {stage: pipeline.summary() for stage, pipeline in pipelines.items()}
    )
    if last.export.layout:
        _export(weights, last, workdir / "export")
    print(f"Done: {workdir}", flush=True)


def train_stage(
    stage: str,
    config: Config,
    weights: ModelSource,
    pipeline: Pipeline,
    mesh: Mesh,
    workdir: Path,
    log: MetricsLog,
) -> dict[str, float]:
    """Trains one stage to its last step and returns its results. `weights` is the model before the stage."""
    num_steps = config.train.max_steps or math.ceil(config.train.num_epochs * pipeline.steps_per_epoch)
    meta = {"dataset": pipeline.fingerprint, "num_steps": num_steps}
    checkpoints = Checkpoints(checkpoint_directory(workdir, stage), config.checkpoint)
    try:
        saved_step = checkpoints.latest_step()
        if saved_step is not None:
            _check_meta(checkpoints.read_meta(saved_step), meta, checkpoints.directory / str(saved_step))
        if saved_step != num_steps:
            _train(stage, config, weights, pipeline, mesh, log, checkpoints, saved_step, num_steps, meta)
    finally:
        checkpoints.close()
    return _stage_results(stage, num_steps, log.rows())


def _train(stage, config, weights, pipeline, mesh, log, checkpoints, saved_step, num_steps, meta) -> None:
    graphdef, shapes = abstract_model(config.model, **model_settings(config, constrain_rows(mesh)))
    trained = [name for name in shapes if is_trainable(name, config.tune)]
    others = [name for name in shapes if not is_trainable(name, config.tune)]
    _print_plan(stage, config, pipeline, shapes, num_steps, saved_step)

    weights = before_stage(weights, config)
    optimizer = make_optimizer(config.optimizer, num_steps)
    sharding = partial(parameter_sharding, mesh)
    frozen = load(weights, others, jnp.dtype(config.train.frozen_dtype), sharding)
    if saved_step is None:
        state = _new_state(load(weights, trained, jnp.float32, sharding), optimizer, mesh)
    else:
        state = checkpoints.restore(
            saved_step, _abstract_state({n: shapes[n] for n in trained}, optimizer, mesh)
        )

    train_step = jax.jit(
        make_train_step(graphdef, optimizer, config.loss),
        donate_argnums=0,
        out_shardings=(state_shardings(mesh, state), replicated(mesh)),
    )
    first_step = saved_step or 0
    log.forget_after(stage, first_step)
    recorder = _Recorder(stage, config, pipeline, first_step, num_steps, log)
    batches = pipeline.iterate(first_step, num_steps)
    for step in range(first_step + 1, num_steps + 1):
        waited = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - waited
        state, metrics = train_step(state, frozen, place_batch(mesh, batch))
        recorder.add(step, batch, metrics, waited)
        if step % config.checkpoint.save_steps == 0 or step == num_steps:
            recorder.flush()  # so that a run continued from here has told all before
            checkpoints.save(state, meta)


class _Recorder:
    """Gathers what steps report and logs it every `log_steps`, one step late so that devices never wait."""

    def __init__(self, stage, config, pipeline, first_step, num_steps, log):
        self.stage, self.config, self.pipeline, self.num_steps, self.log = (
            stage,
            config,
            pipeline,
            num_steps,
            log,
        )
        self.progress = Progress(stage, num_steps, first_step)
        self.schedule = make_schedule(config.optimizer, num_steps)
        self.rates = {m: r for m, r in learning_rates(config.optimizer).items() if getattr(config.tune, m)}
        self.pending = []  # (step, device metrics, host counts) not yet logged
        self.since = time.monotonic()

    def add(self, step: int, batch: dict, metrics: dict, waited: float) -> None:
        due = self.pending and self.pending[-1][0] % self.config.train.log_steps == 0
        if due:
            self.flush()
        num_tokens = int(np.count_nonzero(batch["segment_ids"]))
        num_images = np.count_nonzero(batch["tokens"] == IMAGE_TOKEN) // self.config.model.num_image_tokens
        self.pending.append((step, metrics, num_tokens, int(num_images), waited))

    def check_finite(self) -> None:
        for step, metrics, *_ in self.pending:
            if not math.isfinite(float(metrics["loss"])):
                raise DivergedError(
                    f"The loss of {self.stage or 'the run'} is {float(metrics['loss'])} at step {step}. No checkpoint "
                    "was made of it; lower optimizer.learning_rate or set optimizer.max_grad_norm=1.0 and run again."
                )

    def flush(self) -> None:
        """Logs what is pending as one row: means over its steps, and the last step's learning rate."""
        if not self.pending:
            return
        self.check_finite()
        step = self.pending[-1][0]
        metrics = [jax.device_get(entry[1]) for entry in self.pending]
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        share = float(self.schedule(step - 1))
        rates = {module: share * rate for module, rate in self.rates.items()}
        same = len(set(rates.values())) == 1
        row = {"stage": self.stage} if self.stage else {}
        row |= {
            "step": step,
            "epoch": round(step / self.pipeline.steps_per_epoch, 4),
            "loss": float(np.mean([m["loss"] for m in metrics])),
            "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
            "learning_rate": rates.get("language_model", max(rates.values())),
            **({} if same else {f"learning_rate_{module}": rate for module, rate in rates.items()}),
            "num_supervised_tokens": int(sum(m["num_supervised_tokens"] for m in metrics)),
            "tokens_per_second": sum(entry[2] for entry in self.pending) / seconds,
            "images_per_second": sum(entry[3] for entry in self.pending) / seconds,
            "data_wait": sum(entry[4] for entry in self.pending) / seconds,
            "seconds": seconds,
        }
        self.pending = []
        self.log.append(row)
        self.progress.show(row)


def _make_pipeline(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> Pipeline:
    rows, shards = config.data.batch_size // config.train.accumulation_steps, num_row_shards(mesh)
    if rows % shards:
        raise ConfigError(
            f"data.batch_size / train.accumulation_steps = {rows} rows cannot be spread evenly over the mesh's {shards} "
            f"row shards (mesh.data x mesh.fsdp); choose a multiple of {shards}."
        )
    return Pipeline(
        config.data,
        tokenizer=tokenizer,
        image_size=config.model.vision.image_size,
        num_image_tokens=config.model.num_image_tokens,
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
    )


def _load_tokenizer(weights: ModelSource) -> Tokenizer:
    if not weights.tokenizer_path:
        raise ConfigError(
            "No tokenizer: set init.tokenizer to a tokenizer.model or a directory that holds one."
        )
    tokenizer = load_tokenizer(weights.tokenizer_path)
    if tokenizer.vocab_size > weights.config.text.vocab_size:
        raise ConfigError(
            f"The tokenizer {weights.tokenizer_path} has {tokenizer.vocab_size} tokens, the model's embedding only "
            f"model.text.vocab_size={weights.config.text.vocab_size}; use the tokenizer that belongs to the decoder."
        )
    return tokenizer


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
            f"{path} was trained on other data: the records, the tokenizer or the data settings have changed since. "
            "Restore them, or start anew with another --workdir."
        )
    assert found["num_steps"] == expected["num_steps"], (found, expected)


def _stage_results(stage: str, num_steps: int, rows: list[dict]) -> dict[str, float]:
    rows = [row for row in rows if row.get("stage", "") == stage]
    seconds = sum(row["seconds"] for row in rows)
    return {
        "train_loss": float(np.mean([row["loss"] for row in rows])),
        "train_runtime": seconds,
        "train_steps_per_second": num_steps / seconds,
        "steps": num_steps,
        "epoch": rows[-1]["epoch"],
    }


def _print_plan(
    stage: str, config: Config, pipeline: Pipeline, shapes: dict, num_steps: int, saved_step
) -> None:
    """What trains, on what, at which rate."""
    summary = pipeline.summary()
    print(
        f"{stage or config.name}: {num_steps} steps of {config.data.batch_size} rows from {summary['samples']:,} samples "
        f"({summary['samples_text_only']:,} text only, {summary['samples_truncated']:,} truncated)"
        + (f", continuing after step {saved_step}" if saved_step else ""),
        flush=True,
    )
    rates = learning_rates(config.optimizer)
    for prefix, module in MODULES.items():
        count = sum(math.prod(leaf.shape) for name, leaf in shapes.items() if name.startswith(prefix))
        how = f"trains at {rates[module]:g}" if getattr(config.tune, module) else "frozen"
        print(f"  {module:<15} {count:>15,} parameters  {how}", flush=True)


def _export(weights: ModelSource, config: Config, directory: Path) -> None:
    if directory.exists():
        return
    write_hf(
        directory,
        layout=config.export.layout,
        model=weights.config,
        read=weights.read,
        set_aside=weights.set_aside(),
        tokenizer_path=weights.tokenizer_path,
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
        dtype=config.export.dtype,
    )
