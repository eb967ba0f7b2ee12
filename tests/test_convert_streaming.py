"""Models of any size are converted and loaded a part at a time, and appear complete or not at all."""

import dataclasses
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from llava_jax import weights
from llava_jax.config import MeshConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.convert import orbax_weights, recycled, source
from llava_jax.convert.comparison import compare
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import write_hf
from llava_jax.convert.names import model_rows
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.opening import open_model
from llava_jax.convert.ours import write_model
from llava_jax.convert.progress import ProgressLine
from llava_jax.convert.source import Leaf, ModelSource, completed, extent
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.transposing import contiguous
from llava_jax.errors import CheckpointError
from llava_jax.sharding import make_mesh, parameter_sharding
from tests.tiny_models import (
    ROOT,
    assert_same_leaves,
    assert_same_tensors,
    export,
    random_source,
    save_llava,
)
from tools.convert_weights import main

COMMAND = [sys.executable, str(ROOT / "tools/convert_weights.py")]


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ours(llava_hf, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "ours"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_parts_small(monkeypatch)
        write_model(directory, open_model(llava_hf))
    return directory


def make_parts_small(monkeypatch) -> None:
    """So small that tiny leaves have many parts and tiles, and that the two do not fit each other."""
    monkeypatch.setattr(source, "_PART_BYTES", 300)
    monkeypatch.setattr(orbax_weights, "_TILE_BYTES", 2000)


@pytest.fixture
def small_parts(monkeypatch):
    make_parts_small(monkeypatch)


def random_index(shape, random) -> tuple[slice, ...]:
    bounds = [sorted(random.integers(0, size + 1, 2)) for size in shape]
    return tuple(slice(int(begin), int(end)) for begin, end in bounds)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 5000))
def test_parts_follow_each_other_and_cover_a_leaf_once(shape, axis, part_bytes):
    axis = min(axis, len(shape) - 1)
    leaf = Leaf(tuple(shape), np.dtype(np.float32), None, axis)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(source, "_PART_BYTES", part_bytes)
        parts = [completed(index, leaf.shape) for index in leaf.parts()]
    assert [i for part in parts for i in range(part[axis].start, part[axis].stop)] == list(range(shape[axis]))
    for part in parts:
        assert all(part[i] == slice(0, size) for i, size in enumerate(shape) if i != axis)
        assert math.prod(extent(part)) * 4 <= max(part_bytes, leaf.num_bytes // shape[axis])


@pytest.mark.parametrize("kind", ["llava-hf", "ours"])
def test_a_part_is_what_slicing_the_whole_gives(kind, llava_hf, ours, small_parts):
    model = open_model(llava_hf if kind == "llava-hf" else ours)
    random = np.random.default_rng(0)
    for name, leaf in model.leaves.items():
        whole = leaf.read()
        for index in [*leaf.parts(), *(random_index(leaf.shape, random) for _ in range(5))]:
            part = leaf.part(completed(index, leaf.shape))
            assert part.flags.c_contiguous and part.dtype == leaf.dtype
            np.testing.assert_array_equal(part, whole[index], err_msg=f"{name} {index}")


def test_of_a_file_only_the_rows_of_a_part_are_read(llava_hf, monkeypatch):
    model, calls, read = open_model(llava_hf), [], TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, *arguments: calls.append(arguments) or read(self, *arguments)
    )
    model.leaves["language_model.layers.mlp.up_proj.kernel"].part((slice(1, 2), slice(3, 9), slice(5, 7)))
    model.leaves["language_model.lm_head.kernel"].part((slice(0, 24), slice(40, 43)))
    model.leaves["language_model.embed_tokens.embedding"].part((slice(8, 9), slice(0, 24)))
    assert calls == [
        ("language_model.model.layers.1.mlp.up_proj.weight", 5, 7),
        ("language_model.lm_head.weight", 40, 43),
        ("language_model.model.embed_tokens.weight", 8, 9),
    ]


