"""Trains one stage: from weights and data to a saved state, or on from where an earlier run stopped."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.agreement import Agreement
from llava_jax.answer_samples import AnswerSamples
from llava_jax.checkpoint import Checkpoints, read_meta, saved_steps, step_of
from llava_jax.compiler import Compilations
from llava_jax.config import Config
from llava_jax.continuation import evaluated_sets, facts, require_same, require_training_state
from llava_jax.convert.source import ModelSource
from llava_jax.data.pipeline import Pipeline
from llava_jax.errors import StoppedError
from llava_jax.interruption import StopRequest
from llava_jax.metrics import MetricsLog
from llava_jax.optimizer import averaged_parameters, described
from llava_jax.planning.chips import peak_flops
from llava_jax.processes import exchange, from_first
from llava_jax.profiling import StepProfiler
from llava_jax.program import Program
from llava_jax.recorder import Recorder
from llava_jax.results import evaluations, training_results, where_time_went
from llava_jax.sharding import place_batch
from llava_jax.step import TrainState
from llava_jax.trainer_state import trainer_state, write_trainer_state
from llava_jax.tuning import kernel_name, table
from llava_jax.validation import Validation
from llava_jax.watchdog import Watchdog
from llava_jax.weights import before_stage, load


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe, its data checked. The only stage of an ordinary recipe is called ''."""

    name: str
    config: Config
    pipeline: Pipeline
    evaluations: dict[str, Pipeline]  # data that is kept out of training, by name
    checkpoints: Path
    samples: AnswerSamples | None = None  # asked at every evaluation

    @property
    def num_steps(self) -> int:
        train = self.config.train
        return train.max_steps or math.ceil(train.num_epochs * self.pipeline.steps_per_epoch)

    def rows(self, log: MetricsLog) -> list[dict]:
        """What is logged of this stage."""
        return [row for row in log.rows() if row.get("stage", "") == self.name]

    def write_state(
        self, log: MetricsLog, step: int, validation: Validation, results: dict | None = None
    ) -> None:
        """Writes trainer_state.json as it is after `step`, with the results of a stage that has ended."""
        best = validation.best()
        state = trainer_state(
            self.config,
            [row for row in self.rows(log) if row["step"] <= step],
            step=step,
            num_steps=self.num_steps,
            steps_per_epoch=self.pipeline.steps_per_epoch,
            best=best and (*best, self.checkpoints / str(best[0])),
            results=results,
        )
        write_trainer_state(log, self.name, state)


def train_stage(stage: Stage, weights: ModelSource, mesh: Mesh, log: MetricsLog) -> dict[str, float]:
    """Trains a stage to its last step, which is saved, and returns its results.

    What an earlier run did of it, evaluation included, is not done again. `weights` is the model before the stage.
    Raises CheckpointError when no checkpoint can be continued or the last one not be written, DivergedError when
    losses are no longer numbers, StoppedError when a signal asked for it.
    """
    watchdog = Watchdog(stage.config.train.hang_timeout_minutes)
    checkpoints = Checkpoints(stage.checkpoints, stage.config.checkpoint, watchdog)
    spent = {}
    try:
        start = checkpoints.starting_point(stage.num_steps)
        first_step = step_of(start) if start else 0
        evaluated = evaluated_sets(stage.evaluations, start)
        rows = [row for row in stage.rows(log) if evaluated["since"] < row["step"] <= first_step]
        history = from_first("the evaluations so far", list(evaluations(rows).items()))
        validation = Validation(stage.config.train, stage.evaluations, stage.num_steps, dict(history))
        if not (start and validation.has_ended(first_step, read_meta(start))):
            if start and first_step < stage.num_steps:
                require_training_state(start)
            program = Program(stage.config, mesh, stage.num_steps)
            _print_plan(stage, program, first_step)
            spent = _train(
                stage,
                program,
                before_stage(weights, stage.config),
                log,
                checkpoints,
                start,
                validation,
                evaluated,
            )
    finally:
        checkpoints.close()
        watchdog.close()
    results = _results(stage, stage.rows(log), spent)
    if results["steps"] < stage.num_steps and validation.has_stalled():
        results["stopped_early_after"] = validation.ranking()[0]
    stage.write_state(log, results["steps"], validation, results)
    return results


