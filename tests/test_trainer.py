"""Whole runs of tiny recipes: what trains, what is written, and that a broken run continues with the same bits."""

import dataclasses
import errno
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llava_jax import stage as stage_module
from llava_jax import trainer
from llava_jax.checkpoint import Checkpoints, saved_steps
from llava_jax.convert.opening import open_model
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.errors import CheckpointError, ConfigError, DataError, DivergedError, InUseError
from llava_jax.generation import load_generator
from llava_jax.recipe import STAGE_SECTIONS, default_config, parse
from llava_jax.run_directory import open_run_directory
from llava_jax.saved_parameters import SavedParameters
from llava_jax.sharding import make_mesh
from llava_jax.weights import initial_weights, open_any, open_run


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def parameters(workdir, stage="") -> dict[str, np.ndarray]:
    directory = workdir / "checkpoints" / stage
    leaves = SavedParameters(directory, saved_steps(directory)[-1]).leaves()
    return {name: leaf.read() for name, leaf in leaves.items()}


def as_stages(recipe, shapes_dataset):
    """The recipe's settings as two stages: projector alone on captions, then projector and decoder."""
    config = default_config("pretrain", "finetune")
    for key in recipe:
        if key not in STAGE_SECTIONS:
            config[key] = recipe[key]
    for stage in config.stages.values():
        for section in STAGE_SECTIONS:
            stage[section].update(recipe[section].to_dict())
        stage.train.max_steps = 2
    config.stages.pretrain.data.update(path=f"{shapes_dataset}/pretrain.json", template="plain")
    config.stages.pretrain.tune.language_model = "frozen"
    return config


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def run_until_saved(recipe, workdir, monkeypatch, step: int) -> None:
    """Runs until the checkpoint of `step` is on disk, then dies."""

    def save_and_die(self, state, meta, **how):
        original(self, state, meta, **how)
        if meta["step"] == step:
            self.finish()
            raise Killed

    original = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            trainer.run(recipe, workdir)


def test_a_broken_run_continues_with_the_same_bits(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.checkpoint.save_steps = 2
    tiny_recipe.optimizer.max_grad_norm = 1.0
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path / "whole")
    run_until_saved(recipe, tmp_path / "broken", monkeypatch, step=2)
    assert saved_steps(tmp_path / "broken/checkpoints") == [2]
    with (tmp_path / "broken/metrics.jsonl").open(
        "a"
    ) as file:  # steps logged after the checkpoint are forgotten
        file.write(json.dumps({"step": 3, "loss": 99.0}) + "\n")
    trainer.run(recipe, tmp_path / "broken")

    whole, broken = metrics(tmp_path / "whole"), metrics(tmp_path / "broken")
    assert [row["step"] for row in broken] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "learning_rate", "num_supervised_tokens"):
        assert [row[key] for row in broken] == [row[key] for row in whole], key
    expected = parameters(tmp_path / "whole")
    found = parameters(tmp_path / "broken")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def test_stage_1_trains_the_projector_alone_and_frozen_weights_stay_bit_identical(tiny_recipe, tmp_path):
    tiny_recipe.tune.language_model = "frozen"
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path)
    before, after = initial_weights(recipe.first), open_run(tmp_path)
    trained = parameters(tmp_path)
    assert sorted(trained) == [
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("bias", "kernel")
    ]
    for name in before.names():
        assert np.array_equal(before.read(name), after.read(name)) == (name not in trained), name


def test_checkpoints_and_moments_exist_only_for_what_trains(tiny_recipe, tmp_path):
    tiny_recipe.tune.language_model = "frozen"
    trainer.run(parse(tiny_recipe), tmp_path)
    size = sum(value.nbytes for value in parameters(tmp_path).values())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(tmp_path / "checkpoints/4/state").item_metadata.tree
    arrays = [leaf for leaf in jax.tree.leaves(stored) if leaf.shape]
    assert (
        sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in arrays) == 3 * size
    )  # and two moments each


