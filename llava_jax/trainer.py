"""Runs a recipe: its stages in order, then evaluation, export and the report."""

import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax import report
from llava_jax.answer_samples import AnswerSamples
from llava_jax.checkpoint import saved_steps
from llava_jax.compiler import keep_compiled
from llava_jax.config import Config, ConfigError, one_of
from llava_jax.config_values import to_json
from llava_jax.convert.adapter_export import ADAPTER_LAYOUTS, write_adapter
from llava_jax.convert.export import check_layout, write_hf
from llava_jax.convert.source import ModelSource
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer, require_room
from llava_jax.errors import CheckpointError
from llava_jax.final_evaluation import answer_at_end, check_asked
from llava_jax.metrics import Counter, MetricsLog
from llava_jax.model_card import write_model_card
from llava_jax.planning.out_of_memory import explain_out_of_memory
from llava_jax.planning.remat import settle
from llava_jax.processes import agree, code_version, from_first, is_first, together, wait_for_all
from llava_jax.recipe import Recipe, naming_stage
from llava_jax.reporting import check_reporters, open_reporters
from llava_jax.run_adapter import check_adapter, open_run_adapter
from llava_jax.run_directory import flatten, open_run_directory
from llava_jax.sharding import check_model, make_mesh, own_rows
from llava_jax.stage import Stage, train_stage
from llava_jax.step import abstract_model
from llava_jax.tuning import check_images
from llava_jax.validation import metric_names
from llava_jax.weights import after_stage, checkpoint_directory, initial_weights


def run(recipe: Recipe, workdir: Path) -> None:
    """Trains every stage of a recipe in `workdir`, or continues where an earlier run of it stopped."""
    keep_compiled(recipe.last.train.compiled_dir)
    with together("preparing"):
        if recipe.prepare and is_first():
            recipe.prepare()
    # Everything that can be found wrong is found here, before any training time is spent.
    with together("checking"):
        if recipe.prepare and not is_first():
            recipe.prepare()  # which finds all done, unless the directory is another one here
        last = recipe.last
        mesh = make_mesh(last.mesh)
        check_model(
            mesh, last.model, {name: leaf.shape for name, leaf in abstract_model(last.model)[1].items()}
        )
        print(_devices(mesh), flush=True)
        weights = initial_weights(recipe.first)
        tokenizer = _load_tokenizer(weights)
        for config in recipe.stages.values():
            check_reporters(config)
        stages = []
        for name, config in recipe.stages.items():
            with naming_stage(name):
                stages.append(_make_stage(name, config, tokenizer, mesh, workdir))
        check_asked(stages, tokenizer)
        if last.export.layout in ADAPTER_LAYOUTS:
            check_adapter(recipe.stages, last.export.layout)
        elif last.export.layout:
            check_layout(last.model, last.export.layout)
    devices = {"the number of devices": jax.local_device_count()}
    agree(code_version() | devices | _settings(recipe) | _fingerprints(stages))
    with _open_run_directory(recipe, workdir):
        _run_stages(recipe, stages, weights, tokenizer, mesh, workdir)


def _devices(mesh: Mesh) -> str:
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{processes}, mesh {sizes}"


# What may differ between the processes of a run: the fingerprint tells whether they read the same data.
_LOCAL_SETTINGS = (
    "data.path",
    "data.image_folder",
    "data.dataset_dir",
    "data.eval_path",
    "data.cache_dir",
    "train.compiled_dir",
    "init.",
)


def _settings(recipe: Recipe) -> dict[str, object]:
    return {
        key: value
        for key, value in flatten({name: to_json(config) for name, config in recipe.stages.items()}).items()
        if not key.partition("/")[2].startswith(_LOCAL_SETTINGS)
    }


def _fingerprints(stages: list[Stage]) -> dict[str, str]:
    facts = {}
    for stage in stages:
        what = f"the data of {stage.name or 'the run'}"
        facts[what] = stage.pipeline.fingerprint
        for name, data in stage.evaluations.items():
            facts[f"{what} for evaluation {name}".strip()] = data.fingerprint
    return facts


@contextlib.contextmanager
def _open_run_directory(recipe: Recipe, workdir: Path) -> Iterator[None]:
    """Holds the run directory; process 0 does it for all."""
    with contextlib.ExitStack() as held:
        with together("opening the run directory"):
            if is_first():
                held.enter_context(open_run_directory(recipe, workdir))
        token = from_first("the run directory's token", secrets.token_hex())
        seen = workdir / ".seen"
        with together("writing into the run directory"):
            if is_first():
                seen.write_text(token)
        with together("looking for the run directory"):
            if not seen.exists() or seen.read_text() != token:
                raise ConfigError(
                    f"{workdir} is not the directory that process 0 has opened under this name; --workdir must lie on "
                    "storage that all hosts share (NFS, Filestore, a mounted bucket)."
                )
        if is_first():
            seen.unlink()
        yield