def _train(
    stage: Stage,
    program: Program,
    weights: ModelSource,
    log: MetricsLog,
    checkpoints: Checkpoints,
    start: Path | None,
    validation: Validation,
    evaluated: dict,
) -> dict[str, float]:
    """Trains and evaluates what is left to do. -> seconds of what no row tells."""
    config = stage.config
    frozen, checksums = _load_frozen(weights, program)
    meta = facts(config, stage.pipeline, checksums, evaluated)
    if start:
        require_same(start, meta)
    first_step = step_of(start) if start else 0
    for pipeline in (stage.pipeline, *stage.evaluations.values()):
        pipeline.bad_samples.write()
    recorder = Recorder(
        stage.name,
        config,
        stage.pipeline,
        log,
        first_step,
        stage.num_steps,
        checkpoints.watchdog,
        _peak_flops(program.mesh),
    )
    loop = Loop(stage, program, frozen, checkpoints, meta, recorder, validation)
    if start and not read_meta(start)["optimizer"]:  # the last one, of which only the evaluation is missing
        loop.evaluate(first_step, checkpoints.restore_parameters(start, program.abstract_trainable()))
        return {}
    if start:
        state = checkpoints.restore(start, program.abstract_state())
        checkpoints.set_aside_after(start)
    else:
        trainable = load(weights, program.abstract_trainable(), jnp.float32, program.parameter_sharding)
        state = program.new_state(trainable)
    log.forget_after(stage.name, first_step)
    if stage.samples:
        stage.samples.forget_after(first_step)
    stage.write_state(log, first_step, validation)
    loop.run(state, first_step)
    return dict(recorder.spent)


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


class Loop:
    """Trains a stage from one of its steps to the last, evaluates and saves what is due."""

    def __init__(
        self,
        stage: Stage,
        program: Program,
        frozen: dict[str, jax.Array],
        checkpoints: Checkpoints,
        meta: dict,
        recorder: Recorder,
        validation: Validation,
    ):
        self.stage = stage
        self.program = program
        self.frozen = frozen
        self.checkpoints = checkpoints
        self.meta = meta
        self.recorder = recorder
        self.validation = validation
        self.keeps_best = stage.config.train.load_best_model_at_end
        if self.keeps_best:
            checkpoints.ranking = validation.ranking()

    def evaluate(self, step: int, trainable: dict[str, jax.Array]) -> None:
        """Evaluates the parameters after a step, logs it and says which checkpoint is worth keeping."""
        parameters, watchdog = trainable | self.frozen, self.checkpoints.watchdog
        since = time.monotonic()
        figures = self.validation.measure(step, self.program, parameters, watchdog)
        answers = []
        if self.stage.samples:
            with watchdog.waiting(f"answers after step {step:,}"):
                answers = self.stage.samples.answer(step, parameters, self.program.mesh)
        figures |= {"eval_runtime": time.monotonic() - since}
        self.recorder.log_evaluation(step, figures, answers)
        if self.keeps_best:
            self.checkpoints.ranking = self.validation.ranking()

    def run(self, state: TrainState, first_step: int) -> None:
        """Trains from after `first_step` on. The stage ends with its last step, or when evaluations have stalled."""
        num_steps, watchdog = self.stage.num_steps, self.checkpoints.watchdog
        if self.validation.is_due(first_step):  # a signal came before it
            self.evaluate(first_step, _averaged(state).trainable)
        if first_step == num_steps or self.validation.has_stalled():
            if self.keeps_best:
                self._save(state, first_step, ended=True)
            return
        save_interval = self.stage.config.checkpoint.save_interval(num_steps)
        train_step = self.program.train_step()
        agree = Agreement(self.program.mesh)
        batches = self.stage.pipeline.iterate(first_step, num_steps)
        profiler = StepProfiler(self.stage.config.train.profiled, self._trace_directory())
        request, counts, closing = StopRequest(), Compilations(), contextlib.closing
        with closing(request), closing(profiler), closing(counts):
            for step in range(first_step + 1, num_steps + 1):
                profiler.before(step)
                before = time.monotonic()
                with watchdog.waiting(f"the batch of step {step}"):
                    batch = next(batches)
                # As long as the device still computes the step before, it does not wait.
                data_wait = time.monotonic() - before if state.step.is_ready() else 0.0
                state, metrics = self._call(train_step, state, batch, counts)
                profiler.after(step, metrics)
                if (
                    step == first_step + 1
                ):  # compiled; until here nothing is lost if a signal ends the process
                    request.listen()
                self.recorder.add(step, metrics, data_wait)
                stop, minutes_passed = agree(request.asked, self.checkpoints.is_due())
                if not stop and self.validation.is_due(step):
                    self.recorder.flush()
                    self.evaluate(step, _averaged(state).trainable)
                best = self.checkpoints.ranking[:1] == [step]
                ended = step == num_steps or self.validation.has_stalled()
                if stop or minutes_passed or step % save_interval == 0 or best or ended:
                    self.recorder.flush()  # a run that continues from here has told all that came before
                    self._save(state, step, stop=stop, ended=ended)
                if stop:
                    raise StoppedError(
                        f"Stopped after step {step:,}, which is saved; the same command continues."
                    )
                if ended:
                    break
        if step < num_steps:
            best, metric = self.validation.ranking()[0], self.stage.config.train.metric_for_best_model
            print(
                f"{self.stage.name or 'The run'} stops early, after step {step:,} of {num_steps:,}: no evaluation since "
                f"step {best:,} had a better {metric} (train.early_stopping_patience).",
                flush=True,
            )

    def _save(self, state: TrainState, step: int, *, stop: bool = False, ended: bool = False) -> None:
        """Saves the state after a step. The stage's last one is waited for, and has the best parameters if asked."""
        meta = self.meta | {"step": step}
        with self.recorder.spending("checkpoint"):
            if not stop and (ended or self.stage.config.checkpoint.save_only_model):
                trained, state = state, _averaged(state)  # nothing is trained further from here
                meta["averaged"] = state is not trained
            if ended and not stop:
                best = self._best(step)
                meta["evaluated_as"] = best
                state = self._with_parameters_of(best, step, state)
            # What ends before its time is told from what can be continued by its evaluations, so it must be whole.
            whole = stop or (ended and step < self.stage.num_steps)
            self.checkpoints.save(state, meta, whole=whole)
            if stop or ended:
                self.checkpoints.finish()
        self.stage.write_state(self.recorder.log, step, self.validation)

    def _best(self, step: int) -> int:
        """The step whose parameters the stage ends with."""
        if not self.keeps_best:
            return step
        ranking = self.validation.ranking()
        best = next(s for s in ranking if s == step or self.checkpoints.is_good(s))
        if best != ranking[0]:
            print(
                f"The checkpoint of the best evaluation, {ranking[0]}, is not there; {best} is the next best."
            )
        return best

    def _with_parameters_of(self, best: int, step: int, state: TrainState) -> TrainState:
        if best == step:
            return state
        metric = self.stage.config.train.metric_for_best_model
        print(
            f"{self.stage.name or 'The run'} ends with the parameters of step {best}, whose {metric} "
            f"{self.validation.history[best][metric]:.4f} is the best.",
            flush=True,
        )
        path, abstract = self.checkpoints.directory / str(best), self.program.abstract_state()
        if averaged_parameters(state.opt_state) is not None and read_meta(path)["optimizer"]:
            trainable = self.checkpoints.restore_average(path, abstract)  # which was evaluated
        else:
            trainable = self.checkpoints.restore_parameters(path, abstract.trainable)
        return dataclasses.replace(state, trainable=trainable)

    def _call(
        self, train_step: Callable, state: TrainState, batch: dict[str, np.ndarray], counts: Compilations
    ):
        """A step. The first with a shape compiles; any other only hands over work."""
        placed = place_batch(self.program.mesh, batch)
        began, num_programs, num_found = time.monotonic(), counts.num_programs, counts.num_found
        result = train_step(state, self.frozen, placed)
        if counts.num_programs > num_programs:
            shape = batch["tokens"].shape[-1], batch["images"].shape[2]
            self.recorder.log_compilation(shape, time.monotonic() - began, counts.num_found > num_found)
        return result

    def _trace_directory(self) -> Path:
        return self.recorder.log.path.parent / "profile" / self.stage.name


