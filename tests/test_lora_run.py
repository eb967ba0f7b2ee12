"""Whole runs of the LoRA recipes on a tiny model: resumed, sharded, exported, merged."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax import evaluation, stage, trainer
from llava_jax.convert.adapter_export import write_adapter
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.merging import merge
from llava_jax.convert.opening import open_model
from llava_jax.convert.ours import write_model
from llava_jax.data.question_file import read_questions
from llava_jax.generation import load_generator
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.run_adapter import open_run_adapter
from llava_jax.sharding import make_mesh
from llava_jax.weights import before_stage, initial_weights, open_any, open_run
from tests.test_trainer import metrics, one_device, parameters, run_until_saved  # noqa: F401 (a fixture)
from tools.convert_weights import main as convert

ROOT = Path(__file__).parent.parent


def tiny(name: str, tiny_recipe):
    """A recipe of configs/ with the model, the data and the length of the tiny one."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.get_config("7b")
    for section in ("model", "init", "mesh"):
        recipe[section] = tiny_recipe[section]
    for key in ("path", "image_folder", "max_length", "batch_size", "num_threads", "cache_dir"):
        recipe.data[key] = tiny_recipe.data[key]
    for key in ("max_steps", "dtype", "frozen_dtype", "remat", "log_steps"):
        recipe.train[key] = tiny_recipe.train[key]
    recipe.train.accumulation_steps = 2
    recipe.optimizer.learning_rate = 1e-2
    recipe.lora.update(rank=4, alpha=8.0)
    return recipe


@pytest.fixture
def base(tiny_recipe, tmp_path) -> str:
    """The model that the runs start from."""
    write_model(tmp_path / "base", initial_weights(parse(tiny_recipe).first))
    return str(tmp_path / "base")