def _run_stages(
    recipe: Recipe, stages: list[Stage], weights: ModelSource, tokenizer: Tokenizer, mesh: Mesh, workdir: Path
) -> None:
    last = recipe.last
    log = MetricsLog(workdir / "metrics.jsonl", read_only=not is_first())
    results = {}
    for stage in stages:
        stage = _with_remat(stage, mesh, workdir)
        with (
            explain_out_of_memory(stage.config, mesh, stage.pipeline.shapes(0, stage.num_steps)),
            _reporting(stage, log, workdir),
        ):
            results[stage.name] = train_stage(stage, weights, mesh, log)
        # Training has verified its checkpoint, or just written it.
        before, weights = weights, after_stage(weights, stage.config, stage.checkpoints, verify=False)
    if is_first():
        report.write_training(workdir, results, log.rows())
    answer_at_end(stages[-1], before, tokenizer, mesh, workdir)
    if is_first():
        write_model_card(workdir, recipe, {stage.name: stage.pipeline.summary() for stage in stages})
        if last.export.layout:
            _export(weights, last, workdir)
    print(f"Done: {workdir}", flush=True)
    wait_for_all("the end of the run", timeout=6 * 3600.0)  # process 0 may have an export to write


def _with_remat(stage: Stage, mesh: Mesh, workdir: Path) -> Stage:
    """The stage, with train.remat="auto" replaced by what that means on these devices."""
    if stage.config.train.remat != "auto":
        return stage
    config = settle(
        stage.config,
        mesh,
        stage.num_steps,
        max(stage.pipeline.shapes(0, stage.num_steps)),
        stage=stage.name,
        record=workdir / "remat.json",
        continues=bool(saved_steps(stage.checkpoints)),
    )
    return dataclasses.replace(stage, config=config)


@contextlib.contextmanager
def _reporting(stage: Stage, log: MetricsLog, workdir: Path) -> Iterator[None]:
    """While the stage trains, what it logs is also told to those whom train.report_to names; process 0 does it."""
    with contextlib.ExitStack() as opened:
        if is_first():
            log.reporters = open_reporters(stage.config, stage.name, workdir)
            for reporter in log.reporters:
                opened.callback(reporter.close)
        yield
    log.reporters = []


def _make_stage(name: str, config: Config, tokenizer: Tokenizer, mesh: Mesh, workdir: Path) -> Stage:
    training, evaluations = open_datasets(config.data, config.seed)
    one_of(
        "train.metric_for_best_model", config.train.metric_for_best_model, tuple(metric_names(evaluations))
    )
    make = partial(
        Pipeline,
        config.data,
        tokenizer=tokenizer,
        images=ImageProcessor.from_config(config.data, config.model),
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
        own_rows=own_rows(mesh, config.data.batch_size // config.train.accumulation_steps),
        progress=Counter(f"{name} measuring samples:".strip()),
    )
    suffix = f"_{name}" if name else ""
    if not is_first():
        suffix += f"_process_{jax.process_index()}"
    pipeline = make(training, report=workdir / f"bad_samples{suffix}.jsonl")
    check_images(config, pipeline.summary()["images"])
    sets = {
        own: make(data, report=workdir / f"bad_evaluation_samples{own and f'_{own}'}{suffix}.jsonl")
        for own, data in evaluations.items()
    }
    samples = None
    if config.evaluate.samples and sets:
        samples = AnswerSamples(config, sets, tokenizer, workdir / "answers" / name)
    stage = Stage(name, config, pipeline, sets, checkpoint_directory(workdir, name), samples)
    if stage.num_steps >= 2**31:
        raise ConfigError(
            f"{stage.num_steps:,} steps are more than can be counted; lower train.max_steps or num_epochs."
        )
    profiled = config.train.profiled
    if profiled and profiled.start > stage.num_steps:
        raise ConfigError(
            f"train.profile_steps={config.train.profile_steps} begins after the last of {stage.num_steps:,} steps; "
            "nothing would be traced."
        )
    return stage


def _load_tokenizer(weights: ModelSource) -> Tokenizer:
    if not weights.tokenizer_path:
        raise ConfigError(
            "No tokenizer: set init.tokenizer to a tokenizer.model or a directory that holds one."
        )
    tokenizer = load_tokenizer(weights.tokenizer_path, weights.config.extra_tokens)
    require_room(tokenizer, weights.config.text.vocab_size)
    return tokenizer


def _export(weights: ModelSource, config: Config, workdir: Path) -> None:
    directory = workdir / "export"
    try:
        _write_export(weights, config, workdir, directory)
    except OSError as error:
        raise CheckpointError(
            f"The export {directory} could not be written ({error.strerror}). Make room there and run the same command "
            "again; what was trained is saved."
        ) from error


def _write_export(weights: ModelSource, config: Config, workdir: Path, directory: Path) -> None:
    if directory.exists():  # of an earlier end of this run, perhaps with other settings
        shutil.rmtree(directory)
    if config.export.layout in ADAPTER_LAYOUTS:
        adapter = open_run_adapter(workdir)
        write_adapter(directory, adapter, layout=config.export.layout, dtype=config.export.dtype)
        return
    write_hf(
        directory,
        layout=config.export.layout,
        model=weights.config,
        read=weights.leaves.__getitem__,
        set_aside=weights.set_aside(),
        tokenizer_path=weights.tokenizer_path,
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
        dtype=config.export.dtype,
    )