def _averaged(state: TrainState) -> TrainState:
    """The state with the moving average of its parameters, where `optimizer.ema_decay` keeps one, in their place."""
    average = averaged_parameters(state.opt_state)
    if average is None:
        return state
    shardings = jax.tree.map(lambda parameter: parameter.sharding, state.trainable)
    return dataclasses.replace(state, trainable=jax.device_put(average, shardings))


def _peak_flops(mesh: Mesh) -> float | None:
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.size


def _print_plan(stage: Stage, program: Program, saved_step: int) -> None:
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
    shapes = stage.pipeline.schedule.shapes(saved_step // stage.pipeline.steps_per_epoch)
    listed = ", ".join(f"{length} x {images}" for length, images in shapes)
    print(f"  an epoch's rows of tokens x images: {listed}; each shape is compiled once", flush=True)
    for line in table(config, program.abstract_trainable(), program.abstract_frozen()):
        print(f"  {line}", flush=True)
    print(f"  {described(config.optimizer)}", flush=True)


def _results(stage: Stage, rows: list[dict], spent: dict[str, float]) -> dict[str, float]:
    """spent: seconds that no row tells."""
    if not any("loss" in row for row in rows):  # somebody deleted the log of a finished stage
        return {"steps": stage.num_steps}
    last = saved_steps(stage.checkpoints)[-1]
    chosen = read_meta(stage.checkpoints / str(last)).get("evaluated_as", last)
    best = {"best_step": chosen} if stage.config.train.load_best_model_at_end else {}
    figures = evaluations(rows).get(chosen, {})
    figures = {key: value for key, value in figures.items() if key != "eval_runtime"}
    return training_results(rows) | where_time_went(rows, spent) | best | figures