def bytes_read() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_of_a_stored_array_only_the_tiles_of_a_part_are_read(ours):
    leaf = open_model(ours).leaves["language_model.embed_tokens.embedding"]  # 90 x 24 x 2 bytes in four tiles
    leaf.part((slice(0, 1), slice(0, 24)))  # opens it
    before = bytes_read()
    leaf.part((slice(0, 1), slice(0, 24)))
    assert 23 * 24 * 2 <= bytes_read() - before < 1300


def test_plain_orbax_restores_what_was_written_in_parts(llava_hf, ours):
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(ours / "weights")
    model = open_model(llava_hf)
    assert sorted(restored) == sorted(model.names())
    for name in model.names():
        assert restored[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored[name], model.read(name), err_msg=name)


def test_what_plain_orbax_wrote_is_read(llava_hf, ours, tmp_path):
    """The directories that were written before weights were streamed."""
    model = open_model(llava_hf)
    (tmp_path / "old").mkdir()
    for name in ("config.json", "set_aside.safetensors"):
        (tmp_path / "old" / name).write_bytes((ours / name).read_bytes())
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old/weights", {name: model.read(name) for name in model.names()})
    assert_same_leaves(open_model(tmp_path / "old"), model)


@pytest.mark.parametrize("layout", ["llava-hf", "llava"])
def test_there_and_back_in_parts_is_bit_exact(layout, llava_hf, ours, tmp_path, small_parts):
    model = open_model(ours)
    for read, name in ((model.leaves.__getitem__, "parts"), (model.read, "whole")):
        export(model, tmp_path / name, layout, read=read)
    assert_same_tensors(tmp_path / "parts", tmp_path / "whole")
    found = list(compare(open_model(tmp_path / "parts"), open_model(llava_hf)))
    assert len(found) > 37 and all(one.detail == "bit-equal, bfloat16" for one in found)


def test_the_place_of_a_difference_is_counted_in_the_whole_leaf(llava_hf, small_parts):
    model = open_model(llava_hf)
    for name, place in (
        ("language_model.layers.mlp.down_proj.kernel", (1, 7, 5)),
        ("language_model.lm_head.kernel", (20, 88)),
    ):
        changed = model.read(name).copy()
        value = changed[place].item()
        changed[place] = 1000
        other = model.with_leaves({name: Leaf(changed.shape, changed.dtype, lambda changed=changed: changed)})
        (difference,) = [one for one in compare(model, other) if not one.equal]
        assert f" at {list(place)}: {value} and 1000.0, bfloat16" in difference.detail


def test_transposed_copies_are_exact():
    random = np.random.default_rng(0)
    for shape, dtype in (((300, 131), jnp.bfloat16), ((1, 500), np.float32), ((257, 129), np.float64)):
        array = random.standard_normal(shape).astype(dtype)
        copy = contiguous(array.T)
        assert copy.flags.c_contiguous and copy.dtype == dtype
        np.testing.assert_array_equal(copy, array.T)


def within_parts(model: ModelSource, asked: dict[str, int]) -> ModelSource:
    """`model`, whose leaves note how often they are read and refuse to give more than the largest of their parts."""

    def limited(name: str, leaf: Leaf) -> Leaf:
        largest = max(math.prod(extent(completed(index, leaf.shape))) for index in leaf.parts())

        def read(index=()):
            asked[name] = asked.get(name, 0) + 1
            assert math.prod(extent(completed(index, leaf.shape))) <= largest, (name, index)
            return leaf.part(index)

        return dataclasses.replace(leaf, read=read)

    return model.with_leaves({name: limited(name, leaf) for name, leaf in model.leaves.items()})


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("kind", ["llava-hf", "ours"])
def test_no_work_asks_for_more_than_one_part_at_a_time(kind, dtype, llava_hf, ours, tmp_path, monkeypatch):
    # The patches' kernel, 5 MB in CLIP ViT-L/14, is written whole; here it takes 588 x 16 x 2 bytes.
    monkeypatch.setattr(source, "_PART_BYTES", 1000)
    model, asked = open_model(llava_hf if kind == "llava-hf" else ours), {}
    patches = "vision_tower.patch_embedding.kernel"
    limited = within_parts(model, asked).with_leaves({patches: model.leaves[patches]})
    read = limited.leaves.__getitem__
    export(limited, tmp_path / "hf", "llava-hf", read=read, dtype=dtype)
    export(limited, tmp_path / "llava", "llava", read=read, dtype=dtype)
    write_model(tmp_path / "ours", limited)
    assert all(one.equal for one in compare(limited, open_model(tmp_path / "ours")))
    parts = {name: len(limited.leaves[name].parts()) for name in asked}
    assert {name: 4 * count for name, count in parts.items()} == asked
    assert parts["language_model.lm_head.kernel"] > 4 and parts["language_model.embed_tokens.embedding"] > 4
    assert parts["language_model.layers.mlp.up_proj.kernel"] == model.config.text.num_hidden_layers


