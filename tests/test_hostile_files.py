"""Files that lie or attack end in an error that names them; they run nothing and cost nothing."""

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llava_jax.convert.errors import ConversionError
from llava_jax.convert.restricted_pickle import run_pickle
from llava_jax.convert.tensors import TensorFiles
from tests.tiny_models import save_llava
from tools.convert_weights import main


def write_zip(path: Path, program: bytes, storages: dict | None = None, root="archive", **more) -> Path:
    """What torch.save would write around a pickle."""
    entries = {f"{root}/data.pkl": program, f"{root}/byteorder": b"little", f"{root}/version": b"3\n"}
    entries |= {f"{root}/data/{key}": data for key, data in (storages or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (entries | {f"{root}/{name}": data for name, data in more.items()}).items():
            archive.writestr(name, data)
    return path


def tensor(
    *, key=b"0", size=4, offset=0, shape=(4,), strides=(1,), storage=b"torch\nFloatStorage", tail=b""
) -> bytes:
    """The instructions that push one tensor."""
    identity = (
        b"(X\x07\x00\x00\x00storagec" + storage + b"\n" + text(key) + text(b"cpu") + number(size) + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (identity + number(offset) + numbers(shape) + numbers(strides))
        + (b"\x89ccollections\nOrderedDict\n)R" + tail + b"tR")
    )


def text(data: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = pickle.dumps(value, 2)
    return data[2:-1]


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def program(content: bytes) -> bytes:
    """A pickle that gives a dictionary of what `content` pushes under the name "a"."""
    return b"\x80\x02}" + text(b"a") + content + b"s."


def opened(path: Path, content: bytes, **options) -> TensorFiles:
    return TensorFiles(write_zip(path / "x.bin", program(content), {"0": bytes(16)}, **options))


def refused(path: Path, content: bytes, message: str, **options) -> None:
    with pytest.raises(ConversionError, match=rf"x\.bin cannot be read .*{message}.*Nothing in it was run"):
        opened(path, content, **options)


def test_the_files_made_here_are_read_if_they_do_not_lie(tmp_path):
    assert opened(tmp_path, tensor()).read("a").tolist() == [0, 0, 0, 0]
    assert torch.load(tmp_path / "x.bin")["a"].tolist() == [0, 0, 0, 0]


class Calling:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {canary}"),
        (eval, "open('{canary}', 'w')"),
        (exec, "open('{canary}', 'w')"),
        (open, "{canary}", "w"),
        (__import__, "canary"),
        (getattr, "x", "__class__"),
        (torch.load, "{canary}"),
        (torch.hub.load, "a/b", "c"),
        (torch._utils._rebuild_device_tensor_from_numpy, 1),
        (torch.jit.load, "{canary}"),
        (collections.OrderedDict.fromkeys, "ab"),
        (collections.defaultdict, list),
    ],
    ids=lambda call: call[0].__qualname__,
)
def test_no_pickle_runs_code(call, protocol, tmp_path, monkeypatch):
    canary = tmp_path / "canary.py"
    function, *arguments = call
    arguments = [
        argument.format(canary=canary) if type(argument) is str else argument for argument in arguments
    ]
    data = pickle.dumps({"a": Calling(function, *arguments)}, protocol)
    for file in (write_zip(tmp_path / "x.bin", data), tmp_path / "legacy.bin"):
        if file.name == "legacy.bin":
            header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
            file.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + data + pickle.dumps([], 2))
        with pytest.raises(ConversionError, match=rf"{file.name}.* it asks for .*Nothing in it was run"):
            TensorFiles(file)
    assert not canary.exists()


