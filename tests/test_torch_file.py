"""What torch.save wrote is read without torch, to the bit, and nothing more than is asked for."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_jax.convert.errors import ConversionError
from llava_jax.convert.opening import open_model, open_projector
from llava_jax.convert.restricted_pickle import run_pickle
from llava_jax.convert.tensors import TensorFiles
from tests.tiny_models import ROOT, assert_same_leaves, save_clip, save_llava

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = {
    "zip": {},
    "protocol4": {"pickle_protocol": 4},
    "legacy": {"_use_new_zipfile_serialization": False},
}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def state_dict() -> dict[str, torch.Tensor]:
    """Tensors of every kind that a state_dict holds."""
    base = normal(6, 5, 4)
    tensors = {str(dtype): normal(7, 3, dtype=dtype) for dtype in DTYPES}
    return tensors | {
        "base": base,
        "tied": base,
        "row of base": base[2],
        "rows of base": base[1:5],
        "transposed": base.permute(2, 0, 1),
        "every second column": base[1:4, ::2, 1:3],
        "parameter": nn.Parameter(normal(3, 2, dtype=torch.bfloat16)),
        "transposed parameter": nn.Parameter(normal(3, 2).T),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "one row": normal(5, 1).T,
        "more dimensions": normal(2, 3, 1, 5),
    }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def save_bin(directory: Path, destination: Path, **options) -> Path:
    """A copy of a directory with pytorch_model.bin in place of model.safetensors."""
    shutil.copytree(directory, destination)
    torch.save(load_file(destination / "model.safetensors"), destination / "pytorch_model.bin", **options)
    (destination / "model.safetensors").unlink()
    return destination


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf", dtype=torch.bfloat16)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_tensors_are_those_that_torch_saved(options, tmp_path):
    saved = state_dict()
    torch.save(saved, tmp_path / "x.bin", **options)
    files = TensorFiles(tmp_path / "x.bin")
    assert files.names() == list(saved)
    for name, tensor in saved.items():
        assert files.shape(name) == tuple(tensor.shape), name
        assert f"torch.{files.dtype(name)}" == str(tensor.dtype), name
        array = files.read(name)
        assert array.dtype == files.dtype(name) and array.flags.c_contiguous, name
        np.testing.assert_array_equal(array.astype(np.float64), as_numpy(tensor), err_msg=name)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_rows_are_slices_of_the_tensor(options, tmp_path):
    saved = {name: tensor for name, tensor in state_dict().items() if tensor.ndim}
    torch.save(saved, tmp_path / "x.bin", **options)
    files = TensorFiles(tmp_path / "x.bin")
    for name, tensor in saved.items():
        for begin, end in ((0, None), (0, 1), (1, 3), (2, None), (1, 1)):
            rows = files.read(name, begin, end).astype(np.float64)
            np.testing.assert_array_equal(rows, as_numpy(tensor)[begin:end], err_msg=f"{name} {begin}:{end}")


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("nan"), 1e-40])
def test_every_bit_pattern_survives(special, tmp_path):
    for dtype, bits in (
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
        (torch.float32, torch.int32),
    ):
        tensor = torch.full((3,), special, dtype=dtype)
        torch.save({"x": tensor}, tmp_path / "x.bin")
        read = TensorFiles(tmp_path / "x.bin").read("x")
        assert read.tobytes() == tensor.view(bits).numpy().tobytes()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_model_in_a_bin_file_is_the_model_in_safetensors(options, llava_hf, tmp_path):
    assert_same_leaves(open_model(save_bin(llava_hf, tmp_path / "bin", **options)), open_model(llava_hf))


def test_a_module_saved_by_its_state_dict_is_read(tmp_path):
    module = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 3))  # its state_dict has a _metadata
    names = {f"model.mm_projector.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "state.bin")
    assert TensorFiles(tmp_path / "state.bin").names() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.save(names, tmp_path / "mm_projector.bin")
    for opened in (open_projector(tmp_path / "mm_projector.bin"), open_model(tmp_path / "mm_projector.bin")):
        np.testing.assert_array_equal(
            opened.read("multi_modal_projector.linear_1.kernel"), module[0].weight.detach().numpy().T
        )


def test_shards_are_joined_by_their_index(llava_hf, tmp_path):
    directory = save_bin(llava_hf, tmp_path / "bin")
    tensors = torch.load(directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").unlink()
    weight_map = {}
    for i in range(3):
        name = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = dict(list(tensors.items())[i::3])
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    torch.save({"lr": 1}, directory / "training_args.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_leaves(open_model(directory), open_model(llava_hf))


def test_a_clip_tower_with_its_integer_buffer_is_read(llava_hf, tmp_path):
    clip = save_bin(save_clip(tmp_path / "clip", llava_hf), tmp_path / "bin")
    tensors = torch.load(clip / "pytorch_model.bin")
    torch.save(
        tensors | {"vision_model.embeddings.position_ids": torch.arange(17)}, clip / "pytorch_model.bin"
    )
    assert_same_leaves(open_model(clip), open_model(tmp_path / "clip"))
    with pytest.raises(ConversionError, match=r"position_ids is stored as int64; only float64"):
        TensorFiles(clip).read("vision_model.embeddings.position_ids")


def test_safetensors_are_taken_where_both_formats_are_there(llava_hf, tmp_path):
    both = Path(shutil.copytree(llava_hf, tmp_path / "both"))
    torch.save({"a": torch.ones(1)}, both / "pytorch_model.bin")
    torch.save({"a": torch.ones(1)}, both / "mm_projector.bin")
    assert_same_leaves(open_model(both), open_model(llava_hf))


def test_the_format_is_told_by_the_content(llava_hf, tmp_path):
    renamed = Path(shutil.copytree(llava_hf, tmp_path / "renamed"))
    (renamed / "model.safetensors").rename(renamed / "pytorch_model.bin")
    assert_same_leaves(open_model(renamed), open_model(llava_hf))
    torch.save({"a": torch.ones(2)}, tmp_path / "really_a_pickle.safetensors")
    assert TensorFiles(tmp_path / "really_a_pickle.safetensors").names() == ["a"]


def test_the_state_dict_of_a_trainer_is_read_and_what_stands_beside_it_is_not(tmp_path):
    beside = {"epoch": 3, "global_step": 12, "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}]}
    for options in FORMATS.values():
        torch.save(beside | {"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt", **options)
        files = TensorFiles(tmp_path / "x.ckpt")
        assert files.names() == ["a"]
        np.testing.assert_array_equal(files.read("a"), [1, 1])


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.ones(2), "holds a StoredTensor, not a dictionary"),
        ([torch.ones(2)], "holds a list, not a dictionary"),
        ({"a": torch.ones(2), "step": 3}, r"something else than tensors \(step\)"),
        ({"a": {"b": torch.ones(2)}}, r"something else than tensors \(a\)"),
        ({0: torch.ones(2)}, r"something else than tensors \(0\)"),
        ({"a": torch.ones(1).expand(10**9)}, r"\[1000000000\] repeats the 1 elements.*contiguous"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"asks for 'torch\.ComplexFloatStorage'"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, r"asks for 'torch\._utils\._rebuild_tensor_v3'"),
        ({"a": torch.ones(2).to_sparse()}, r"asks for 'torch\._utils\._rebuild_sparse_tensor'"),
        (nn.Linear(2, 2), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    ],
)
def test_what_is_no_dictionary_of_plain_tensors_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(
        ConversionError, match=rf"x\.bin cannot be read as a file of tensors by torch.*{message}"
    ):
        TensorFiles(tmp_path / "x.bin")


def test_damaged_values_are_named(tmp_path):
    torch.save({"a": torch.ones(50), "b": torch.full((60,), 2.0)}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    place = data.index(torch.full((60,), 2.0).numpy().tobytes())
    data[place + 100] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    files = TensorFiles(tmp_path / "x.bin")
    files.read("a")
    with pytest.raises(ConversionError, match=r"x\.bin: the values of b are damaged"):
        files.read("b")


def test_damaged_values_are_found_in_parts_that_follow_each_other(tmp_path):
    tensor = torch.arange(60.0).reshape(20, 3)
    torch.save({"a": tensor}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[data.index(tensor.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "damaged.bin").write_bytes(data)
    whole, damaged = (TensorFiles(tmp_path / name) for name in ("x.bin", "damaged.bin"))
    for files in (whole, damaged):
        files.read("a", 0, 7)
        files.read("a", 14, 20)  # not what follows
        files.read("a", 7, 14)
    np.testing.assert_array_equal(whole.read("a", 14, 20), tensor[14:])
    with pytest.raises(ConversionError, match=r"damaged\.bin: the values of a are damaged"):
        damaged.read("a", 14, 20)


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_a_file_that_is_cut_after_it_was_opened_is_named(name, tmp_path):
    tensors = {"a": torch.ones(400), "b": torch.ones(400)}
    torch.save(tensors, tmp_path / "x.bin")
    save_file(tensors, tmp_path / "x.safetensors")
    path = tmp_path / name
    files = TensorFiles(path)
    os.truncate(path, path.read_bytes().rindex(np.ones(400, np.float32).tobytes()) + 30)
    np.testing.assert_array_equal(files.read("a"), np.ones(400))
    with pytest.raises(ConversionError, match=rf"{name} ends within b; it was cut after it was opened"):
        files.read("b")


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(50)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(TensorFiles(tmp_path / "x.bin").read("a"), np.ones(50))


@pytest.mark.parametrize("legacy", [False, True])
def test_only_the_bytes_that_are_asked_for_are_read(legacy, tmp_path):
    """Seen by the size of a process that reads a little of 128 MiB."""
    script = """