def test_stages_follow_each_other_and_a_finished_recipe_is_not_trained_again(
    tiny_recipe, shapes_dataset, tmp_path, monkeypatch
):
    recipe = parse(as_stages(tiny_recipe, shapes_dataset))
    trainer.run(recipe, tmp_path)
    assert [(row["stage"], row["step"]) for row in metrics(tmp_path)] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("finetune", 1),
        ("finetune", 2),
    ]
    states = [
        json.loads((tmp_path / name).read_text())
        for name in ("trainer_state_pretrain.json", "trainer_state_finetune.json", "trainer_state.json")
    ]
    assert [[row["step"] for row in state["log_history"]] for state in states] == [[1, 2, 2]] * 3
    assert states[0] != states[1] == states[2]
    first, second = parameters(tmp_path, "pretrain"), parameters(tmp_path, "finetune")
    assert first.keys() < second.keys()
    assert not np.array_equal(
        first["multi_modal_projector.linear_1.kernel"], second["multi_modal_projector.linear_1.kernel"]
    )
    # The second stage starts where the first ended: one step at rate 0, so its loss is of the first's projector.
    monkeypatch.setattr(stage_module, "_train", None)  # a second run that trained would fail
    trainer.run(recipe, tmp_path)


def test_a_fresh_projector_replaces_the_trained_one(tiny_recipe, shapes_dataset, tmp_path):
    config = as_stages(tiny_recipe, shapes_dataset)
    config.stages["finetune"].tune.fresh_projector = True
    config.stages["finetune"].train.max_steps = 1  # at rate 0: it ends as it began
    trainer.run(parse(config), tmp_path)
    name = "multi_modal_projector.linear_1.kernel"
    start = initial_weights(parse(config).first).read(name)
    first, second = parameters(tmp_path, "pretrain")[name], parameters(tmp_path, "finetune")[name]
    assert np.abs(first - start).max() < 0.1 * np.abs(first - second).max()