def test_no_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(tmp_path, b"cevil\nFloatStorage\n", r"asks for 'evil\.FloatStorage'")
    refused(tmp_path, text(b"evil") + text(b"x") + b"\x93", r"asks for 'evil\.x'")
    refused(tmp_path, b"(ievil\nx\n", "instruction INST")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ctorch\nFloatStorage\n)R", "no constructor"),
        (text(b"os") + b")R", "no constructor"),
        (b"ccollections\nOrderedDict\n(K\x01tR", "its pickle is broken"),
        (b"ccollections\nOrderedDict\n}R", "no constructor"),
        (tensor() + b"}b", "attributes are set on what is no dictionary"),
        (b"}(K\x01K\x02tb", "attributes are set"),
        (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "a parameter is no tensor"),
        (b"h\x05", "its pickle is broken"),
        (b"j\xff\xff\xff\xff", "its pickle is broken"),
        (b"t", "its pickle is broken"),
        (b"0000", "instruction POP"),
        (b"Pos.system\n", "instruction PERSID"),
        (b"\x82\x01", "instruction EXT1"),
        (b")\x81", "instruction NEWOBJ"),
        (b"o", "instruction OBJ"),
        (b"\x97", "instruction NEXT_BUFFER"),
        (b"}(K\x01K\x02K\x03u", "no dictionary"),
        (b"})K\x01s", "a tuple as a key"),
        (b"((((tttttttt", "its pickle is broken"),
        (b"X\xff\xff\xff\xffa", "its pickle is broken"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa", "its pickle is broken"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fa", "its pickle is broken"),
        (b"\x8b\xff\xff\xff\x7f1", "its pickle is broken"),
        (b"I" + b"9" * 10000 + b"\n", "its pickle is broken"),
        (b"\xfe", "its pickle is broken"),
        (tensor(storage=b"torch\nUntypedStorage"), "asks for"),
        (tensor(storage=b"collections\nOrderedDict"), "no storage"),
        (tensor(key=b"1"), "values of a are not in it"),
        (tensor(key=b"../byteorder"), "values of a are not in it"),
        (tensor(key=b"/etc/passwd"), "values of a are not in it"),
        (tensor(size=5), "storage of 20 bytes, but 16 are there"),
        (tensor(size=3, shape=(3,)), "storage of 12 bytes, but 16 are there"),
        (tensor(shape=(5,)), r"\[5\] reaches beyond"),
        (tensor(offset=1), "reaches beyond"),
        (tensor(strides=(2,)), "reaches beyond"),
        (tensor(offset=-1), "no integer of 64 bits"),
        (tensor(strides=(-1,)), "no integer of 64 bits"),
        (tensor(shape=(-4,)), "no integer of 64 bits"),
        (tensor(shape=(2**62, 2**62), strides=(0, 0)), "repeats the 4 elements"),
        (tensor(shape=(2**70,)), "no integer of 64 bits"),
        (tensor(shape=(10**6,), strides=(0,)), "repeats the 4 elements"),
        (tensor(shape=(2, 2)), "2 dimensions and 1 strides"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "65 dimensions"),
        (tensor(tail=b"}" + text(b"conj") + b"\x88s"), "has metadata"),
        (tensor(tail=b"NN"), "its pickle is broken"),
    ],
)
def test_programs_that_no_torch_wrote_are_refused(content, message, tmp_path):
    refused(tmp_path, content, message)


BOMBS = {
    "nested tuples": b")" + b"\x85" * 2**18 + b".",
    "nested lists": b"]" * 2**18 + b"a" * (2**18 - 1) + b".",
    "doubling": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 5000 + b".",
    "doubled key": b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 5000 + b"h\x00s.",
    "huge memo": b"\x80\x02)r\xff\xff\xff\x7fr\xff\xff\xff\xff.",
    "huge string": b"\x80\x02X\xff\xff\xff\x7fa.",
    "huge bytes": b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_small_pickles_cost_little(bomb, tmp_path):
    file = write_zip(tmp_path / "x.bin", bomb)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ConversionError, match=r"x\.bin cannot be read"):
        TensorFiles(file)
    assert time.monotonic() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    tracemalloc.stop()


def test_long_pickles_and_compressed_ones_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    with pytest.raises(ConversionError, match=r"'archive/data\.pkl' is compressed"):
        TensorFiles(tmp_path / "x.bin")
    write_zip(tmp_path / "x.bin", b"}" * (2**22 + 1))
    with pytest.raises(ConversionError, match="takes 4194305 bytes, more than"):
        TensorFiles(tmp_path / "x.bin")


def patched(path: Path, what: bytes, by: bytes, *, last: bool = False) -> None:
    """Replaces the first or last occurrence."""
    data = path.read_bytes()
    found = data.rindex(what) if last else data.index(what)
    path.write_bytes(data[:found] + by + data[found + len(what) :])


