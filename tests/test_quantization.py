"""Quantised kernels against bitsandbytes, references in float64, and training by LoRA with the kernels that they hold."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llava_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.models.quantization import NF4, Quantization, QuantizedKernel
from llava_jax.optimizer import make_optimizer
from llava_jax.planning.memory import arguments
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.sharding import check_model, make_mesh, place_batch
from llava_jax.step import abstract_tuned_model, make_train_step, random_parameters
from llava_jax.tuned_weights import tuned
from llava_jax.tuning import is_trainable, kernel_name, table
from llava_jax.weights import load
from tests.test_lora import dots
from tests.test_sharding import collectives

ALL = (Quantization("int8"), Quantization("nf4", double=False), Quantization("nf4"))
# 128 inputs, 2 outputs; and what bitsandbytes 0.50.2 made of it (quantize_4bit of blocks of 64, int8_vectorwise_quant).
KERNEL = (((np.arange(256) * (7 * np.arange(256) + 13)) % 101 - 50) / 50).astype(np.float32).reshape(2, 128).T
KERNEL = KERNEL * np.array([1, 3], np.float32)
BITSANDBYTES_NF4 = (
    "0280a4236d2d8558d2d6324a0820f0291c756bf60dbbe191ecce170c88ae2c51115c2ea88c071ecce191ebbd06fb657c1920f0280a4236d2d8558d"
    "2d6324a0820f0291c756bf60dbbe191ecce170c88ae2c51115c2ea88c071ecce191ebbd06fb657c1920f0280a4236d2d8558d2d6324a0820f0291c"
    "756bf60dbbe191ecce17"
)
BITSANDBYTES_INT8 = [[-127, -76, 10, -124, 33, -30, -58, -51], [-127, 114, -122, -66, 25, -104, 58, 0]]


def normal(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unpacked(leaves) -> np.ndarray:
    """What the network multiplies with, float32[D, F]."""
    leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    quantization = Quantization("int8" if "int8" in leaves else "nf4", double="absmax_scale" in leaves)
    kernel = QuantizedKernel((64, 1), quantization)
    for name, leaf in leaves.items():
        getattr(kernel, name).set_value(jnp.asarray(leaf))
    return np.asarray(kernel[...])


def relative_error(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_codes_and_scales_are_those_of_bitsandbytes():
    leaves = Quantization("nf4", double=False).quantize(KERNEL)
    halves = leaves["nf4"]
    codes = np.stack([halves & 15, halves >> 4], axis=1).reshape(128, 2)
    theirs = np.frombuffer(bytes.fromhex(BITSANDBYTES_NF4), np.uint8)
    theirs = np.stack([theirs >> 4, theirs & 15], axis=1).reshape(2, 128).T
    np.testing.assert_array_equal(codes, theirs)
    np.testing.assert_array_equal(leaves["absmax"], [[1, 3], [1, 3]])
    np.testing.assert_array_equal(unpacked(leaves), np.float32(NF4)[theirs] * np.float32([1, 3]))
    leaves = Quantization("int8").quantize(KERNEL)
    np.testing.assert_array_equal(leaves["int8"][:8].T, BITSANDBYTES_INT8)
    np.testing.assert_array_equal(leaves["scale"], np.float32([1, 3]) / np.float32(127))


def nf4_in_float64(kernel: np.ndarray) -> np.ndarray:
    """The nearest values by definition."""
    D, F = kernel.shape
    blocks = kernel.astype(np.float64).reshape(D // 64, 64, F)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    distances = np.abs((blocks / absmax)[..., None] - np.array(NF4))
    return (np.array(NF4)[distances.argmin(axis=-1)] * absmax).reshape(D, F)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_each_value_becomes_the_nearest_that_there_is(dtype):
    kernel = normal((192, 4100)).astype(dtype)
    found = unpacked(Quantization("nf4", double=False).quantize(kernel))
    np.testing.assert_allclose(found, nf4_in_float64(kernel), rtol=1e-6)
    kernel = kernel.astype(np.float64)
    scale = np.abs(kernel).max(axis=0) / 127
    found = unpacked(Quantization("int8").quantize(kernel.astype(dtype)))
    assert (np.abs(found - kernel) <= scale * (0.5 + 1e-4)).all()


def test_double_quantisation_moves_a_block_by_half_a_step_at_most():
    kernel = normal((512, 96)) * normal((1, 96), 1)
    single, double = (Quantization("nf4", double=two).quantize(kernel) for two in (False, True))
    np.testing.assert_array_equal(single["nf4"], double["nf4"])
    assert double["absmax"].dtype == np.int8 and double["absmax_offset"] == pytest.approx(
        single["absmax"].mean()
    )
    absmax = double["absmax_offset"] + double["absmax"] * double["absmax_scale"]
    assert (np.abs(absmax - single["absmax"]) <= double["absmax_scale"] * 0.501).all()


@pytest.mark.parametrize("quantization", ALL, ids=str)
def test_zeros_stay_zeros(quantization):
    kernel = normal((128, 6))
    kernel[:64, 2] = kernel[:, 4] = 0
    kernel[64:, 2] *= 100  # so that the zeros' absmax is not exact once it is quantised
    found = unpacked(quantization.quantize(kernel))
    assert np.isfinite(found).all() and not found[:64, 2].any() and not found[:, 4].any()


@pytest.mark.parametrize(
    ("quantization", "error"), [(ALL[0], 0.0087), (ALL[1], 0.092), (ALL[2], 0.092)], ids=str
)
def test_the_error_of_a_layers_output_is_the_stated_one(quantization, error):
    kernel, x = normal((4096, 256)) * 0.02, normal((64, 4096), 1)
    found = relative_error(x @ unpacked(quantization.quantize(kernel)), x @ kernel)
    assert found == pytest.approx(error, rel=0.03)


# No two widths are alike; inputs are blocks of 64 on each of two devices.
MODEL = ModelConfig(
    vision=VisionConfig(24, 40, 3, 4, image_size=32, patch_size=8),
    text=TextConfig(192, 128, 256, 2, 4, 2, 96, max_position_embeddings=128, attention_bias="qkv"),
)
ROWS, T = 8, 48


def make_config(quantization="nf4", *, sizes=(1, 1, 1), zero=3, remat="full", double=True, **lora) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(batch_size=ROWS, max_length=T),
        tune=TuneConfig(language_model="lora"),
        lora=LoraConfig(rank=4, dropout=0.0, quantization=quantization, double_quantization=double, **lora),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0),
        train=TrainConfig(dtype="float32", frozen_dtype="float32", remat=remat),
        mesh=MeshConfig(*sizes),
        sharding=ShardingConfig(zero),
    )


def make_source() -> ModelSource:
    names = set(abstract_tuned_model(make_config("none"))[1])
    drawn = random_parameters(MODEL, 0, {name for name in names if "lora" not in name})
    leaves = {
        name: Leaf(
            value.shape, np.dtype(np.float32), lambda index=(), value=value: np.asarray(value)[index], 0
        )
        for name, value in drawn.items()
    }
    return ModelSource("ours", MODEL, leaves)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 192, (1, ROWS, T), np.int32)
    labels = np.where(np.arange(T) > 25, tokens, -100).astype(np.int32)
    tokens[..., 2 : 2 + MODEL.num_image_tokens] = IMAGE_TOKEN
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    images = rng.integers(0, 256, (1, ROWS, 1, 32, 32, 3), np.uint8)
    return dict(
        tokens=tokens, labels=labels, positions=positions, segment_ids=np.ones_like(tokens), images=images
    )


def make_program(config: Config) -> Program:
    mesh = config.mesh
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    return Program(config, make_mesh(mesh, devices), num_steps=3)


def place(program: Program) -> tuple[dict, dict]:
    """What trains and what is frozen, on the devices."""
    source = tuned(make_source(), program.config)
    names = list(dict.fromkeys(map(kernel_name, program.abstract_frozen())))
    frozen = load(source, names, jnp.float32, program.parameter_sharding, {}, quantized=program.quantized())
    trainable = load(source, program.abstract_trainable(), jnp.float32, program.parameter_sharding)
    return trainable, frozen


@functools.cache
def compiled(config: Config):
    """A stage, its step, and what it starts with: what trains, and what is frozen."""
    program = make_program(config)
    return program, program.train_step(), *place(program)


def train(config: Config, frozen: dict | None = None) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of three steps, and what trained; `frozen` replaces the weights as loaded."""
    program, step, trainable, own = compiled(config)
    frozen, losses = own if frozen is None else frozen, []
    state = program.new_state(jax.tree.map(jnp.copy, trainable))
    for seed in range(3):
        state, metrics = step(state, frozen, place_batch(program.mesh, make_batch(seed)))
        losses.append(float(metrics["loss"]))
    return losses, {name: np.asarray(value) for name, value in state.trainable.items()}


