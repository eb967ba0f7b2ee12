"""A checkpoint's parameters are read part by part, however they were sharded when they were saved."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from llava_jax import saved_parameters
from llava_jax.config import MeshConfig
from llava_jax.convert import source
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.orbax_weights import StoredArrays
from llava_jax.convert.source import completed
from llava_jax.digests import write_digests
from llava_jax.errors import CheckpointError
from llava_jax.saved_parameters import SavedParameters, save_args
from llava_jax.sharding import make_mesh, parameter_sharding

KERNEL = "language_model.layers.mlp.up_proj.kernel"
EMBEDDING = "language_model.embed_tokens.embedding"
HEAD = "language_model.lm_head.kernel"
BIAS = "multi_modal_projector.linear_1.bias"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(saved_parameters, "_CHUNK_BYTES", 1024)
    monkeypatch.setattr(source, "_PART_BYTES", 2000)


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {KERNEL: (5, 16, 24), EMBEDDING: (96, 16), HEAD: (16, 96), BIAS: (16,)}
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {"language_model.norm.scale": np.zeros(16, np.float32)}  # zeros are stored like the rest


def placed(values, **axes) -> dict[str, jax.Array]:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    return {
        name: jax.device_put(value, parameter_sharding(mesh, name, value.shape))
        for name, value in values.items()
    }


def save(directory, values, *, in_chunks=True, **axes) -> SavedParameters:
    """As a run saves them, but for what it saves beside them."""
    state = {"trainable": placed(values, **axes)}
    state = ocp.args.StandardSave(state, save_args=save_args(state) if in_chunks else None)
    with ocp.CheckpointManager(directory) as manager:
        manager.save(3, args=ocp.args.Composite(state=state, meta=ocp.args.JsonSave({"frozen": {BIAS: 7}})))
    return SavedParameters(directory, 3)


def assert_read(saved: SavedParameters, values) -> None:
    leaves = saved.leaves()
    assert leaves.keys() == values.keys()
    for name, leaf in leaves.items():
        assert (leaf.shape, leaf.dtype) == (values[name].shape, np.float32)
        np.testing.assert_array_equal(leaf.read(), values[name], err_msg=name)
        for index in leaf.parts():
            np.testing.assert_array_equal(leaf.part(index), values[name][index], err_msg=f"{name} {index}")


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_parts_of_a_checkpoint_are_those_of_its_arrays(axes, values, tmp_path):
    saved = save(tmp_path, values, **axes)
    assert saved.frozen == {BIAS: 7}
    assert_read(saved, values)
    leaves = saved.leaves()
    assert leaves[KERNEL].axis == 0 and len(leaves[KERNEL].parts()) == 5
    if not axes:
        assert [leaves[name].axis for name in (EMBEDDING, HEAD, BIAS)] == [0, 1, None]


@pytest.mark.parametrize("fsdp", [1, 8])
def test_what_was_saved_in_whole_shards_is_read_whole(fsdp, values, tmp_path, monkeypatch):
    """As orbax saves by itself."""
    monkeypatch.setattr(saved_parameters, "_CHUNK_BYTES", 500)
    saved = save(tmp_path, values, in_chunks=False, fsdp=fsdp)
    assert_read(saved, values)
    assert {saved.leaves()[name].axis for name in (KERNEL, EMBEDDING, HEAD)} == {None}


def bytes_read() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_of_a_stacked_parameter_only_the_layers_asked_for_are_read(values, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_parameters, "_CHUNK_BYTES", 2**16)
    kernel = np.random.default_rng(0).standard_normal((5, 128, 256), np.float32)
    leaf = save(tmp_path, values | {KERNEL: kernel}).leaves()[KERNEL]
    layer = completed((slice(2, 3),), leaf.shape)
    leaf.part(layer)  # opens it
    before = bytes_read()
    leaf.part(layer)
    assert 0 < bytes_read() - before < 1.2 * kernel[0].nbytes  # random values hardly shrink


def test_a_checkpoint_is_read_through_any_path(values, tmp_path, monkeypatch):
    save(tmp_path / "runs", values)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "here")
    for path in ("../runs", "../here/../link"):
        assert_read(SavedParameters(Path(path), 3), values)
        found = StoredArrays(Path(path) / "3/state").read(f"trainable.{BIAS}")
        np.testing.assert_array_equal(found, values[BIAS])


def test_a_parameter_in_a_damaged_file_names_the_file(values, tmp_path):
    saved = save(tmp_path, values)
    write_digests(saved.path)
    for file in (tmp_path / "3/state").rglob("d/*"):
        file.write_bytes(b"\x00" * file.stat().st_size)
    message = rf"checkpoint {re.escape(str(tmp_path / '3'))} cannot be read: .+ state/\S+ has changed; .*move that dir"
    with pytest.raises(CheckpointError, match=message):
        saved.leaves()[KERNEL].read()


def test_files_that_are_whole_are_never_to_be_moved_away(values, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise ConversionError("no") from PermissionError(13, "Permission denied")

    saved = save(tmp_path, values)
    write_digests(saved.path)
    monkeypatch.setattr(saved_parameters.StoredArrays, "read", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied .*its files are whole; look at") as raised:
        saved.leaves()[KERNEL].read()
    assert "away" not in str(raised.value) and "elete" not in str(raised.value)