def test_zip_files_that_lie_are_refused(tmp_path):
    file = tmp_path / "x.bin"

    def make(**more):
        write_zip(file, program(tensor()), {"0": bytes(16)}, **more)

    def expect(message):
        with pytest.raises(ConversionError, match=rf"x\.bin cannot be read.*{message}"):
            TensorFiles(file)

    make()
    patched(file, b"archive/data/0", b"archive/data/1")  # only in front of the data
    expect("'archive/data/0' is not where its directory says")
    make()
    patched(file, b"archive/version", b"archive/data/0\0", last=True)  # and zipfile stops at a zero byte
    expect("two entries 'archive/data/0'")
    make()
    data = file.read_bytes()
    directory = data.index(b"PK\x01\x02")
    entry = data.index(b"PK\x01\x02", directory + 4)
    size = struct.unpack_from("<H", data, directory + 28)[0]
    assert data[directory + 46 : directory + 46 + size] == b"archive/data.pkl"
    second = struct.unpack_from("<I", data, entry + 42)[0]
    for place, value, message in (
        (directory + 42, second, "is not where its directory says|reaches into another"),  # its offset
        (directory + 20, 2**20, "is compressed"),  # its size in the zip only
        (directory + 8, 1, "encrypted"),
    ):
        changed = bytearray(data)
        struct.pack_into("<H" if value == 1 else "<I", changed, place, value)
        file.write_bytes(changed)
        expect(message)
    changed = bytearray(data)
    struct.pack_into("<II", changed, directory + 20, second + 1, second + 1)
    file.write_bytes(changed)
    expect("reaches into another")
    struct.pack_into("<II", changed, directory + 20, 2**31, 2**31)
    file.write_bytes(changed)
    expect("reaches into another")

    make(root="..")
    assert TensorFiles(file).names() == ["a"]  # nothing is unpacked, so a root is only a name
    make(**{"constants.pkl": b""})
    expect("TorchScript")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    expect("without the one data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program(tensor()))
        archive.writestr("b/data.pkl", program(tensor()))
    expect("without the one data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/byteorder", b"big")
        archive.writestr("a/data.pkl", program(tensor()))
    expect("big-endian")
    make()
    patched(file, b"FloatStorage", b"LongStorage\n")
    expect("damaged")


LEGACY = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


@pytest.mark.parametrize(
    "header, keys, sizes, message",
    [
        ((LEGACY[0], 1002, LEGACY[2]), ["0"], [4], "another version"),
        ((*LEGACY[:2], {"little_endian": False}), ["0"], [4], "big-endian"),
        ((*LEGACY[:2], {}), ["0"], [4], "big-endian"),
        (LEGACY, "0", [4], "list of storages is broken"),
        (LEGACY, ["0", "0"], [4, 4], "list of storages is broken"),
        (LEGACY, [], [], "values of a are not in it"),
        (LEGACY, ["0", "1"], [4, 4], "a storage that no tensor uses"),
        (LEGACY, ["0"], [5], "ends before its last tensor"),
        (LEGACY, ["0"], [2**63], "ends before its last tensor"),
        (LEGACY, ["0"], [3], "storage of 16 bytes, but 12 are there"),
    ],
)
def test_files_before_torch_1_6_that_lie_are_refused(header, keys, sizes, message, tmp_path):
    def write(header, keys, sizes):
        parts = [pickle.dumps(part, 2) for part in header] + [program(tensor()), pickle.dumps(keys, 2)]
        parts += [struct.pack("<Q", size) + bytes(16) for size in sizes]
        (tmp_path / "x.bin").write_bytes(b"".join(parts))

    write(LEGACY, ["0"], [4])
    assert TensorFiles(tmp_path / "x.bin").read("a").tolist() == [0, 0, 0, 0]
    write(header, keys, sizes)
    with pytest.raises(ConversionError, match=rf"x\.bin cannot be read.*{message}"):
        TensorFiles(tmp_path / "x.bin")


def save(path: Path, format: str) -> bytes:
    """A good file of a format."""
    tensors = {"first": torch.arange(6.0).reshape(2, 3), "second": torch.ones(5).bfloat16()}
    if format == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=format == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(format, tmp_path):
    file = tmp_path / "x.safetensors"
    data = save(file, format)
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(ConversionError, match=r"x\.safetensors"):
            TensorFiles(file)


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
def test_a_file_cut_after_opening_is_refused(format, tmp_path):
    file = tmp_path / "x.bin"
    data = save(file, format)
    files = TensorFiles(file)
    cut = data.index(torch.arange(6.0).numpy().tobytes()) + 10
    file.write_bytes(data[:cut])
    with pytest.raises(ConversionError, match=r"x\.bin"):
        files.read("first")


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_gives_tensors(tmp_path_factory, format, changes):
    file = tmp_path_factory.getbasetemp() / f"damaged.{format}"
    data = bytearray(save(file, format))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    file.write_bytes(data)
    try:
        files = TensorFiles(file)
        for name in files.names():
            array = files.read(name)
            assert array.shape == files.shape(name)
            assert array.nbytes <= len(data)
    except ConversionError as error:
        assert file.name in str(error)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [bytes([i]) for i in range(256)]
            + [
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"ctorch\nFloatStorage\n",
                b"ccollections\nOrderedDict\n",
            ]
            + [
                tensor(),
                b"K\x01",
                text(b"a"),
                b"(",
                b"t",
                b"}",
                b"R",
                b"Q",
                b"q\x00",
                b"h\x00",
                b"s",
                b"b",
                b".",
            ]
        ),
        max_size=30,
    )
)
def test_any_program_ends_in_a_value_or_a_refusal(instructions):
    with contextlib.suppress(pickle.UnpicklingError):
        run_pickle(io.BytesIO(b"".join(instructions)))


