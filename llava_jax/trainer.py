"""Runs a recipe: its stages in order, then evaluation, export and the report."""

import shutil
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from llava_jax import report
from llava_jax.config import Config, ConfigError
from llava_jax.convert.adapter_export import ADAPTER_LAYOUTS, write_adapter
from llava_jax.convert.export import check_layout, write_hf
from llava_jax.convert.source import ModelSource
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer, require_room
from llava_jax.evaluation import check_questions, draw_samples, evaluate
from llava_jax.generation import Generator
from llava_jax.metrics import Counter, MetricsLog
from llava_jax.recipe import Recipe
from llava_jax.run_adapter import check_adapter, open_run_adapter
from llava_jax.run_directory import open_run_directory
from llava_jax.sharding import make_mesh, num_row_shards
from llava_jax.stage import Stage, train_stage
from llava_jax.weights import after_stage, checkpoint_directory, initial_weights


def run(recipe: Recipe, workdir: Path) -> None:
    """Trains every stage of a recipe in `workdir`, or continues where an earlier run of it stopped."""
    if recipe.prepare:
        recipe.prepare()
    # Everything that can be found wrong is found here, before any training time is spent.
    last = recipe.last
    mesh = make_mesh(last.mesh)
    weights = initial_weights(recipe.first)
    tokenizer = _load_tokenizer(weights)
    stages = [_make_stage(name, config, tokenizer, mesh, workdir) for name, config in recipe.stages.items()]
    if last.evaluate.path:
        check_questions(last, tokenizer)
    if last.export.layout in ADAPTER_LAYOUTS:
        check_adapter(last)
    elif last.export.layout:
        check_layout(last.model, last.export.layout)
    with open_run_directory(recipe, workdir):
        _run_stages(recipe, stages, weights, tokenizer, mesh, workdir)


def _run_stages(
    recipe: Recipe, stages: list[Stage], weights: ModelSource, tokenizer: Tokenizer, mesh: Mesh, workdir: Path
) -> None:
    last = recipe.last
    log = MetricsLog(workdir / "metrics.jsonl")
    results = {}
    for stage in stages:
        results[stage.name] = train_stage(stage, weights, mesh, log)
        weights = after_stage(weights, stage.config, stage.checkpoints)
    report.write_training(workdir, results, log.rows())
    if last.evaluate.path:
        generator = Generator(weights, tokenizer, mesh, template=last.data.template, dtype=last.train.dtype)
        evaluation, answered = evaluate(generator, last.evaluate)
        report.write_evaluation(workdir, evaluation, answered)
        draw_samples(answered, last.evaluate.image_folder, workdir / "samples.png")
        print("\n".join(f"{name:<28} {value:.4g}" for name, value in evaluation.items()), flush=True)
    report.write_model_card(workdir, recipe, {stage.name: stage.pipeline.summary() for stage in stages})
    if last.export.layout:
        _export(weights, last, workdir)
    print(f"Done: {workdir}", flush=True)


def _make_stage(name: str, config: Config, tokenizer: Tokenizer, mesh: Mesh, workdir: Path) -> Stage:
    rows, shards = config.data.batch_size // config.train.accumulation_steps, num_row_shards(mesh)
    if rows % shards:
        raise ConfigError(
            f"data.batch_size / train.accumulation_steps = {rows} rows cannot be spread evenly over the mesh's {shards} "
            f"row shards (mesh.data x mesh.fsdp); choose a multiple of {shards}."
        )
    training, evaluation = open_datasets(config.data, config.seed)
    make = partial(
        Pipeline,
        config.data,
        tokenizer=tokenizer,
        images=ImageProcessor.from_config(config.data, config.model),
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
        progress=Counter(f"{name} measuring samples:".strip()),
    )
    suffix = f"_{name}" if name else ""
    return Stage(
        name,
        config,
        make(training, report=workdir / f"bad_samples{suffix}.jsonl"),
        make(evaluation, report=workdir / f"bad_evaluation_samples{suffix}.jsonl") if evaluation else None,
        checkpoint_directory(workdir, name),
    )


def _load_tokenizer(weights: ModelSource) -> Tokenizer:
    if not weights.tokenizer_path:
        raise ConfigError(
            "No tokenizer: set init.tokenizer to a tokenizer.model or a directory that holds one."
        )
    tokenizer = load_tokenizer(weights.tokenizer_path)
    require_room(tokenizer, weights.config.text.vocab_size)
    return tokenizer


def _export(weights: ModelSource, config: Config, workdir: Path) -> None:
    directory = workdir / "export"
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