def test_memory_is_used_again_only_when_no_view_of_it_is_left(monkeypatch):
    monkeypatch.setattr(recycled, "_kept", {})
    first = recycled.empty((512, 1024), np.float32)
    place, view = first.ctypes.data, first[:3].T
    first[...] = 1
    del first
    other = recycled.empty((2**20,), jnp.bfloat16)
    other[...] = 2
    np.testing.assert_array_equal(view, np.ones((1024, 3)))
    assert other.ctypes.data != place
    del view
    again = recycled.empty((1100, 512), np.float16)
    assert again.ctypes.data == place and again.shape == (1100, 512) and again.flags.c_contiguous
    for _ in range(3):
        arrays = [recycled.empty((2**26,), np.uint8) for _ in range(9)]
        assert len({array.ctypes.data for array in arrays}) == 9
        del arrays
    assert 0 < sum(memory.nbytes for memory in recycled._kept.values()) <= 400 * 2**20


def test_loading_keeps_no_memory_for_later(monkeypatch):
    monkeypatch.setattr(recycled, "_kept", {0: np.empty(9, np.uint8)})
    model, arrays = random_source()
    leaves = {name: Leaf(array.shape, array.dtype, lambda a=array: a) for name, array in arrays.items()}
    source = ModelSource("parts", model, leaves)
    weights.load(source, source.names(), jnp.bfloat16, lambda *leaf: SingleDeviceSharding(jax.devices()[0]))
    assert recycled._kept == {}


def test_neither_direction_holds_more_than_a_few_layers(tmp_path, monkeypatch):
    """24 layers of 3 x 0.7 MB and 17000 tokens: each of the widest leaves takes 17 MB."""
    model = ModelConfig(
        vision=VisionConfig(16, 32, 2, 2, 28, 14), text=TextConfig(17_000, 256, 704, 24, 4, 4, 64)
    )
    monkeypatch.setattr(source, "_PART_BYTES", 2**20)
    random = np.random.default_rng(0)

    def leaf(shape):
        return Leaf(
            shape,
            np.dtype(np.float32),
            lambda index=(): random.random(extent(completed(index, shape)), np.float32),
            axis=0,
        )

    drawn = ModelSource("parts", model, {row.leaf: leaf(row.shape) for row in model_rows(model)})
    assert max(leaf.num_bytes for leaf in drawn.leaves.values()) > 17_000_000
    write_hf(tmp_path / "hf", layout="llava-hf", model=model, read=drawn.leaves.__getitem__)
    hf = open_model(tmp_path / "hf")

    def peak(work) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    import orbax.checkpoint  # noqa: F401 (its modules are no part of the measurement)

    assert peak(lambda: write_model(tmp_path / "ours", hf)) < 6_000_000
    ours = open_model(tmp_path / "ours")
    assert (
        peak(
            lambda: write_hf(tmp_path / "back", layout="llava-hf", model=model, read=ours.leaves.__getitem__)
        )
        < 6_000_000
    )
    assert peak(lambda: list(compare(hf, open_model(tmp_path / "back")))) < 12_000_000


