"""Runs the conformance sets that are at hand; `python -m tests.golden DIR` runs those of any folder."""

import dataclasses
import gzip
import importlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import ModelConfig, TextConfig, TuneConfig, VisionConfig
from tests.golden import Skipped, training
from tests.golden.__main__ import DEFAULT_TOKENIZER, SETS, main, report

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "A_tokenize": ROOT / "../shared/golden/A_tokenize",
    "B_images": ROOT / "../shared/golden/B_images",
    "C_sampler": ROOT / "tests/data/C_sampler",
    "D_model": ROOT / "tests/data/D_model",
    "E_train": ROOT / "tests/data/E_train",
}


@pytest.mark.parametrize("name", SETS)
def test_conformance_with_the_original(name):
    folder, module = FOLDERS[name], f"tests.golden.{SETS[name]}"
    if not folder.is_dir() or importlib.util.find_spec(module) is None:
        pytest.skip(f"the set {name} is not at hand")
    tokenizer = ROOT / DEFAULT_TOKENIZER
    results = list(importlib.import_module(module).check(folder, tokenizer if tokenizer.exists() else None))
    compared = [(case, why) for case, why in results if not isinstance(why, Skipped)]
    assert compared
    assert [(case, why) for case, why in compared if why is not None] == []


def test_a_report_counts_and_shows_differences(capsys):
    results = [("a", None), ("b", "ids[0] is 1, not 2"), ("c", Skipped("later")), ("d", Skipped("later"))]
    assert report("A_tokenize", results) == (1, 1)
    assert capsys.readouterr().out.splitlines() == [
        "A_tokenize: 1 passed, 1 failed, 2 skipped",
        "  skipped 2: later",
        "  b: ids[0] is 1, not 2",
    ]


def test_a_folder_without_sets_fails(tmp_path, capsys):
    (tmp_path / "Z_other").mkdir()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed"


def test_packed_sets_are_read(tmp_path):
    pixels = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    (tmp_path / "B_images").mkdir()
    for name in ("in.png", "out.png"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        (tmp_path / "B_images" / f"{name}.gz").write_bytes(gzip.compress(buffer.getvalue()))
    result = {"aspect": "pad", "crop": 5, "expected": "out.png", "pixel_values_sha256_f32": ""}
    manifest = {"images": [{"file": "in.png", "results": [result]}]}
    (tmp_path / "B_images" / "manifest.json.gz").write_bytes(gzip.compress(json.dumps(manifest).encode()))
    check = importlib.import_module("tests.golden.images").check
    assert list(check(tmp_path / "B_images", None)) == [
        ("in.png pad 5", "normalised pixels differ in the last bits")
    ]


def test_parameters_of_a_lora_run_are_found_under_pefts_names():
    wrapped = "base_model.model.model."
    config = ModelConfig(vision=VisionConfig(8, 8, 2, 2, 14, 14), text=TextConfig(9, 6, 5, 2, 2, 1, 4))
    numbers = iter(range(100))
    tensors = {
        f"{wrapped}layers.{layer}.self_attn.k_proj.lora_{side}.default.weight": np.full(shape, next(numbers))
        for layer in (0, 1)
        for side, shape in (("A", (3, 6)), ("B", (4, 3)))
    }
    tensors[f"{wrapped}mm_projector.0.weight"] = np.full((6, 8), next(numbers))
    leaves = training.leaves_of(config, tensors)
    layer = "language_model.layers.self_attn.k_proj"
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        f"{layer}.lora_a": (2, 6, 3),
        f"{layer}.lora_b": (2, 3, 4),
        "multi_modal_projector.linear_1.kernel": (8, 6),
    }
    assert leaves[f"{layer}.lora_a"][:, 0, 0].tolist() == [0, 2]
    found = training.tensors_of(config, leaves)
    assert found.keys() == {training.our_name(name) for name in tensors}
    for name, tensor in tensors.items():
        assert np.array_equal(found[training.our_name(name)], tensor)


def test_the_original_trains_what_its_switches_say():
    tune = training.tune_of
    assert tune({"lora_enable": True}) == TuneConfig(language_model="lora")
    assert tune({"lora_enable": True, "tune_mm_mlp_adapter": True}) == TuneConfig(language_model="frozen")
    assert tune({"freeze_backbone": True}).language_model_modules == "lm_head"
    assert tune({"freeze_mm_mlp_adapter": True}) == TuneConfig(projector="frozen")
    marked = tune({"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True})
    assert (marked.language_model, marked.language_model_modules) == ("partial", "embed_tokens")


def test_rows_that_the_original_appended_stand_below_the_bases():
    rows = {
        "model.embed_tokens.weight.extra_rows": np.ones((3, 4), np.float32),
        "lm_head.weight.extra_rows": np.full((3, 4), 2.0, np.float32),
        "model.mm_projector.weight": np.zeros((4, 6), np.float32),
    }
    asked = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    base = dataclasses.replace(ModelConfig(), text=dataclasses.replace(ModelConfig().text, vocab_size=7))
    model = training._with_tokens(base, asked, rows)
    assert (model.text.vocab_size, model.extra_tokens) == (10, ("<im_patch>", "<im_start>", "<im_end>"))
    old = {
        f"language_model.{name}.weight": np.zeros((7, 4), np.float32) for name in ("embed_tokens", "lm_head")
    }
    found = training._with_extra_rows(rows, old)
    assert found["lm_head.weight"][6:].tolist() == [[0.0] * 4] + [[2.0] * 4] * 3
    assert found["model.embed_tokens.weight"].shape == (10, 4) and len(found) == 3