def entry(begin, end, shape, dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    "header, message",
    [
        (f'{{"a": {entry(0, 128, [32])}}}', "not fully covered"),
        (f'{{"a": {entry(0, 16, [4])}}}', "not fully covered"),
        (f'{{"a": {entry(0, 64, [5])}}}', "invalid shape, data type, or offset"),
        (f'{{"a": {entry(0, 64, [16], "F16")}}}', "invalid shape, data type, or offset"),
        (f'{{"a": {entry(0, 64, [16])}, "b": {entry(0, 64, [16])}}}', "invalid offset for tensor"),
        (f'{{"a": {entry(0, 32, [8])}, "b": {entry(16, 64, [12])}}}', "invalid offset for tensor"),
        (f'{{"a": {entry(0, 16, [4])}, "b": {entry(48, 64, [4])}}}', "invalid offset for tensor"),
        (f'{{"a": {entry(64, 0, [16])}}}', "invalid offset for tensor"),
        (f'{{"a": {entry(-64, 0, [16])}}}', "invalid JSON"),
        (f'{{"a": {entry(0, 64, [-4, -4])}}}', "invalid JSON"),
        (f'{{"a": {entry(0, 64, [2**62, 16])}}}', "overflow"),
        (f'{{"a": {entry(0, 64, [10**30])}}}', "invalid JSON"),
        (f'{{"a": {entry(0, 64, [float("nan")])}}}', "invalid JSON"),
        (f'{{"a": {entry(0, 64, [16], "F99")}}}', "invalid JSON"),
        (f'{{"a": {entry(0, 64, [16])}, "a": {entry(0, 64, [16], "I32")}}}', "its header lists a twice"),
        (f'{{"a": {entry(0, 0, [0])}, "a": {entry(0, 64, [16])}}}', "its header lists a twice"),
        ("[]", "invalid JSON"),
        ('{"a":' * 9999, "invalid JSON"),
        ('{"\xff": 1}', "invalid UTF-8"),
    ],
)
def test_safetensors_headers_that_lie_are_refused(header, message, tmp_path):
    encoded = header.encode("latin-1")
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(64))
    with pytest.raises(ConversionError, match=rf"x\.safetensors cannot be read .*{message}"):
        TensorFiles(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [65, 10**6, 90 * 10**6, 2**40, 2**63, 2**64 - 1])
