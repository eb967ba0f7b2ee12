"""Steps on eight CPU devices against one device, what each device holds, and what travels between them."""

import collections
import dataclasses
import functools
import math
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.config_values import from_json
from llava_jax.decoding import GREEDY, continue_prompts
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.program import Program
from llava_jax.recipe import vicuna
from llava_jax.sharding import (
    arrange,
    make_mesh,
    num_row_shards,
    own_rows,
    parameter_sharding,
    place_batch,
)
from llava_jax.step import abstract_model, abstract_tuned_model, random_parameters
from llava_jax.tuning import is_trainable

# No two sizes are alike, so that a shape in a compiled program tells what it is of.
T, V, D, N, H, F, C = 128, 2080, 64, 4, 24, 112, 48
MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=C,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    text=TextConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=2,
        num_attention_heads=N,
        num_key_value_heads=2,
        head_dim=H,
        max_position_embeddings=256,
    ),
)
STAGE1 = TuneConfig(language_model="frozen")
ROWS = 16


def make_config(sizes, zero=3, *, accumulation=1, tune=None, offload=False, dtype="float32") -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(batch_size=ROWS, max_length=T),
        tune=tune or TuneConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0),
        loss=LossConfig(chunk_size=32),
        train=TrainConfig(accumulation_steps=accumulation, dtype=dtype, frozen_dtype=dtype),
        mesh=MeshConfig(*sizes),
        sharding=ShardingConfig(zero, offload),
    )


def make_program(config: Config) -> Program:
    devices = math.prod(dataclasses.astuple(config.mesh))
    return Program(config, make_mesh(config.mesh, jax.devices()[:devices]), num_steps=3)


