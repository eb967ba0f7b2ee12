"""What does not fit is named, and what was interrupted is not taken for a model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file as load_numpy

from llava_jax.config import ModelConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.opening import open_model, open_parts
from llava_jax.convert.ours import write_model
from tests.tiny_models import assert_same_leaves, copy_with, export, save_clip, save_llava


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without("language_model.model.layers.1.mlp.up_proj.weight"),
            r"1 tensors are missing \(language_model\.model\.layers\.1\.mlp\.up_proj\.weight\)",
        ),
        (
            without("vision_tower.encoder.layers.3.mlp.fc1.bias"),
            r"1 tensors are missing \(vision_tower\.vision_model\.encoder\.layers\.3\.mlp\.fc1\.bias\)",
        ),
        (
            lambda t: t | {"language_model.model.layers.0.self_attn.q_proj.lora_A": torch.ones(1)},
            r"1 tensors are unexpected \(language_model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\)",
        ),
        (lambda t: t | {"image_newline": torch.ones(24)}, r"1 tensors are unexpected \(image_newline\)"),
        (
            lambda t: t | {"multi_modal_projector.linear_1.weight": torch.ones(24, 17)},
            r"multi_modal_projector\.linear_1\.weight \[24, 17\] instead of \[24, 16\]",
        ),
        (
            lambda t: t | {"language_model.lm_head.weight": torch.ones(98, 24)},
            r"language_model\.lm_head\.weight \[98, 24\] instead of \[99, 24\]",
        ),
        (
            lambda t: t | {"vision_tower.vision_model.pre_layrnorm.bias": torch.ones(16)},
            r"1 tensors are unexpected \(vision_tower\.",
        ),
        (
            lambda t: {key: tensor for key, tensor in t.items() if "layers.1." not in key},
            r"\d\d tensors are missing \(.* and \d+ more\)",
        ),
        (
            lambda t: {key: tensor.to(torch.int8) for key, tensor in t.items()},
            r"is stored as int8; only float64, float32, float16, bfloat16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, llava_hf, tmp_path):
    with pytest.raises(ConversionError, match=message):
        open_model(copy_with(llava_hf, tmp_path / "broken", change))


def test_buffers_without_meaning_are_passed_over(llava_hf, tmp_path):
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17),
    }
    assert_same_leaves(
        open_model(copy_with(llava_hf, tmp_path / "m", lambda t: t | buffers)), open_model(llava_hf)
    )


def test_broken_files_are_named(llava_hf, tmp_path):
    def broken(name):
        return Path(shutil.copytree(llava_hf, tmp_path / name))

    short = broken("short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(ConversionError, match=r"short/model\.safetensors cannot be read"):
        open_model(short)

    index = broken("index")
    (index / "model.safetensors").rename(index / "model-00001-of-00002.safetensors")
    names = list(load_numpy(index / "model-00001-of-00002.safetensors"))
    for name, file, message in (
        ("a.weight", "model-00002-of-00002.safetensors", "shard model-00002-of-00002.safetensors, which"),
        ("a.weight", "../short/model.safetensors", "outside its directory"),
        ("a.weight", "/etc/passwd", "outside its directory"),
        ("a.weight", "model-00001-of-00002.safetensors", r"do not hold \(a\.weight\)"),
    ):
        weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {name: file}
        (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConversionError, match=message):
            open_model(index)

    no_config = broken("no_config")
    (no_config / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"no config\.json"):
        open_model(no_config)
    (no_config / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json cannot be read as JSON"):
        open_model(no_config)
    with pytest.raises(ConversionError, match="nowhere does not exist"):
        open_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"holds no \.safetensors or \.bin file"):
        open_model(tmp_path / "empty")


def test_a_damaged_directory_of_ours_is_refused(llava_hf, tmp_path):
    write_model(tmp_path / "ours", open_model(llava_hf))
    config = tmp_path / "ours/config.json"
    good = json.loads(config.read_text())
    less = {name: entry for name, entry in good["weights"].items() if name != "language_model.norm.scale"}
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"weights": less}, r"disagree \(language_model\.norm\.scale\)"),
        ({"model": good["model"] | {"select_layer": -3}}, "disagree"),
        ({"model": good["model"] | {"colour": 1}}, "damaged"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ConversionError, match=message):
            open_model(tmp_path / "ours")
    config.write_text(json.dumps(good))
    shutil.rmtree(tmp_path / "ours/weights")
    with pytest.raises(ConversionError, match="no weights directory"):
        open_model(tmp_path / "ours")


class Interrupted(Exception):
    pass


def failing_source(llava_hf, after: int):
    """A source whose reads fail after a few leaves."""
    source = open_model(llava_hf)
    left = iter(range(after))

    def read(leaf):
        if next(left, None) is None:
            raise Interrupted
        return leaf.read()

    leaves = {
        name: dataclasses.replace(leaf, read=lambda leaf=leaf: read(leaf))
        for name, leaf in source.leaves.items()
    }
    return dataclasses.replace(source, leaves=leaves)


def test_an_interrupted_write_leaves_nothing(llava_hf, tmp_path):
    with pytest.raises(Interrupted):
        write_model(tmp_path / "ours", failing_source(llava_hf, 7))
    with pytest.raises(Interrupted):
        export(failing_source(llava_hf, 7), tmp_path / "hf", "llava-hf")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_no_model_and_no_obstacle(llava_hf, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: None)  # killed: nothing cleans up
    with pytest.raises(Interrupted):
        write_model(tmp_path / "ours", failing_source(llava_hf, 7))
    with pytest.raises(Interrupted):
        export(failing_source(llava_hf, 7), tmp_path / "hf", "llava-hf")
    monkeypatch.undo()
    left = ["hf.incomplete", "hf.incomplete.lock", "ours.incomplete", "ours.incomplete.lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    for name in ("ours.incomplete", "hf.incomplete"):
        with pytest.raises(ConversionError):
            open_model(tmp_path / name)
    write_model(tmp_path / "ours", open_model(llava_hf))
    assert_same_leaves(open_model(tmp_path / "ours"), open_model(llava_hf))


def test_a_directory_that_no_write_has_left_is_never_removed(llava_hf, tmp_path):
    (tmp_path / "ours.incomplete").mkdir()
    (tmp_path / "ours.incomplete/notes.txt").write_text("keep")
    with pytest.raises(ConversionError, match=r"ours\.incomplete is in the way"):
        write_model(tmp_path / "ours", open_model(llava_hf))
    shutil.copytree(llava_hf, tmp_path / "x.incomplete")
    with pytest.raises(ConversionError, match="in the way"):
        write_model(tmp_path / "x", open_model(tmp_path / "x.incomplete"))
    assert (tmp_path / "ours.incomplete/notes.txt").read_text() == "keep"
    assert_same_leaves(open_model(tmp_path / "x.incomplete"), open_model(llava_hf))


def test_two_writes_of_one_directory_do_not_meet(llava_hf, tmp_path):
    with new_directory(tmp_path / "new") as partial:
        (partial / "mine").write_text("mine")
        with pytest.raises(ConversionError, match="Another process is writing"):
            write_model(tmp_path / "new", open_model(llava_hf))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("new")] == ["new"]
    assert (tmp_path / "new/mine").read_text() == "mine"


def test_a_destination_may_be_a_link_to_an_empty_directory(llava_hf, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large_disk")
    write_model(tmp_path / "link", open_model(llava_hf))
    assert_same_leaves(open_model(tmp_path / "large_disk"), open_model(llava_hf))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config", "x"),
        ("vision_config", -1),
        ("image_token_index", None),
        ("vision_feature_select_strategy", []),
    ],
)
def test_settings_of_another_kind_are_told_by_file(llava_hf, tmp_path, key, value):
    shutil.copytree(llava_hf, tmp_path / "odd")
    file = tmp_path / "odd/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConversionError, match=r"odd/config\.json"):
        open_model(tmp_path / "odd")


def test_a_destination_with_content_is_refused(llava_hf, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("keep")
    with pytest.raises(ConversionError, match="not an empty directory"):
        write_model(tmp_path / "full", open_model(llava_hf))
    with pytest.raises(ConversionError, match="not an empty directory"):
        export(open_model(llava_hf), tmp_path / "full", "llava")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", open_model(llava_hf))


def test_only_whole_models_are_written(llava_hf, tmp_path):
    with pytest.raises(ConversionError, match=r"whole model.*clip"):
        write_model(tmp_path / "x", open_model(save_clip(tmp_path / "clip", llava_hf)))
    parts = open_parts(ModelConfig(), vision_tower=tmp_path / "clip")
    with pytest.raises(ConversionError, match=r"lacks \d+ arrays \(language_model"):
        write_model(tmp_path / "x", parts)