def test_safetensors_headers_longer_than_the_file_are_refused(length, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}".ljust(64))
    with pytest.raises(ConversionError, match=r"x\.safetensors cannot be read .*header"):
        TensorFiles(tmp_path / "x.safetensors")


def test_names_that_could_steer_a_terminal_are_refused(tmp_path):
    for name in ("a\x1b[2J", "a\nb", "x" * 1001):
        torch.save({name: torch.ones(1)}, tmp_path / "x.bin")
        save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
        for file in ("x.bin", "x.safetensors"):
            with pytest.raises(ConversionError, match=r"which is no name") as error:
                TensorFiles(tmp_path / file)
            assert str(error.value).isprintable() and len(str(error.value)) < 300


def index(directory: Path, weight_map, name="pytorch_model.bin") -> None:
    file = directory / f"{name}.index.json"
    file.write_text(weight_map if type(weight_map) is str else json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "1.bin", "b": "3.bin"}, r"lists the shard 3\.bin, which is not there"),
        ({"a": "1.bin", "b": "1.bin"}, r"do not hold \(b\)"),
        ({"a": "1.bin", "c": "2.bin"}, r"tensor c is in 1\.bin and in 2\.bin"),
        ({"a": "../outside.bin"}, "outside its directory for a, to '../outside.bin'"),
        ({"a": "sub/../../outside.bin"}, "outside its directory"),
        ({"a": "/etc/passwd"}, "outside its directory"),
        ({"a": ""}, "outside its directory"),
        ({"a": 3}, "outside its directory"),
        ({"a": "."}, "should be a file"),
        ({"a": "folder.bin"}, r"folder\.bin should be a file"),
        ({"a": "pipe.bin"}, r"pipe\.bin should be a file"),
        ({}, "no weight_map"),
        ({"a": "text.bin"}, "neither a safetensors file nor one by torch"),
        ({"a": "lfs.bin"}, "git lfs pull"),
        ('{"weight_map": {"a": "1.bin", "a": "2.bin"}}', "the key 'a' comes twice"),
        ('{"weight_map": NaN}', "NaN is no JSON"),
        ('{"weight_map": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 10**5, "cannot be read as JSON"),
        ("[]", "should hold a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_an_index_that_lies_is_refused(name, weight_map, message, tmp_path):
    directory = tmp_path / "model"
    (directory / "folder.bin").mkdir(parents=True)
    os.mkfifo(directory / "pipe.bin")
    torch.save({"a": torch.ones(1), "c": torch.ones(1)}, directory / "1.bin")
    torch.save({"c": torch.ones(1)}, directory / "2.bin")
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.bin")
    (directory / "text.bin").write_text("<!doctype html><html><body>Not found</body></html>")
    (directory / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    index(directory, weight_map, name)
    with pytest.raises(ConversionError, match=message):
        TensorFiles(directory)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "blobs/0123")
    (tmp_path / "snapshot/1.bin").symlink_to("../blobs/0123")
    index(tmp_path / "snapshot", {"a": "1.bin"})
    np.testing.assert_array_equal(TensorFiles(tmp_path / "snapshot").read("a"), [1, 1])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "only.bin", "only.safetensors"])
def test_directories_in_place_of_files_are_refused(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ConversionError, match=rf"{name} should be a file"):
        TensorFiles(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("a.bin", "b.bin", "training_args.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(
        ConversionError, match=r"2 \.bin files \(a\.bin, b\.bin\).*pytorch_model\.bin\.index\.json"
    ):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("attack", ["code", "values"])
def test_a_conversion_that_is_refused_writes_nothing(attack, tmp_path, capsys):
    source = save_llava(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    if attack == "code":
        write_zip(file, pickle.dumps({"a": Calling(os.system, f"touch {tmp_path / 'ran'}")}, 2))
    else:
        torch.save(tensors, file)
        last = list(tensors.values())[-1].numpy().tobytes()
        patched(file, last, bytes([last[0] ^ 1]) + last[1:])
    capsys.readouterr()
    assert main(["from-hf", str(source), str(tmp_path / "ours")]) == 12
    error = capsys.readouterr().err
    assert error.startswith("convert_weights.py: ") and error.count("\n") == 1 and str(file) in error
    assert os.listdir(tmp_path) == ["source"]