import resource, sys
from pathlib import Path
from llava_jax.convert.restricted_pickle import run_pickle
from llava_jax.convert.tensors import TensorFiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = TensorFiles(Path(sys.argv[1]))
assert files.shape("a") == (2**15, 1024)
assert files.read("a", 2**15 - 2).tolist() == [[7.0] * 1024] * 2
assert files.read("every second column", 2**15 - 1).tolist() == [[7.0] * 512]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert "torch" not in sys.modules
"""
    tensor = torch.zeros(2**15, 1024)
    tensor[-2:] = 7.0
    file = tmp_path / "x.bin"
    torch.save(
        {"a": tensor, "every second column": tensor[:, ::2]}, file, _use_new_zipfile_serialization=not legacy
    )
    command = [sys.executable, "-c", script, str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    file.unlink()
    assert int(run.stdout) < 20_000  # KiB; the legacy format's pickles are looked for in the first 4 MiB


def test_the_pickle_of_the_standard_library_writes_what_we_run():
    """Protocols 2 to 5 of plain values; the instructions of torch.save are a part of these."""
    value = {
        "a": [1, -1, 2**31, 2**40, 1.5, None, True],
        "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {},
    }
    value["again"] = value["b"]
    for protocol in (2, 3, 4, 5):
        assert run_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value