def test_everything_is_on_the_disk_before_the_name_appears(llava_hf, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file)
    )

    def renamed(old, new):
        if str(new) == str(tmp_path / "ours"):
            files = {str(path) for path in Path(old).rglob("*")} | {str(old)}
            assert len(files) > 5 and files <= set(events)
            events.clear()
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    write_model(tmp_path / "ours", open_model(llava_hf))
    assert events == [str(tmp_path)]  # the name itself


def test_what_the_disk_refuses_while_more_is_written_is_no_success(tmp_path, monkeypatch):
    """The system tells of it once, to whoever asks first."""
    told, fsync = threading.Event(), os.fsync

    def failing(file):
        if told.is_set():
            return fsync(file)
        told.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"), new_directory(tmp_path / "new") as partial:
        (partial / "file").write_bytes(bytes(100))
        assert told.wait(30)
    assert list(tmp_path.iterdir()) == []


def killed_when(command, condition, signal_number) -> int:
    """Runs a command, sends the signal once condition() holds; -> its exit status."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not condition() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
        process.send_signal(signal_number)
        return process.wait(60)
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["from-hf", "to-hf"])
def test_a_killed_command_leaves_nothing_complete_and_the_next_try_works(name, llava_hf, ours, tmp_path):
    given = llava_hf if name == "from-hf" else ours
    command = [*COMMAND, name, str(given), str(tmp_path / "new")]
    partial = tmp_path / "new.incomplete"

    def half_way():
        return partial.is_dir() and any(path.stat().st_size for path in partial.rglob("*") if path.is_file())

    for _ in range(5):  # unless it was done before the signal came
        if killed_when(command, half_way, signal.SIGKILL) == -signal.SIGKILL:
            break
        shutil.rmtree(tmp_path / "new")
    assert partial.is_dir() and not (tmp_path / "new").exists()
    (partial / "more").write_text("of an earlier try")
    with pytest.raises(ConversionError):
        open_model(partial)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert_same_leaves(open_model(tmp_path / "new"), open_model(given))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert not (tmp_path / "new/more").exists()


def test_ctrl_c_removes_what_was_written(llava_hf, tmp_path, monkeypatch, capsys):
    written = []

    def interrupted(self, num_bytes):
        written.extend(tmp_path.rglob("*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "__call__", interrupted)
    for name in ("from-hf", "to-hf"):
        assert main([name, str(llava_hf), str(tmp_path / "new")]) == 130
        assert written and list(tmp_path.iterdir()) == []
        written.clear()
    assert "interrupted; what was written so far is removed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["from-hf", "to-hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name, llava_hf, tmp_path):
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 3; exec "$@"', "", *COMMAND, name, str(llava_hf), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 12
    assert done.stderr.startswith("convert_weights.py: ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_named_and_never_read_as_zeros(llava_hf, tmp_path):
    write_model(tmp_path / "ours", open_model(llava_hf))
    for path in (tmp_path / "ours/weights/d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    model = open_model(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"cannot be read .*convert the model again"):
        for name in model.names():
            model.read(name)


def test_a_lost_tile_is_an_error_and_no_zeros(llava_hf, tmp_path):
    write_model(tmp_path / "ours", open_model(llava_hf))
    base = {"driver": "file", "path": f"{tmp_path}/ours/weights/"}
    tiles = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    tiles.write("language_model.norm.scale/0", None).result()
    with pytest.raises(ConversionError, match=r"language_model\.norm\.scale cannot be read"):
        open_model(tmp_path / "ours").read("language_model.norm.scale")


def test_progress_is_told_every_ten_seconds_without_a_terminal(capsys):
    now = iter([0, 4, 10, 12, 20])
    line = ProgressLine(10_000_000_000, clock=lambda: next(now))
    for _ in range(4):
        line(2_000_000_000)
    line.close()
    assert capsys.readouterr().err.splitlines() == [
        "4.00 of 10.00 GB  0.40 GB/s  ETA 0:00:15",
        "8.00 of 10.00 GB  0.40 GB/s  ETA 0:00:05",
    ]


def test_progress_is_rewritten_in_place_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = iter([0, 1, 1.1, 2])
    line = ProgressLine(3_000_000_000, clock=lambda: next(now))
    for _ in range(3):
        line(1_000_000_000)
    line.close()
    first, second, cleared, empty = capsys.readouterr().err.split("\r")[1:]
    assert first.rstrip() == "1.00 of 3.00 GB  1.00 GB/s  ETA 0:00:02"
    assert second.rstrip() == "3.00 of 3.00 GB  1.50 GB/s  ETA 0:00:00"
    assert len(cleared) == len(first) and not cleared.strip() and not empty


def test_progress_counts_every_byte_of_a_model(llava_hf, ours, tmp_path, small_parts):
    model = open_model(llava_hf)
    for work in (
        lambda told: write_model(tmp_path / "a", model, progress=told),
        lambda told: export(model, tmp_path / "b", "llava", read=model.leaves.__getitem__, progress=told),
        lambda told: list(compare(model, open_model(ours), progress=told)),
    ):
        told = []
        work(told.append)
        aside = sum(leaf.num_bytes for leaf in model.idle.values())
        assert sum(told) in (model.num_bytes(), model.num_bytes() + aside) and len(told) >= 78


MESHES = {
    "one device": {"data": 1, "fsdp": 1, "tensor": 1},
    "replicated": {"data": 8, "fsdp": 1, "tensor": 1},
    "sharded": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["llava-hf", "ours"])
def test_loading_gives_the_same_values_and_checksums_on_every_mesh(
    kind, mesh, llava_hf, ours, monkeypatch, small_parts
):
    model = open_model(llava_hf if kind == "llava-hf" else ours)
    sizes = MESHES[mesh]
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    checksums = {}
    loaded = weights.load(
        model, model.names(), jnp.float32, lambda *leaf: parameter_sharding(mesh, *leaf), checksums
    )
    for name, array in loaded.items():
        whole = model.read(name)
        np.testing.assert_array_equal(array, whole.astype(np.float32), err_msg=name)
        assert array.sharding.is_equivalent_to(parameter_sharding(mesh, name, whole.shape), whole.ndim)
        assert checksums[name] == zlib.crc32(whole.tobytes()), name


def test_without_checksums_a_process_reads_only_around_its_own_shards(small_parts):
    class OfThisProcess:
        """Two of four devices: rows 0 to 8 and 8 to 16 of each layer's 32."""

        def addressable_devices_indices_map(self, shape):
            return {i: (slice(None), slice(8 * i, 8 * i + 8), slice(None)) for i in range(2)}

    values = np.random.default_rng(0).random((6, 32, 5), np.float32)
    asked = []
    leaf = Leaf(values.shape, values.dtype, lambda index: asked.append(index) or values[index], axis=0)
    shards = weights._Shards(values.shape, np.dtype(np.float32), OfThisProcess())
    shards.fill(leaf, leaf.parts(), within=shards.bounds)
    assert len(asked) == 6 and all(index[1] == slice(0, 16) for index in asked)
    for i, buffer in enumerate(shards.buffers.values()):
        np.testing.assert_array_equal(buffer, values[:, 8 * i : 8 * i + 8])


def test_loading_to_a_sharding_of_no_table_works(llava_hf):
    model = open_model(llava_hf)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
    name = "language_model.layers.input_layernorm.scale"  # [2, 24], here sharded over layers
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[1], None))
    (array,) = weights.load(model, [name], jnp.bfloat16, lambda *_: sharding).values()
    np.testing.assert_array_equal(array, model.read(name))
    assert array.addressable_shards[1].data.shape == (1, 24)


def test_a_frozen_leaf_that_has_changed_is_refused_in_parts_and_whole(llava_hf, small_parts):
    name = "language_model.layers.mlp.up_proj.kernel"
    leaf = open_model(llava_hf).leaves[name]
    crc = zlib.crc32(leaf.read().tobytes())
    part = leaf.parts()[1]
    np.testing.assert_array_equal(weights._verified(name, leaf, crc, Path("run")).part(part), leaf.part(part))
    for index in ((), part):
        with pytest.raises(CheckpointError, match=f"{name} has changed since run was trained"):
            weights._verified(name, leaf, crc + 1, Path("run")).part(index)