def with_unpacked_kernels(frozen: dict) -> dict[str, np.ndarray]:
    """Quantised leaves joined to the kernels [L, D, F] that they stand for."""
    parts, whole = {}, {}
    for name, value in frozen.items():
        kernel = kernel_name(name)
        if kernel == name:
            whole[name] = value
        else:
            parts.setdefault(kernel, {})[name.removeprefix(f"{kernel}.")] = np.asarray(value)
    for kernel, leaves in parts.items():
        layers = [{name: leaf[layer] for name, leaf in leaves.items()} for layer in range(2)]
        whole[kernel] = np.stack([unpacked(layer) for layer in layers])
    assert len(parts) == 7
    return whole


@pytest.mark.parametrize(
    ("method", "error"), [("nf4", 1e-2), pytest.param("int8", 1e-3, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_lora_beside_the_unpacked_kernels(method, error):
    losses, trained = train(make_config(method))
    frozen = with_unpacked_kernels(compiled(make_config(method))[3])
    expected, expected_trained = train(make_config("none"), frozen)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert trained.keys() == expected_trained.keys() and len(trained) == 7 * 2 + 4
    for name, value in expected_trained.items():
        np.testing.assert_allclose(trained[name], value, atol=2e-5, err_msg=name)
    exact, _ = train(make_config("none"))
    assert 0 < abs(losses[0] - exact[0]) / exact[0] < error


@pytest.mark.parametrize(
    ("sizes", "zero", "method"),
    [
        ((2, 2, 2), 3, "nf4"),
        pytest.param((1, 2, 2), 2, "nf4", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 3, "int8", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 3, "nf4", marks=pytest.mark.slow),  # more devices than blocks
    ],
    ids=str,
)
def test_several_devices_take_the_same_steps_as_one(sizes, zero, method):
    losses, trained = train(make_config(method, sizes=sizes, zero=zero))
    expected, expected_trained = train(make_config(method))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, value in expected_trained.items():
        np.testing.assert_allclose(trained[name], value, atol=1e-4, err_msg=name)


def test_loading_quantises_each_layer_and_sums_what_it_read():
    program, source = make_program(make_config(sizes=(2, 2, 2))), make_source()
    name = "language_model.layers.self_attn.o_proj.kernel"
    checksums, unquantised = {}, {}
    place = program.parameter_sharding
    frozen = load(source, [name], jnp.bfloat16, place, checksums, quantized=program.quantized())
    assert set(frozen) == {f"{name}.{kind}" for kind in ("nf4", "absmax", "absmax_scale", "absmax_offset")}
    abstract = program.abstract_frozen()
    for layer in range(2):
        for kind, expected in Quantization("nf4").quantize(source.read(name)[layer]).items():
            found = frozen[f"{name}.{kind}"]
            np.testing.assert_array_equal(found[layer], expected)
            leaf = abstract[f"{name}.{kind}"]
            assert (found.shape, found.dtype, found.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
    assert frozen[f"{name}.nf4"].addressable_shards[0].data.shape == (2, 3, 32, 64)
    load(source, [name], jnp.float32, place, unquantised)
    assert checksums == unquantised and list(checksums) == [name]


def test_no_device_holds_a_part_of_a_block():
    program = make_program(make_config())
    shapes = {name: leaf.shape for name, leaf in program.abstract_frozen().items()}
    with pytest.raises(
        ConfigError, match=r"mesh\.tensor=4 does not divide .* 6 .*o_proj.*allows mesh\.tensor = 1 or 2"
    ):
        text = dataclasses.replace(MODEL.text, num_key_value_heads=4)
        check_model(make_mesh(MeshConfig(2, 1, 4)), dataclasses.replace(MODEL, text=text), shapes)


def test_codes_travel_between_devices_and_not_what_is_unpacked_of_them():
    program = make_program(make_config(sizes=(1, 2, 2)))
    step = program.train_step()
    lowered = step.lower(program.abstract_state(), program.abstract_frozen(), program.abstract_batch(T, 1))
    gathered = collectives(lowered.compile().as_text())["all-gather"]
    # Of q, o, gate with up, and down a half lies on each device along tensor.
    assert {shape[-3:] for dtype, shape in gathered if dtype == "u8"} >= {
        (2, 32, 192),
        (3, 32, 128),
        (2, 32, 128),
    }
    assert not {(128, 192), (192, 128), (128, 128)} & {
        shape[-2:] for dtype, shape in gathered if dtype != "u8"
    }


def shapes_in(jaxpr) -> set[tuple[tuple[int, ...], str]]:
    """Every array that a program computes, in loops too."""
    found = {(out.aval.shape, out.aval.dtype.name) for eqn in jaxpr.eqns for out in eqn.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                found |= shapes_in(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_step_has_the_same_products_and_keeps_no_unpacked_kernels(remat):
    def trace(quantization):
        config = make_config(quantization, remat=remat)
        graphdef, shapes, _ = abstract_tuned_model(config, remat=remat)
        parameters = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        trainable = {name: value for name, value in parameters.items() if is_trainable(name, config)}
        frozen = {name: value for name, value in parameters.items() if name not in trainable}
        optimizer = make_optimizer(config.optimizer, 3)
        step = make_train_step(graphdef, optimizer, config.loss)
        state = make_program(config).new_state(trainable)
        return jax.make_jaxpr(step)(state, frozen, make_batch(0)).jaxpr

    quantised, plain = trace("nf4"), trace("none")
    assert sorted(dots(quantised)) == sorted(dots(plain))
    computed = shapes_in(quantised)
    sizes = {(128, 384), (128, 192), (384, 128), (128, 256), (256, 128)}
    assert {(size, "float32") for size in sizes} <= computed
    assert not {((2, *size), dtype) for size in sizes for dtype in ("float32", "bfloat16")} & computed


@pytest.mark.parametrize(
    ("quantization", "gigabytes"),
    [("none", 12.95), ("int8", 6.48), (Quantization("nf4", double=False), 3.64), (Quantization("nf4"), 3.34)],
    ids=str,
)
def test_the_plan_counts_what_a_7b_decoder_takes(quantization, gigabytes):
    method, double = getattr(quantization, "method", quantization), getattr(quantization, "double", True)
    config = Config(
        tune=TuneConfig(language_model="lora"),
        lora=LoraConfig(quantization=method, double_quantization=double),
    )
    program = Program(config, make_mesh(MeshConfig(), jax.devices()[:1]), 10)
    # Embeddings, head, tower and norms, in bfloat16.
    rest = 2 * (2 * 32000 * 4096 + 290_909_184 + 65 * 4096)
    frozen = arguments(program, 2048, 1).frozen
    assert (frozen - rest) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    eighth = Program(config, make_mesh(MeshConfig()), 10)
    assert arguments(eighth, 2048, 1).frozen == pytest.approx(frozen / 8, rel=1e-2)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_table_counts_parameters_and_not_their_codes(quantization):
    program = make_program(make_config(quantization))
    *_, line = table(program.config, program.abstract_trainable(), program.abstract_frozen())
    kernels = 128 * (384 + 192 + 192 + 256 + 256) + 384 * 128 + 256 * 128
    pairs = 4 * (2 * (128 + 192) + 2 * (128 + 384) + 3 * (128 + 256))
    biases_and_norms = 384 + 192 + 192 + 2 * 128
    total = 2 * (kernels + pairs + biases_and_norms) + 2 * 192 * 128 + 128
    assert line.split()[1] == f"{total:,}" and line.split()[3] == f"{2 * pairs:,}"
    assert line.endswith(
        "down_proj" if quantization == "none" else f"down_proj; its kernels in {quantization}"
    )


def test_quantisation_that_cannot_be_is_refused_with_what_to_set():
    with pytest.raises(ConfigError, match=r"tune\.language_model='full'; set that to 'lora'"):
        Config(lora=LoraConfig(quantization="nf4"))
    with pytest.raises(ConfigError, match=r"tune\.language_model='frozen'; set that to 'lora'"):
        Config(
            tune=TuneConfig(projector="lora", language_model="frozen"), lora=LoraConfig(quantization="int8")
        )
    with pytest.raises(ConfigError, match="Did you mean 'nf4'"):
        LoraConfig(quantization="nf")
    with pytest.raises(ConfigError, match=r"is about lora\.quantization='nf4', but it is 'int8'"):
        LoraConfig(quantization="int8", double_quantization=False)
    recipe = recipe_of("llava15_finetune_qlora", "7b")
    recipe.model.text.intermediate_size = 11000
    with pytest.raises(
        ConfigError, match=r"model\.text\.intermediate_size = 11000 .*set lora\.quantization='int8'"
    ):
        parse(recipe)


def recipe_of(name: str, size: str):
    path = Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_recipe_holds_the_published_values(size):
    """scripts/finetune_qlora.sh of the original, with the data of scripts/v1_5/finetune_lora.sh."""
    config = parse(recipe_of("llava15_finetune_qlora", size)).first
    lora = LoraConfig(rank=64, alpha=16.0, dropout=0.05, quantization="nf4", double_quantization=True)
    assert config.lora == lora and config.optimizer == OptimizerConfig(learning_rate=2e-5)
    assert config.tune == TuneConfig(vision_tower="frozen", projector="full", language_model="lora")
    beside = parse(recipe_of("llava15_finetune_lora", size)).first
    for section in ("model", "data", "train", "init"):
        assert getattr(config, section) == getattr(beside, section)


def test_layers_without_an_adapter_are_quantised_too():
    _, shapes, _ = abstract_tuned_model(make_config(target="q_proj"))
    assert len([name for name in shapes if name.endswith(".nf4")]) == 7
    assert not [
        name for name in shapes if name.endswith("_proj.kernel") and name.startswith("language_model")
    ]
