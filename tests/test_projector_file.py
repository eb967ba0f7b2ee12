"""A projector that is written alone is what torch and the original read."""

import json
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_jax.convert.errors import ConversionError
from llava_jax.convert.opening import open_model, open_projector
from llava_jax.convert.projector_file import write_projector
from llava_jax.convert.source import Leaf, ModelSource
from tests.tiny_models import random_source, save_clip, save_llava


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def named_as_the_original(llava_hf) -> dict[str, torch.Tensor]:
    tensors = load_file(llava_hf / "model.safetensors")
    return {
        f"model.mm_projector.{2 * i - 2}.{kind}": tensors[f"multi_modal_projector.linear_{i}.{kind}"]
        for i in (1, 2)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_torch_reads_the_projector_by_its_names_in_the_original(suffix, dtype, llava_hf, tmp_path):
    file = tmp_path / f"mm_projector.{suffix}"
    write_projector(file, open_model(llava_hf), dtype=dtype)
    found = torch.load(file, weights_only=True) if suffix == "bin" else load_file(file)
    expected = named_as_the_original(llava_hf)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype))), name
        assert found[name].is_contiguous() and not found[name].requires_grad
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_pickle_names_nothing_but_tensors(llava_hf, tmp_path):
    write_projector(tmp_path / "p.bin", open_model(llava_hf))
    with zipfile.ZipFile(tmp_path / "p.bin") as file:
        program = file.read("archive/data.pkl")
    names = {argument for opcode, argument, _ in pickletools.genops(program) if opcode.name == "GLOBAL"}
    assert names == {"torch FloatStorage", "torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


def test_a_written_file_opens_again(llava_hf, tmp_path):
    write_projector(tmp_path / "p.safetensors", open_model(llava_hf))
    again = open_projector(tmp_path / "p.safetensors")
    for name in again.names():
        np.testing.assert_array_equal(again.read(name), open_model(llava_hf).read(name))
    write_projector(tmp_path / "q.safetensors", again)
    assert load_file(tmp_path / "q.safetensors").keys() == named_as_the_original(llava_hf).keys()


@pytest.mark.parametrize("kind, inner", [("linear", ""), ("mlp1x_gelu", "0.")])
def test_a_single_layer_is_named_by_its_kind(kind, inner, tmp_path):
    model, arrays = random_source(projector_type=kind)
    leaves = {name: Leaf(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    write_projector(tmp_path / "p.bin", ModelSource("ours", model, leaves))
    assert list(torch.load(tmp_path / "p.bin")) == [
        f"model.mm_projector.{inner}weight",
        f"model.mm_projector.{inner}bias",
    ]


def test_a_directory_is_what_the_original_loads_beside_a_base(llava_hf, tmp_path):
    write_projector(tmp_path / "stage1", open_model(llava_hf), dtype="float16")
    assert sorted(path.name for path in (tmp_path / "stage1").iterdir()) == [
        "config.json",
        "mm_projector.bin",
    ]
    fields = json.loads((tmp_path / "stage1/config.json").read_text())
    assert (fields["model_type"], fields["mm_projector_type"]) == ("llava_llama", "mlp2x_gelu")
    assert (fields["tune_mm_mlp_adapter"], fields["torch_dtype"]) == (True, "float16")


def test_what_cannot_be_written_is_refused(llava_hf, tmp_path):
    (tmp_path / "there.bin").write_bytes(b"keep")
    with pytest.raises(ConversionError, match=r"there\.bin exists"):
        write_projector(tmp_path / "there.bin", open_model(llava_hf))
    assert (tmp_path / "there.bin").read_bytes() == b"keep"
    with pytest.raises(ConversionError, match="layout clip has no projector"):
        write_projector(tmp_path / "x.bin", open_model(save_clip(tmp_path / "clip", llava_hf)))
    write_projector(tmp_path / "p.safetensors", open_model(llava_hf))
    with pytest.raises(ConversionError, match=r"ends with \.safetensors or \.bin"):
        write_projector(tmp_path / "x", open_projector(tmp_path / "p.safetensors"))
    assert not (tmp_path / "x").exists()