def make_rows(kind: str) -> dict[str, np.ndarray]:
    """A batch of random rows [ROWS, ...]: padded (a sample each), packed (two each) or text (without images)."""
    rng = np.random.default_rng(["padded", "packed", "text"].index(kind))
    tokens, labels, positions, segment_ids = (np.zeros((ROWS, T), np.int32) for _ in range(4))
    labels[:] = -100
    for row in range(ROWS):
        begin = 0
        for segment in range(1, 3 if kind == "packed" else 2):
            length = rng.integers(30, T // 2)
            place = slice(begin, begin + length)
            tokens[row, place] = rng.integers(1, V, length)
            answer = slice(begin + rng.integers(20, 25), begin + length)
            labels[row, answer] = tokens[row, answer]
            positions[row, place], segment_ids[row, place] = np.arange(length), segment
            begin += length
        if kind != "text":
            tokens[row, 2 : 2 + MODEL.num_image_tokens] = IMAGE_TOKEN
    images = rng.integers(0, 256, (ROWS, int(kind != "text"), 32, 32, 3), np.uint8)
    return dict(tokens=tokens, labels=labels, positions=positions, segment_ids=segment_ids, images=images)


@functools.cache
def draw_parameters() -> dict[str, np.ndarray]:
    drawn = random_parameters(MODEL, 0, abstract_model(MODEL)[1].keys())
    return {name: np.asarray(value) for name, value in drawn.items()}


def train(config: Config, kinds: tuple[str, ...]):
    """Losses and gradient norms of a step per batch, and the parameters after each."""
    program = make_program(config)
    drawn = draw_parameters()

    def place(abstract):
        return {name: jax.device_put(drawn[name], leaf.sharding) for name, leaf in abstract.items()}

    state, frozen = program.new_state(place(program.abstract_trainable())), place(program.abstract_frozen())
    step, microbatches = program.train_step(), config.train.accumulation_steps
    figures, parameters = [], []
    for kind in kinds:
        batch = {
            key: value.reshape(microbatches, ROWS // microbatches, *value.shape[1:])
            for key, value in make_rows(kind).items()
        }
        state, metrics = step(state, frozen, place_batch(program.mesh, batch))
        figures.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        parameters.append({name: np.asarray(value) for name, value in state.trainable.items()})
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, program.abstract_state()
    )
    return np.array(figures), parameters


@functools.cache
def train_on_one_device(tune: TuneConfig):
    return train(make_config((1, 1, 1), tune=tune), ("packed", "padded", "text"))


@pytest.mark.parametrize(
    ("sizes", "settings", "num_steps"),  # the third step has other shapes, which are compiled anew
    [
        ((8, 1, 1), dict(), 1),
        ((1, 8, 1), dict(zero=3, accumulation=2), 3),
        ((1, 8, 1), dict(zero=2, accumulation=2), 2),
        ((1, 8, 1), dict(zero=1), 2),
        ((2, 2, 2), dict(zero=3), 3),
        ((1, 4, 2), dict(zero=2, tune=STAGE1, offload=True), 2),
    ],
    ids=["data", "zero3", "zero2", "zero1", "all-axes", "stage1-offload"],
)
def test_eight_devices_take_the_same_steps_as_one(sizes, settings, num_steps):
    kinds = ("packed", "padded", "text")[:num_steps]
    figures, parameters = train(make_config(sizes, **settings), kinds)
    expected, expected_parameters = train_on_one_device(settings.get("tune") or TuneConfig())
    np.testing.assert_allclose(figures, expected[:num_steps], rtol=1e-5)
    for found, expected in zip(parameters, expected_parameters, strict=False):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


def parts(tree) -> dict[str, int]:
    """Into how many parts the leaves of two and more dimensions are cut."""
    return {
        name: math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
        for name, leaf in tree.items()
        if not name.endswith((".scale", ".bias", "class_embedding"))
    }


@pytest.mark.parametrize(("zero", "cut"), [(3, 8), (2, 1), (1, 1)])
def test_what_each_device_holds_is_an_nth_of_what_the_zero_stage_splits(zero, cut):
    program = make_program(make_config((1, 8, 1), zero))
    state = program.abstract_state()
    assert set(parts(state.trainable).values()) == {cut}
    assert set(parts(program.abstract_frozen()).values()) == {cut}
    adam = next(
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    assert set(parts(adam.mu).values()) == set(parts(adam.nu).values()) == {8}


def test_offloaded_moments_lie_in_the_hosts_memory():
    state = make_program(make_config((1, 8, 1), offload=True)).abstract_state()
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in state.trainable.values()} == {"device"}


COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


def shapes_in(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and shape of every array type in HLO."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in SHAPE.findall(text)
    ]


def collectives(hlo: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The results of the collectives in HLO, by kind; scalars left out."""
    found = collections.defaultdict(list)
    for types, kind in COLLECTIVE.findall(hlo):
        found[kind] += [(dtype, shape) for dtype, shape in shapes_in(types) if shape]
    return found


def lower(config: Config):
    program = make_program(config)
    return program.train_step().lower(
        program.abstract_state(), program.abstract_frozen(), program.abstract_batch(T, 1)
    )


def test_frozen_weights_have_no_gradients_to_reduce_and_no_copies_in_float32():
    lowered = lower(make_config((1, 8, 1), tune=STAGE1, dtype="bfloat16"))
    reduced = collectives(lowered.compile().as_text())
    shapes = [sorted(shape) for kind in ("all-reduce", "reduce-scatter") for _, shape in reduced[kind]]
    assert sorted(shapes) == [[C, D], [D], [D], [D, D]]  # the projector's
    # Before XLA: the CPU has no bfloat16 products, so what it runs has such copies.
    for weights in ((D, N * H), (N * H, D), (D, F), (F, D), (V, D), (C, C), (C, 80), (80, C)):
        assert f"{weights[0]}x{weights[1]}xbf16>" in lowered.as_text()
        assert f"{weights[0]}x{weights[1]}xf32>" not in lowered.as_text(), weights


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_only_weights_and_gradients_travel_and_logits_are_never_whole(sizes, capfd):
    hlo = lower(make_config(sizes, dtype="bfloat16")).compile().as_text()
    # What XLA says when it cannot go from one sharding to another but through the whole array.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    rows = ROWS // (sizes[0] * sizes[1])
    gathered = [shape for dtype, shape in collectives(hlo)["all-gather"] if T in shape and dtype != "s32"]
    assert all(math.prod(shape) <= rows * T * D for shape in gathered), gathered
    assert max(math.prod(shape) for _, shape in shapes_in(hlo)) < rows * T * V // sizes[2]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2)], ids=str)
def test_the_gradient_of_the_head_is_reduced_once_per_microbatch_and_not_per_chunk(sizes):
    hlo = lower(make_config(sizes, dtype="bfloat16")).compile().as_text()
    head = {D, V // sizes[2]}
    reduced, gathered = (
        [shape for kind in kinds for _, shape in collectives(hlo)[kind] if head <= {*shape}]
        for kinds in (("all-reduce", "reduce-scatter"), ("all-gather",))
    )
    # XLA puts reductions of other gradients into one with it; the embeddings' has its size, and no gather.
    assert reduced.count((D, V // sizes[2])) == 1, reduced
    assert gathered.count((D, V // sizes[2])) == 1, gathered
    in_chunks = [
        shape
        for line in hlo.splitlines()
        if "shard_map/while" in line
        for types, _ in COLLECTIVE.findall(line)
        for _, shape in shapes_in(types)
    ]
    # Where the vocabulary is split: largest logit, sum, the target's logit, and the gradient of the states.
    assert sorted(in_chunks) == ([] if sizes[2] == 1 else [(32,), (32,), (32,), (32, D)])


def test_every_parameter_of_every_architecture_has_a_row_in_the_table():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for bias in ("none", "qkv", "qkvo"):
        for projector in ("linear", "mlp3x_gelu"):
            text = TextConfig(num_hidden_layers=2, attention_bias=bias, tie_word_embeddings=bias == "qkv")
            model = ModelConfig(vision=VisionConfig(num_hidden_layers=3), text=text, projector_type=projector)
            for name, leaf in abstract_model(model)[1].items():
                assert parameter_sharding(mesh, name, leaf.shape) is not None
    with pytest.raises(ConfigError, match=r"No row of .* matches the parameter language_model\.new\.kernel"):
        parameter_sharding(mesh, "language_model.new.kernel", (8, 8))


def test_dimensions_that_do_not_divide_are_named_with_those_that_do():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(
        ConfigError, match=r"mesh\.fsdp=8 does not divide .*lm_head\.kernel \(12, 64\); use 1, 2, 3, 4 or 6"
    ):
        parameter_sharding(mesh, "language_model.lm_head.kernel", (12, 64))


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            (1, 1, 8),
            {},
            r"mesh\.tensor=8 .*num_attention_heads=4\. This model allows mesh\.tensor = 1 or 2\.",
        ),
        ((1, 2, 4), {}, r"mesh\.tensor=4 .* model\.text\.num_key_value_heads=2\. .* = 1 or 2\."),
        (
            (1, 8, 1),
            {"hidden_size": 36},
            r"mesh\.fsdp=8 does not divide a dimension of 36 of .* = 1, 2 or 4\.",
        ),
    ],
)
def test_a_mesh_that_cannot_hold_the_model_is_refused_with_those_that_can(sizes, changes, message):
    config = make_config(sizes)
    text = dataclasses.replace(MODEL.text, **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, text=text))
    with pytest.raises(ConfigError, match=message):
        make_program(config)


def test_a_vocabulary_that_does_not_divide_is_split_over_the_width():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    names = ("language_model.embed_tokens.embedding", "language_model.lm_head.kernel")
    for vocab, shards in ((32000, [(16000, 2048), (2048, 16000)]), (32001, [(32001, 1024), (1024, 32001)])):
        shapes = [(vocab, 4096), (4096, vocab)]
        found = [
            parameter_sharding(mesh, name, shape).shard_shape(shape)
            for name, shape in zip(names, shapes, strict=True)
        ]
        assert found == shards


def test_one_axis_of_the_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert num_row_shards(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (3, -1, 1),
            r"mesh.data=3, .* does not fit 8 devices: the sizes beside -1 must multiply to 1, 2, 4 or 8",
        ),
        ((2, 2, 1), "does not fit 8 devices: the sizes must multiply to 8"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, -1, 1), "mesh.data=0: sizes are positive"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(*sizes))


def slices(platform: str) -> list[SimpleNamespace]:
    """Two slices of four devices, in no particular order."""
    return [SimpleNamespace(id=i, slice_index=i % 2, platform=platform, device_kind="any") for i in range(8)]


def test_only_the_data_axis_crosses_slices():
    found = arrange({"data": 4, "fsdp": 2, "tensor": 1}, slices("gpu"))
    assert [[device.slice_index for device in part.flat] for part in found] == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]
    with pytest.raises(
        ConfigError, match=r"mesh\.data=1 cannot span 2 TPU slices.*set mesh\.data to 2, 4 or 8"
    ):
        arrange({"data": 1, "fsdp": 8, "tensor": 1}, slices("tpu"))
    assert arrange({"data": 1, "fsdp": 8, "tensor": 1}, slices("gpu")).shape == (1, 8, 1)


def test_a_mesh_generates_what_one_device_does():
    graphdef, _ = abstract_model(MODEL)
    rows = {key: value[:4, :32] for key, value in make_rows("padded").items() if key != "labels"}
    batch = rows | {"images": make_rows("padded")["images"][:4]}
    batch["segment_ids"] = np.ones_like(batch["tokens"])
    batch["positions"] = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
    answers = []
    for sizes, count in (((1, 1, 1), 1), ((2, 2, 2), 8)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
        parameters = {
            name: jax.device_put(value, parameter_sharding(mesh, name, value.shape))
            for name, value in draw_parameters().items()
        }
        placed = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        tokens = continue_prompts(
            parameters,
            placed,
            jax.random.key(0),
            GREEDY,
            graphdef=graphdef,
            max_new_tokens=6,
            end_ids=(2,),
            sample=False,
        )
        answers.append(np.asarray(tokens))
    np.testing.assert_array_equal(*answers)


ONE_OF_TWO_PROCESSES = """
import sys
import jax, numpy as np
from llava_jax.config import ConfigError, MeshConfig
from llava_jax.sharding import make_mesh, own_rows, place_batch

index = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=index)
whole = {"tokens": np.arange(2 * 16 * 3).reshape(2, 16, 3), "images": np.zeros((2, 16, 0, 4, 4, 3), np.uint8)}
first, second = (jax.devices()[:4], jax.devices()[4:])
interleaved = [device for pair in zip(first, second) for device in pair]
halves = {0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [8, 9, 10, 11, 12, 13, 14, 15]}
for sizes, devices, expected in (
    ((1, 8, 1), None, halves[index]),
    ((2, 2, 2), None, halves[index]),
    ((1, 1, 8), None, list(range(16))),
    ((4, 2, 1), interleaved, [row for row in range(16) if row // 2 % 2 == index]),
):
    mesh = make_mesh(MeshConfig(*sizes), devices)
    rows = own_rows(mesh, 16)
    assert rows.dtype == np.int64 and rows.tolist() == expected, (sizes, rows)
    placed = place_batch(mesh, {key: value[:, rows] for key, value in whole.items()})
    for key, array in placed.items():
        assert array.shape == whole[key].shape, (key, array.shape)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[key][shard.index])
try:
    own_rows(make_mesh(MeshConfig(1, 2, 3), first[:3] + second[:3]), 16)
    own_rows(make_mesh(MeshConfig(1, 3, 2), first[:3] + second[:3]), 12)
except ConfigError as error:
    assert "mesh.tensor=2 cuts across the 3 devices of a process" in str(error), error
    print("passed")
"""


def test_each_of_two_processes_places_the_rows_that_its_devices_hold():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO_PROCESSES, str(index), str(port)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "passed\n", err


def test_rows_that_the_mesh_cannot_share_are_refused():
    with pytest.raises(
        ConfigError, match=r"12 rows cannot be spread evenly .* 8 row shards .* multiple of 8"
    ):
        own_rows(make_mesh(MeshConfig(2, 4, 1)), 12)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_real_steps_lower_for_eight_devices(size):
    text = from_json(TextConfig, vicuna(size).to_dict())
    config = Config(model=ModelConfig(text=text), data=DataConfig(batch_size=8), mesh=MeshConfig(1, 4, 2))
    program = Program(config, make_mesh(config.mesh), num_steps=10)
    state = program.abstract_state()
    lowered = program.train_step().lower(state, program.abstract_frozen(), program.abstract_batch(2048, 1))
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: leaf.shape, new_state.trainable) == {
        name: leaf.shape for name, leaf in state.trainable.items()
    }
    assert metrics["loss"].dtype == jnp.float32


def test_adapters_have_rows_in_the_table_and_lie_in_parts_on_every_device():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    tune = TuneConfig(vision_tower="lora", projector="lora", language_model="lora")
    config = Config(tune=tune, lora=LoraConfig(rank=3))
    for name, leaf in abstract_tuned_model(config)[1].items():
        shape = parameter_sharding(mesh, name, leaf.shape).shard_shape(leaf.shape)
        if is_trainable(name, config):
            assert 4 * math.prod(shape) == math.prod(leaf.shape), name