def test_accumulation_takes_the_same_steps_as_the_big_batch(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path / "big")
    tiny_recipe.train.accumulation_steps = 4
    trainer.run(parse(tiny_recipe), tmp_path / "parts")
    for key in ("loss", "grad_norm", "num_supervised_tokens"):
        found, expected = ([row[key] for row in metrics(tmp_path / name)] for name in ("parts", "big"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_sharded_run_takes_the_steps_of_one_device_and_its_checkpoint_continues_there(
    tiny_recipe, tmp_path, monkeypatch
):
    tiny_recipe.checkpoint.save_steps = 2
    trainer.run(parse(tiny_recipe), tmp_path / "one")
    sharded = tiny_recipe.copy_and_resolve_references()
    sharded.mesh.update(data=2, fsdp=2, tensor=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_mesh", make_mesh)
        run_until_saved(parse(sharded), tmp_path / "both", monkeypatch, step=2)
    trainer.run(parse(tiny_recipe), tmp_path / "both")
    found, expected = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("both", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_remat_and_unrolling_do_not_change_the_steps(tiny_recipe, tmp_path):
    tiny_recipe.train.max_steps = 2
    losses = []
    for i, (remat, unroll) in enumerate((("none", 1), ("dots", 1), ("full", 2))):
        tiny_recipe.train.update(remat=remat, scan_unroll=unroll)
        trainer.run(parse(tiny_recipe), tmp_path / str(i))
        losses.append([row["loss"] for row in metrics(tmp_path / str(i))])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)


def test_a_run_writes_its_files_evaluates_and_exports(tiny_recipe, shapes_dataset, tmp_path):
    tiny_recipe.evaluate.update(
        path=f"{shapes_dataset}/questions_test.jsonl",
        image_folder=f"{shapes_dataset}/images",
        batch_size=10,
        max_new_tokens=3,
        blind=True,
    )
    tiny_recipe.export.layout = "llava-hf"
    trainer.run(parse(tiny_recipe), tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {
        "train_loss",
        "steps",
        "eval_accuracy",
        "eval_accuracy_blind",
        "eval_accuracy_color",
    } <= results.keys()
    assert results["eval_samples"] == 24
    for name in (
        "config.json",
        "training_loss.png",
        "samples.png",
        "README.md",
        "train_results.json",
        "eval_results.json",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in predictions[:1]] == ["test_00000_color"]
    assert {"prediction", "blind_prediction", "answer"} <= predictions[0].keys()
    exported, trained = open_model(tmp_path / "export"), open_any(str(tmp_path))
    assert exported.layout == "llava-hf"
    for name in trained.names():
        assert np.array_equal(exported.read(name), trained.read(name)), name


def test_a_step_is_compiled_once_per_shape_and_found_by_the_next_run(tiny_recipe, tmp_path, capsys):
    tiny_recipe.train.update(compiled_dir=str(tmp_path / "compiled"), max_steps=6)
    tiny_recipe.checkpoint.save_steps = 2

    def compilations(workdir) -> list[int]:
        trainer.run(parse(tiny_recipe), workdir)
        rows = metrics(workdir)
        results = json.loads((workdir / "train_results.json").read_text())
        assert results["compilations"] == sum(row.get("compilations", 0) for row in rows)
        return [row.get("compilations", 0) for row in rows if "loss" in row]

    first = compilations(tmp_path / "first")
    assert first == [1, 0, 0, 0, 0, 0]
    assert "found compiled" not in capsys.readouterr().out
    assert compilations(tmp_path / "second") == first
    assert "found compiled in" in capsys.readouterr().out


def test_a_run_starts_from_another_run_and_from_its_projector(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path / "first")
    tiny_recipe.init.projector = str(tmp_path / "first")
    only_projector = initial_weights(parse(tiny_recipe).first)
    tiny_recipe.init.update(projector="", model=str(tmp_path / "first"), tokenizer="")
    whole = initial_weights(parse(tiny_recipe).first)
    trained = parameters(tmp_path / "first")
    for name, value in trained.items():
        assert np.array_equal(whole.read(name), value)
        assert np.array_equal(only_projector.read(name), value) == name.startswith("multi_modal_projector")
    assert whole.tokenizer_path.endswith("tokenizer.model")


def test_settings_of_a_run_with_checkpoints_cannot_change(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path)
    tiny_recipe.train.log_steps = 2  # changes nothing that is trained
    trainer.run(parse(tiny_recipe), tmp_path)
    tiny_recipe.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r": optimizer.learning_rate=0.5 \(was 0.001\)"):
        trainer.run(parse(tiny_recipe), tmp_path)


def test_a_run_of_a_version_without_a_setting_continues_with_its_default_alone(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for stage in written["stages"].values():
        del stage["loss"]["z_loss"]
    path.write_text(json.dumps(written))
    tiny_recipe.loss.z_loss = 0.1
    with pytest.raises(ConfigError, match=r"loss.z_loss=0.1 \(was 0.0\)"):
        trainer.run(parse(tiny_recipe), tmp_path)
    tiny_recipe.loss.z_loss = 0.0
    trainer.run(parse(tiny_recipe), tmp_path)


def test_damaged_settings_of_a_run_lose_none_of_its_checkpoints(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path / "first")
    (tmp_path / "first/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint=\S+/first/checkpoints/\[STAGE/\]STEP"):
        trainer.run(parse(tiny_recipe), tmp_path / "first")
    tiny_recipe.checkpoint.resume_from_checkpoint = str(tmp_path / "first/checkpoints/4")
    tiny_recipe.train.max_steps = 5
    trainer.run(parse(tiny_recipe), tmp_path / "second")
    assert [row["step"] for row in metrics(tmp_path / "second")] == [5]


def test_changed_data_is_not_mixed_into_a_run(tiny_recipe, tmp_path, monkeypatch):
    records = json.loads(Path(tiny_recipe.data.path).read_text())
    tiny_recipe.data.path = str(tmp_path / "records.json")
    (tmp_path / "records.json").write_text(json.dumps(records))
    tiny_recipe.checkpoint.save_steps = 2
    run_until_saved(parse(tiny_recipe), tmp_path / "run", monkeypatch, step=2)
    (tmp_path / "records.json").write_text(json.dumps(records[1:]))
    with pytest.raises(CheckpointError, match="was trained on other data"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_a_damaged_checkpoint_is_named(tiny_recipe, tmp_path, capsys):
    trainer.run(parse(tiny_recipe), tmp_path)
    (tmp_path / "checkpoints/4/state/manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints holds no good checkpoint"):
        open_run(tmp_path)
    assert re.search(r"checkpoints/4 is damaged .*manifest\.ocdbt", capsys.readouterr().err)


def test_a_foreign_directory_is_not_written_into(tiny_recipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no run"):
        trainer.run(parse(tiny_recipe), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tiny_recipe, tmp_path):
    tiny_recipe.optimizer.update(learning_rate=1e38, warmup_ratio=0.0)
    with pytest.raises(DivergedError, match=r"lower optimizer\.learning_rate"):
        trainer.run(parse(tiny_recipe), tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.path": "/nowhere.json"}, DataError, "'/nowhere.json': cannot be read"),
        ({"data.image_folder": "/nowhere"}, DataError, "image_folder='/nowhere' is no directory"),
        ({"data.max_length": 64, "data.too_long": "error"}, DataError, "exceed data.max_length=64"),
        ({"init.tokenizer": ""}, ConfigError, "set init.tokenizer"),
        ({"init.tokenizer": "/nowhere"}, DataError, "holds no tokenizer.model"),
        ({"init.model": "/nowhere"}, ConfigError, "init.model=/nowhere does not exist"),
        ({"model.text.vocab_size": 500}, ConfigError, "has 512 tokens, the model's embedding only"),
        ({"evaluate.path": "/nowhere.jsonl"}, DataError, "check evaluate.path"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    tiny_recipe, tmp_path, changes, error, message
):
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = tiny_recipe
        for part in sections:
            section = section[part]
        section[name] = value
    with pytest.raises(error, match=message):
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_spread_evenly_are_refused(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)
    tiny_recipe.mesh.fsdp = 8
    tiny_recipe.data.batch_size = 12
    with pytest.raises(ConfigError, match="12 rows cannot be spread evenly over the mesh's 8 row shards"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_a_checkpoint_of_another_architecture_names_the_keys(tiny_recipe, tmp_path):
    trainer.run(parse(tiny_recipe), tmp_path / "first")
    tiny_recipe.init.model = str(tmp_path / "first")
    tiny_recipe.model.text.num_hidden_layers = 3
    with pytest.raises(
        ConfigError, match=r"num_hidden_layers=2 \(config: 3\).*--config.model.text.num_hidden_layers=2"
    ):
        trainer.run(parse(tiny_recipe), tmp_path / "second")


def test_a_decoder_goes_on_with_longer_rows_where_the_run_has_them(tiny_recipe, tmp_path, capsys):
    trainer.run(parse(tiny_recipe), tmp_path / "first")
    tiny_recipe.init.update(model=str(tmp_path / "first"), tokenizer="")
    tiny_recipe.train.max_steps = 1
    tiny_recipe.model.text.max_position_embeddings = 320
    with pytest.raises(ConfigError, match=r"max_position_embeddings=256 \(config: 320\)"):
        trainer.run(parse(tiny_recipe), tmp_path / "second")  # no row needs them
    tiny_recipe.data.max_length = 300
    tiny_recipe.model.text.rope_scaling.update(rope_type="linear", factor=2.0)
    trainer.run(parse(tiny_recipe), tmp_path / "second")
    told = "The decoder has 256 positions; this run gives it 320, rotary scaling linear by 2."
    assert told in capsys.readouterr().out
    text = open_run(tmp_path / "second").config.text
    assert (text.max_position_embeddings, text.rope_scaling.factor) == (320, 2.0)


def test_two_processes_cannot_train_in_one_directory(tiny_recipe, tmp_path):
    recipe = parse(tiny_recipe)
    with (
        open_run_directory(recipe, tmp_path / "run"),
        pytest.raises(InUseError, match=r"is in use by process [0-9]+ on"),
    ):
        trainer.run(recipe, tmp_path / "run")
    trainer.run(recipe, tmp_path / "run")  # the lock ends with its holder


def test_frozen_weights_that_changed_are_noticed(tiny_recipe, tmp_path, monkeypatch):
    base = parse(tiny_recipe)
    trainer.run(base, tmp_path / "base")
    tiny_recipe.init.update(model=str(tmp_path / "base"), tokenizer="")
    tiny_recipe.tune.language_model = "frozen"
    tiny_recipe.checkpoint.save_steps = 2
    run_until_saved(parse(tiny_recipe), tmp_path / "run", monkeypatch, step=2)
    read = open_run(tmp_path / "run").read
    assert read("language_model.norm.scale").shape == (32,)

    shutil.rmtree(tmp_path / "base")
    trainer.run(
        dataclasses.replace(base, stages={"": dataclasses.replace(base.first, seed=7)}), tmp_path / "base"
    )
    with pytest.raises(CheckpointError, match="was trained with other frozen weights"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"language_model\.norm\.scale has changed since"):
        read("language_model.norm.scale")


def test_a_run_can_be_opened_from_anywhere(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer.run(parse(tiny_recipe), Path("first"))
    tiny_recipe.init.update(model="first", tokenizer="")
    trainer.run(parse(tiny_recipe), Path("second"))
    monkeypatch.chdir("/")
    assert open_run(tmp_path / "second").read("language_model.norm.scale").shape == (32,)


def test_an_export_without_room_says_where_and_that_nothing_is_lost(tiny_config, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_write_export", fail)
    with pytest.raises(
        CheckpointError, match=r"/export could not be written \(No space .* what was trained is saved"
    ):
        trainer._export(None, tiny_config, tmp_path)


def test_an_export_is_of_the_weights_that_the_run_ended_with(tiny_recipe, tmp_path):
    tiny_recipe.export.layout = "llava-hf"
    trainer.run(parse(tiny_recipe), tmp_path)
    tiny_recipe.export.update(layout="llava", dtype="bfloat16")  # the same run, exported otherwise
    trainer.run(parse(tiny_recipe), tmp_path)
    exported = open_model(tmp_path / "export")
    assert (exported.layout, exported.dtype("language_model.norm.scale")) == ("llava", "bfloat16")


def test_a_torn_or_missing_log_does_not_stop_a_run(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.checkpoint.save_steps = 2
    run_until_saved(parse(tiny_recipe), tmp_path, monkeypatch, step=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    trainer.run(parse(tiny_recipe), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    first, *_ = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(first)
    trainer.run(parse(tiny_recipe), tmp_path)
    assert "stopped_early_after" not in json.loads((tmp_path / "all_results.json").read_text())
    (tmp_path / "metrics.jsonl").unlink()
    trainer.run(parse(tiny_recipe), tmp_path)


def test_empty_microbatches_do_not_dilute_the_mean_of_means(tiny_recipe, tmp_path):
    records = json.loads(Path(tiny_recipe.data.path).read_text())[:2]
    (tmp_path / "two.json").write_text(json.dumps(records))
    tiny_recipe.data.path = str(tmp_path / "two.json")
    tiny_recipe.train.max_steps = 1
    tiny_recipe.loss.normalize = "microbatch"
    for name, parts in (("one", 1), ("four", 4)):
        tiny_recipe.train.accumulation_steps = parts  # rows 0 and 1 are one microbatch of four
        trainer.run(parse(tiny_recipe), tmp_path / name)
    found, expected = (metrics(tmp_path / name)[0]["loss"] for name in ("four", "one"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"evaluate.image_folder": "/nowhere"}, DataError, "question 'test_00000_color': image"),
        ({"evaluate.max_new_tokens": 250}, DataError, "the model has 256 positions"),
        (
            {"export.layout": "llava-hf", "model.projector_type": "linear"},
            CheckpointError,
            "no projector of type 'linear'",
        ),
        ({"export.layout": "llava-hf", "model.select_layer": 0}, CheckpointError, "vision_feature_layer=0"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    tiny_recipe, shapes_dataset, tmp_path, changes, error, message
):
    tiny_recipe.evaluate.update(
        path=f"{shapes_dataset}/questions_test.jsonl", image_folder=f"{shapes_dataset}/images"
    )
    for key, value in changes.items():
        section, name = key.split(".")
        tiny_recipe[section][name] = value
    with pytest.raises(error, match=message):
        trainer.run(parse(tiny_recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("record", "max_length", "message"),
    [
        ({"question": "<image>\nWhat?"}, 192, "has <image>, but it names no image"),
        ({"question": "What? " * 100}, 64, "nothing is left to learn: data.max_length=64"),
    ],
)
def test_data_that_would_teach_nothing_is_refused(tiny_recipe, tmp_path, record, max_length, message):
    turns = [{"from": "human", "value": record.pop("question")}, {"from": "gpt", "value": "red"}]
    (tmp_path / "records.json").write_text(json.dumps([record | {"conversations": turns}]))
    tiny_recipe.data.update(path=str(tmp_path / "records.json"), max_length=max_length)
    with pytest.raises(DataError, match=message):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_a_generator_reads_pictures_as_the_run_and_takes_as_many_devices_as_share_the_model_evenly(
    tiny_recipe, tmp_path
):
    tiny_recipe.data.update(image_max_pixels=400, image_aspect_ratio="square")
    tiny_recipe.train.max_steps = 1
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path)
    generator = load_generator(str(tmp_path), dtype="float32")  # widths 32 and 24 on 8 devices
    assert generator.image_processor == ImageProcessor.from_config(recipe.last.data, recipe.last.model)
    assert generator.image_processor.max_pixels == 400
    assert dict(generator.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert generator.answer(["What is this?"], [[]], max_new_tokens=2)


def test_a_packed_run_continues_with_the_same_bits(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.data.update(packing=True, batch_size=2, row_length=384)
    tiny_recipe.checkpoint.save_steps = 2
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path / "whole")
    run_until_saved(recipe, tmp_path / "broken", monkeypatch, step=2)
    trainer.run(recipe, tmp_path / "broken")
    expected, found = parameters(tmp_path / "whole"), parameters(tmp_path / "broken")
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert [row["loss"] for row in metrics(tmp_path / "whole")] == [
        row["loss"] for row in metrics(tmp_path / "broken")
    ]


def test_images_in_tiles_train_image_newline(tiny_recipe, tmp_path):
    tiny_recipe.model.update(image_grid_pinpoints=((32, 64), (64, 32)), patch_merge_type="spatial_unpad")
    tiny_recipe.data.update(image_aspect_ratio="anyres", group_by_modality_length=True)
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path)
    before, after = initial_weights(recipe.first), open_run(tmp_path)
    name = "language_model.image_newline"
    assert not np.array_equal(before.read(name), after.read(name))
    assert metrics(tmp_path)[0]["images_per_second"] > 0


def test_the_evaluation_loss_is_the_mean_over_tokens(tiny_recipe, tmp_path):
    tiny_recipe.optimizer.update(learning_rate=1e-12, warmup_ratio=0.0)
    tiny_recipe.train.max_steps = None
    tiny_recipe.data.eval_path = tiny_recipe.data.path
    trainer.run(parse(tiny_recipe), tmp_path)
    *rows, last = metrics(tmp_path)
    assert last.keys() == {"step", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_runtime"}
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    losses, counts = np.array([(row["loss"], row["num_supervised_tokens"]) for row in rows]).T
    assert last["eval_loss"] == pytest.approx((losses * counts).sum() / counts.sum(), rel=1e-5)
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] == last["eval_loss"]

    log = tmp_path / "metrics.jsonl"  # as if the process had died between the last step and the evaluation
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer.run(parse(tiny_recipe), tmp_path)
    *again, evaluated = metrics(tmp_path)
    assert again == rows and evaluated | {"eval_runtime": last["eval_runtime"]} == last


def test_samples_for_validation_are_not_trained_on(tiny_recipe, tmp_path, monkeypatch):
    stages = []
    monkeypatch.setattr(trainer, "train_stage", lambda stage, *_: stages.append(stage) or {"steps": 0})
    monkeypatch.setattr(trainer, "after_stage", lambda weights, *_, **__: weights)
    tiny_recipe.data.val_size = 10
    trainer.run(parse(tiny_recipe), tmp_path)
    names = [
        {record.name for record in pipeline.dataset}
        for pipeline in (stages[0].pipeline, stages[0].evaluations[""])
    ]
    assert len(names[1]) == 10 and not names[0] & names[1]


def test_replaced_samples_are_told_in_the_run_directory(tiny_recipe, shapes_dataset, tmp_path):
    records = json.loads(Path(tiny_recipe.data.path).read_text())
    (tmp_path / "images").symlink_to(f"{shapes_dataset}/images")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with_image = [record for record in records if "image" in record]
    for record in with_image:
        record["image"] = f"images/{record['image']}"
    with_image[0]["image"] = "broken.jpg"
    (tmp_path / "data.json").write_text(json.dumps(records))
    tiny_recipe.data.update(
        path=str(tmp_path / "data.json"), image_folder=str(tmp_path), on_bad_sample="skip", max_bad_share=0.1
    )
    tiny_recipe.train.max_steps = None
    trainer.run(parse(tiny_recipe), tmp_path / "run")
    (row,) = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert "broken.jpg" in row["problem"]
    assert row["replaced_by"].startswith("record ")