def test_a_broken_lora_run_continues_with_the_same_bits_and_its_adapter_is_the_trained_model(
    tiny_recipe, base, tmp_path, monkeypatch, capsys
):
    config = tiny("llava15_finetune_lora", tiny_recipe)
    config.init.update(model=base, tokenizer="")
    config.checkpoint.save_steps = 2
    recipe = parse(config)
    assert recipe.first.lora.dropout == 0.05
    trainer.run(recipe, tmp_path / "whole")
    assert "LoRA of rank 4, scale 2, dropout 0.05 on q_proj, k_proj," in capsys.readouterr().out
    run_until_saved(recipe, tmp_path / "broken", monkeypatch, step=2)
    trainer.run(recipe, tmp_path / "broken")
    whole, broken = parameters(tmp_path / "whole"), parameters(tmp_path / "broken")
    assert whole.keys() == broken.keys() and len(whole) == 7 * 2 + 4
    assert all(np.array_equal(broken[name], value) for name, value in whole.items())
    rows = [metrics(tmp_path / name) for name in ("whole", "broken")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert rows[0][1]["learning_rate_projector"] == pytest.approx(rows[0][1]["learning_rate"] * 2e-3)

    before, after = open_model(base), open_run(tmp_path / "whole")
    exported = merge(before, open_adapter(tmp_path / "whole/export"))
    trained = {f"language_model.layers.{name}" for name in ("self_attn", "mlp")}
    for name in before.names():
        changed = name.startswith("multi_modal") or name.rsplit(".", 2)[0] in trained
        assert np.array_equal(before.read(name), after.read(name)) != changed, name
        np.testing.assert_allclose(exported.read(name), after.read(name), rtol=1e-5, atol=1e-7, err_msg=name)

    for arguments in (
        ["merge-lora", "whole", "merged"],
        ["to-hf", "whole", "adapter", "--layout=peft-llava-hf"],
        ["merge-lora", "base", "adapter", "again"],
    ):
        paths = [word if word.startswith("--") else str(tmp_path / word) for word in arguments[1:]]
        assert convert([arguments[0], *paths]) == 0
    for name in after.names():
        found = open_model(tmp_path / "merged").read(name)
        assert found.dtype == np.float32 and np.array_equal(found, after.read(name)), name
        again = open_model(tmp_path / "again").read(name)
        np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_run_on_merged_adapters_and_with_tokens_of_its_own_is_merged(tiny_recipe, base, tmp_path):
    config = tiny("llava15_finetune_task_lora", tiny_recipe)
    config.init.update(model=base, tokenizer="")
    config.train.max_steps = 1
    config.optimizer.warmup_ratio = 0.0
    config.export.layout = ""
    trainer.run(parse(config), tmp_path / "first")
    write_adapter(tmp_path / "adapter", open_run_adapter(tmp_path / "first"), layout="peft")
    config.init.adapters = str(tmp_path / "adapter")
    config.model.use_im_start_end = True
    config.model.text.vocab_size += 2
    trainer.run(parse(config), tmp_path / "second")
    assert convert(["merge-lora", str(tmp_path / "second"), str(tmp_path / "merged")]) == 0
    merged, expected = open_model(tmp_path / "merged"), open_run(tmp_path / "second")
    assert merged.config.use_im_start_end and sorted(merged.names()) == sorted(expected.names())
    for name in expected.names():
        np.testing.assert_array_equal(merged.read(name), expected.read(name), err_msg=name)


def test_the_task_recipe_trains_a_finished_model_further(tiny_recipe, base, tmp_path):
    config = tiny("llava15_finetune_task_lora", tiny_recipe)
    config.init.update(model=base, tokenizer="")
    config.train.max_steps = 1
    config.optimizer.warmup_ratio = 0.0
    config.export.dtype = "float32"
    trainer.run(parse(config), tmp_path / "run")
    name = "language_model.layers.mlp.up_proj.kernel"
    trained = open_run(tmp_path / "run").read(name)
    assert np.abs(trained - open_model(base).read(name)).max() > 1e-4
    np.testing.assert_array_equal(open_model(tmp_path / "run/export").read(name), trained)
    config.init.model = str(tmp_path / "run")  # which is opened merged
    np.testing.assert_array_equal(initial_weights(parse(config).first).read(name), trained)
    adapter = open_run_adapter(tmp_path / "run")
    assert adapter.base == base and len(adapter.low_rank) == 7
    # It may lie on a run as well, which is opened for it.
    adapter = dataclasses.replace(adapter, base=str(tmp_path / "run"))
    write_adapter(tmp_path / "lora", adapter, layout="peft")
    expected = merge(open_run(tmp_path / "run"), open_adapter(tmp_path / "lora")).read(name)
    np.testing.assert_array_equal(open_any(tmp_path / "lora").read(name), expected)
    assert np.abs(expected - trained).max() > 1e-4
    assert {name.split(".")[0] for name in adapter.replaced} == {"multi_modal_projector"}


@pytest.fixture
def wide_recipe(tiny_recipe):
    """The tiny recipe with a decoder whose kernels have whole blocks of inputs."""
    tiny_recipe.model.text.update(hidden_size=64, intermediate_size=128, head_dim=16)
    return tiny_recipe


@pytest.mark.slow
def test_a_broken_qlora_run_continues_with_the_same_bits_and_is_merged_into_the_base_as_it_was(
    wide_recipe, base, tmp_path, monkeypatch, capsys
):
    config = tiny("llava15_finetune_qlora", wide_recipe)
    config.init.update(model=base, tokenizer="")
    config.checkpoint.save_steps = 2
    config.data.val_size = 8.0
    recipe = parse(config)
    assert (recipe.first.lora.quantization, recipe.first.lora.dropout) == ("nf4", 0.05)
    trainer.run(recipe, tmp_path / "whole")
    assert "; its kernels in nf4" in capsys.readouterr().out
    run_until_saved(recipe, tmp_path / "broken", monkeypatch, step=2)
    trainer.run(recipe, tmp_path / "broken")
    whole, broken = parameters(tmp_path / "whole"), parameters(tmp_path / "broken")
    assert whole.keys() == broken.keys() and len(whole) == 7 * 2 + 4
    assert all(np.array_equal(broken[name], value) for name, value in whole.items())
    losses, again = (
        [row.get("loss", row.get("eval_loss")) for row in metrics(tmp_path / name)]
        for name in ("whole", "broken")
    )
    assert losses == again and len(losses) == 5

    before, after = open_model(base), open_run(tmp_path / "whole")
    exported = merge(before, open_adapter(tmp_path / "whole/export"))
    for name in before.names():
        np.testing.assert_allclose(exported.read(name), after.read(name), rtol=1e-5, atol=1e-7, err_msg=name)
    name = "language_model.layers.mlp.up_proj"
    change = whole[f"{name}.lora_a"] @ whole[f"{name}.lora_b"]
    expected = before.read(f"{name}.kernel") + 8 / 4 * change
    np.testing.assert_allclose(after.read(f"{name}.kernel"), expected, rtol=1e-5, atol=1e-7)


def test_a_qlora_run_answers_at_its_end_with_the_network_that_it_trained(
    wide_recipe, base, shapes_dataset, tmp_path, monkeypatch
):
    config = tiny("llava15_finetune_qlora", wide_recipe)
    config.init.update(model=base, tokenizer="")
    config.train.max_steps = 2
    config.lora.double_quantization = False
    config.evaluate.update(
        path=f"{shapes_dataset}/questions_test.jsonl",
        image_folder=f"{shapes_dataset}/images",
        max_new_tokens=4,
    )
    recipe, generators, ask = parse(config), [], evaluation.ask
    monkeypatch.setattr(evaluation, "ask", lambda *of, **how: generators.append(of[0]) or ask(*of, **how))
    trainer.run(recipe, tmp_path / "run")
    generators.append(load_generator(str(tmp_path / "run"), dtype="float32", quantization="nf4"))
    trained = parameters(tmp_path / "run")
    program = Program(recipe.first, generators[0].mesh, 2)
    frozen = stage._load_frozen(before_stage(open_model(base), recipe.first), program)[0]
    assert "language_model.layers.mlp.up_proj.kernel.nf4" in frozen
    expected = {name: np.asarray(value) for name, value in (trained | frozen).items()}
    for generator in generators:
        found = generator.parameters
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    asked = recipe.first.evaluate
    results, _ = evaluation.evaluate(generators[1], read_questions(asked.path), asked, model_id="run")
    assert results.items() <= json.loads((tmp_path / "run/all_results.json").read_text()).items()
    merged = load_generator(str(tmp_path / "run"), dtype="float32", quantization="int8").parameters
    assert "language_model.layers.mlp.up_proj.kernel.int8" in merged
    assert not [name for name in merged if "lora" in name]


@pytest.mark.slow
def test_a_sharded_lora_run_drops_the_same_inputs_as_one_device(tiny_recipe, tmp_path, monkeypatch):
    config = tiny("llava15_finetune_task_lora", tiny_recipe)
    config.lora.dropout = 0.5
    config.train.max_steps = 2
    config.optimizer.warmup_ratio = 0.0
    trainer.run(parse(config), tmp_path / "one")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_mesh", make_mesh)
        trainer.run(parse(config), tmp_path / "eight")
    one, eight = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    found, expected = parameters(tmp_path / "eight"), parameters(tmp_path / "one")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


def test_a_partial_run_changes_the_named_layers_alone_and_saves_only_them(tiny_recipe, tmp_path):
    tiny_recipe.tune.update(
        vision_tower="partial",
        vision_tower_layers="1:",
        projector="frozen",
        language_model="partial",
        language_model_layers=":1",
        language_model_modules="norm",
    )
    tiny_recipe.train.max_steps = 2
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path)
    groups = {".".join(name.split(".")[:3]) for name in parameters(tmp_path)}
    assert groups == {"vision_tower.layers.1:2", "language_model.layers.0:1", "language_model.norm.scale"}
    before, after = initial_weights(recipe.first), open_run(tmp_path)
    for name in before.names():
        old, new = before.read(name), after.read(name)
        if ".layers." in name:
            trained = 0 if name.startswith("language_model") else 1
            assert [np.array_equal(a, b) for a, b in zip(old, new, strict=True)] == [
                layer != trained for layer in range(2)
            ], name
            part = (slice(1, 2), *(slice(0, size) for size in new.shape[1:]))
            np.testing.assert_array_equal(after.leaves[name].part(part), new[1:])
        else:
            assert np.array_equal(old, new) == (name != "language_model.norm.scale"), name
