"""tools/convert_weights.py: what it writes, what it prints, and with which code it ends."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from llava_jax.config import Config, VisionConfig
from llava_jax.config_values import to_json
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.opening import open_model
from tests.tiny_models import (
    DECODERS,
    ROOT,
    VISION,
    as_original,
    copy_with,
    randomized,
    save_clip,
    save_llava,
)
from tools.convert_weights import byte_count, main


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_there_and_back_is_verified(llava_hf, tmp_path, capsys):
    assert run("from-hf", llava_hf, tmp_path / "ours") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Reading {llava_hf}",
        f"Wrote {tmp_path / 'ours'} (from llava-hf, 37 arrays)",
    ]
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--max-shard-size=40KB") == 0
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert run("to-hf", tmp_path / "ours", tmp_path / "llava", "--layout=llava") == 0
    assert (tmp_path / "llava/model.safetensors").exists()
    capsys.readouterr()
    for other in ("back", "llava"):
        assert run("verify", tmp_path / other, llava_hf) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].endswith(" equal, 0 different")
        assert "equal     language_model.lm_head.kernel: bit-equal, float32" in lines
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")


def test_verify_shows_where_and_how_much(llava_hf, tmp_path, capsys):
    changed = tmp_path / "changed"
    assert run("to-hf", llava_hf, changed) == 0
    tensors = load_file(changed / "model.safetensors")
    tensors["language_model.model.layers.1.mlp.down_proj.weight"][5, 7] += 0.5
    save_file(tensors, changed / "model.safetensors")
    assert run("verify", llava_hf, changed) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT language_model.layers.mlp.down_proj.kernel: max difference 0.5 at [1, 7, 5]: " in out
    assert out.count("DIFFERENT") == 1 and out.splitlines()[-1].endswith(" 1 different")

    tensors["language_model.model.layers.1.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, changed / "model.safetensors")
    assert run("verify", llava_hf, changed) == 1
    assert "max difference inf at [1, 7, 5]" in capsys.readouterr().out


def test_verify_tells_rounding_from_another_dtype(llava_hf, tmp_path, capsys):
    assert run("to-hf", llava_hf, tmp_path / "half", "--dtype=bfloat16") == 0
    assert run("verify", llava_hf, tmp_path / "half") == 1
    assert "float32 and bfloat16" in capsys.readouterr().out
    assert run("to-hf", tmp_path / "half", tmp_path / "wide", "--dtype=float32") == 0
    assert run("verify", tmp_path / "half", tmp_path / "wide") == 0
    assert "equal values, bfloat16 and float32" in capsys.readouterr().out


def test_verify_names_what_one_model_lacks(llava_hf, tmp_path, capsys):
    save_llava(tmp_path / "tied", "tied")
    assert run("verify", llava_hf, tmp_path / "tied") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "DIFFERENT language_model.lm_head.kernel: only in the first" in lines
    assert any("q_proj.kernel: shape [2, 24, 40] and [2, 24, 24]" in line for line in lines)


def test_a_model_is_put_together_from_parts(llava_hf, tmp_path, capsys):
    save_clip(tmp_path / "clip", llava_hf)
    randomized(LlamaForCausalLM(DECODERS["gqa"])).save_pretrained(tmp_path / "llm")
    parts = [f"--vision-tower={tmp_path / 'clip'}", f"--language-model={tmp_path / 'llm'}"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("from-hf", *parts, f"--seed={seed}", tmp_path / name) == 0
    a, b, c = (open_model(tmp_path / name) for name in "abc")
    assert a.config.vision == VisionConfig(**VISION)
    kernel = "multi_modal_projector.linear_1.kernel"
    np.testing.assert_array_equal(a.read(kernel), b.read(kernel))
    assert not np.array_equal(a.read(kernel), c.read(kernel))
    np.testing.assert_array_equal(
        a.read("language_model.norm.scale"),
        load_file(tmp_path / "llm/model.safetensors")["model.norm.weight"],
    )


def test_inspect_reads_no_weights(llava_hf, capsys, monkeypatch):
    monkeypatch.setattr("llava_jax.convert.tensors.TensorFiles.read", None)
    assert run("inspect", llava_hf) == 0
    out = capsys.readouterr().out
    model = LlavaForConditionalGeneration.from_pretrained(llava_hf)
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    decoder = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert out.startswith("layout: llava-hf\ntemplate: v1\nimage_aspect_ratio: pad\ntokenizer: none\n")
    assert "language_model.layers.self_attn.k_proj.kernel         float32   [2, 24, 20]\n" in out
    assert f"multi_modal_projector: {projector:,} parameters\n" in out
    assert f"language_model: {decoder - 9 * 24 * 2:,} parameters\n" in out  # 9 token rows are set aside


def test_inspect_reports_what_is_missing(llava_hf, tmp_path, capsys):
    def without_bias(tensors):
        del tensors["multi_modal_projector.linear_2.bias"]
        return tensors

    damaged = copy_with(llava_hf, tmp_path / "damaged", without_bias)
    assert run("inspect", damaged) == 0
    out = capsys.readouterr().out
    assert "multi_modal_projector.linear_2.bias                   missing   [24]\n" in out
    assert out.endswith("\nmissing: multi_modal_projector.linear_2.bias\n")
    assert run("inspect", damaged, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["multi_modal_projector.linear_2.bias"]
    assert found["arrays"]["language_model.norm.scale"] == {
        "dtype": "float32",
        "shape": [24],
        "num_bytes": 96,
    }
    assert found["num_parameters"]["multi_modal_projector"] == 16 * 24 + 24 + 24 * 24 + 24


def test_inspect_takes_components_of_every_kind(llava_hf, tmp_path, capsys):
    save_clip(tmp_path / "clip", llava_hf)
    randomized(LlamaForCausalLM(DECODERS["gqa"])).save_pretrained(tmp_path / "llm")
    assert run("to-hf", llava_hf, tmp_path / "p.safetensors", "--only=projector") == 0
    capsys.readouterr()
    for name, layout in (("clip", "clip"), ("llm", "llama"), ("p.safetensors", "projector")):
        assert run("inspect", tmp_path / name) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"layout: {layout}\n") and "template" not in out and "total: " in out


def test_an_adapter_is_inspected_and_merged(llava_hf, tmp_path, capsys):
    name = "base_model.model.language_model.model.layers.1.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(40, 2)}
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "the/base"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    assert run("inspect", tmp_path / "lora") == 0
    assert "layers.1.self_attn.q_proj.weight: rank 2, scale 1.5\n" in capsys.readouterr().out
    assert run("merge-lora", llava_hf, tmp_path / "lora", tmp_path / "ours") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Reading {llava_hf} and {tmp_path / 'lora'}",
        "language_model: 1 arrays with LoRA, 0 replaced",
        f"Wrote {tmp_path / 'ours'} (from llava-hf and LoRA, 37 arrays)",
    ]
    how = ("--layout=llava-hf", "--max-shard-size=40KB")
    assert run("merge-lora", llava_hf, tmp_path / "lora", tmp_path / "hf", *how) == 0
    assert run("verify", tmp_path / "ours", tmp_path / "hf") == 0
    capsys.readouterr()
    assert run("verify", llava_hf, tmp_path / "hf") == 1
    out = capsys.readouterr().out
    assert out.count("DIFFERENT") == 1
    assert "self_attn.q_proj.kernel: max difference 3 at [1, " in out  # 1.5 * 2 ones
    assert run("inspect", tmp_path / "ours") == 0
    assert run("from-hf", tmp_path / "lora", tmp_path / "x") == 12
    assert "merge-lora BASE" in capsys.readouterr().err


def test_a_run_without_lora_has_nothing_to_merge(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"stages": {"": to_json(Config())}}))
    assert run("merge-lora", tmp_path, tmp_path / "merged") == 12
    assert f"there is nothing to merge; from-hf {tmp_path} DST writes" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("line", ["--debug inspect nothing", "inspect nothing --debug"])
def test_debug_shows_the_traceback_wherever_it_is_written(line):
    with pytest.raises(ConversionError, match="nothing does not exist"):
        run(*line.split())


def test_verify_compares_logits(llava_hf, tmp_path, capsys):
    assert run("to-hf", llava_hf, tmp_path / "half", "--dtype=bfloat16") == 0
    assert run("to-hf", llava_hf, tmp_path / "llava", "--layout=llava") == 0
    capsys.readouterr()
    assert run("verify", llava_hf, tmp_path / "llava", "--logits") == 0
    assert "equal     logits: max difference 0 at position" in capsys.readouterr().out
    assert run("verify", llava_hf, tmp_path / "half", "--logits") == 1
    assert "DIFFERENT logits: max difference " in capsys.readouterr().out


def test_a_projector_is_exported_alone(llava_hf, tmp_path, capsys):
    assert run("to-hf", llava_hf, tmp_path / "mm_projector.bin", "--only=projector", "--dtype=float16") == 0
    assert f"Wrote {tmp_path / 'mm_projector.bin'} (projector)" in capsys.readouterr().out
    tensors = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert tensors["model.mm_projector.0.weight"].shape == (24, 16)
    assert tensors["model.mm_projector.0.weight"].dtype == torch.float16


def test_a_projector_is_exported_without_the_tower_that_its_model_lacks(llava_hf, tmp_path, capsys):
    original = as_original(
        llava_hf, tmp_path / "llava", tower=False, mm_vision_tower="elsewhere", vision_config=VISION
    )
    for name in ("p.safetensors", "directory"):
        assert run("to-hf", original, tmp_path / name, "--only=projector") == 0
    expected = load_file(original / "model.safetensors")
    found = load_file(tmp_path / "p.safetensors")
    assert len(found) == 4 and all(torch.equal(found[name], expected[name]) for name in found)
    assert (tmp_path / "directory/mm_projector.bin").exists()
    assert run("to-hf", original, tmp_path / "whole") == 12
    assert "--vision-tower=DIR" in capsys.readouterr().err


def test_a_template_can_be_named(llava_hf, tmp_path):
    assert run("from-hf", llava_hf, tmp_path / "ours", "--template=mistral_instruct") == 0
    assert open_model(tmp_path / "ours").template == "mistral_instruct"


def test_bad_models_end_with_12_and_one_paragraph(llava_hf, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((llava_hf / "config.json").read_text())
    tensors = load_file(llava_hf / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, broken / "model.safetensors")
    save_clip(tmp_path / "clip", llava_hf)
    capsys.readouterr()
    for arguments, message in (
        (("inspect", tmp_path / "nowhere"), "nowhere does not exist"),
        (("from-hf", broken, tmp_path / "x"), "multi_modal_projector.linear_2.bias"),
        (("merge-lora", llava_hf, broken, tmp_path / "x"), "no adapter_config.json"),
        (
            ("to-hf", tmp_path / "clip", tmp_path / "x.bin", "--only=projector"),
            "layout clip has no projector",
        ),
        (("verify", llava_hf, tmp_path / "clip", "--logits"), "layout clip"),
        (("from-hf", llava_hf, tmp_path / "full"), "not an empty directory"),
        (("from-hf", tmp_path / "clip", tmp_path / "x"), "layout clip"),
        (("to-hf", tmp_path / "clip", tmp_path / "x"), "layout clip"),
        (("verify", llava_hf, broken), "multi_modal_projector.linear_2.bias"),
    ):
        assert run(*arguments) == 12
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and err.startswith("convert_weights.py: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required"),
        (["from-hf", "a", "b", "c"], "one SRC and one DST"),
        (["from-hf", "a"], "both --vision-tower and --language-model"),
        (["from-hf", "a", "b", "--language-model=c"], "not both"),
        (["to-hf", "a", "b", "--layout=onnx"], "onnx"),
        (["to-hf", "a", "b", "--max-shard-size=big"], "write for example 5GB"),
        (["to-hf", "a", "b", "--only=projector", "--layout=llava-hf"], "the layout llava-hf has none"),
        (["from-hf", "a", "b", "--template=v9"], "--template=v9 is not known; choose one of v1, "),
        (["merge-lora", "a", "b", "c", "--dtype=float16"], "keeps the base's"),
        (["verify", "a"], "required"),
        (["convert", "a"], "convert"),
    ],
)
def test_bad_arguments_end_with_10(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 10
    assert message in capsys.readouterr().err


def test_sizes_are_read_with_their_unit():
    sizes = {"5GB": 5 * 10**9, "200MB": 2 * 10**8, "1GiB": 2**30, "1.5kb": 1500, "77": 77}
    assert {text: byte_count(text) for text in sizes} == sizes


def test_it_runs_as_a_script_from_anywhere(llava_hf, tmp_path):
    command = [sys.executable, str(ROOT / "tools/convert_weights.py")]
    done = subprocess.run(
        [*command, "from-hf", str(llava_hf), "ours"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "ours/config.json").read_text())["format"] == "llava_jax"
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "from-hf SRC DST" in help_text
