"""Steps on eight CPU devices against one device, and what each device holds."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import (
    Config,
    ConfigError,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
    TuneConfig,
    VisionConfig,
    from_json,
)
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.optimizer import make_optimizer
from llava_jax.recipe import vicuna
from llava_jax.sharding import (
    constrain_rows,
    make_mesh,
    num_row_shards,
    parameter_sharding,
    place_batch,
    state_shardings,
)
from llava_jax.step import (
    TrainState,
    abstract_model,
    abstract_tuned_model,
    make_train_step,
    model_settings,
    random_parameters,
)
from llava_jax.tuning import is_trainable


def train(config, mesh_config, num_devices, batches):
    """Losses, gradient norms and the final state of some steps on the given mesh."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    graphdef, shapes = abstract_model(config.model, **model_settings(config, constrain_rows(mesh)))
    place = partial(parameter_sharding, mesh)
    parameters = {
        name: jax.device_put(value, place(name, value.shape))
        for name, value in random_parameters(config.model, 0, shapes.keys()).items()
    }
    trainable = {name: value for name, value in parameters.items() if is_trainable(name, config)}
    frozen = {name: value for name, value in parameters.items() if name not in trainable}
    optimizer = make_optimizer(config.optimizer, len(batches))
    opt_state = jax.jit(
        optimizer.init, out_shardings=state_shardings(mesh, jax.eval_shape(optimizer.init, trainable))
    )(trainable)
    state = TrainState(jnp.int32(0), trainable, opt_state)
    step = jax.jit(make_train_step(graphdef, optimizer, config.loss))
    figures = []
    for batch in batches:
        state, metrics = step(state, frozen, place_batch(mesh, batch))
        figures.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(figures), state


@pytest.fixture
def batches(tiny_config):
    pipeline = Pipeline(
        tiny_config.data,
        open_datasets(tiny_config.data, seed=0)[0],
        tokenizer=load_tokenizer(tiny_config.init.tokenizer),
        images=ImageProcessor.from_config(tiny_config.data, tiny_config.model),
        seed=0,
    )
    return [pipeline.batch(step) for step in range(3)]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_eight_devices_take_the_same_steps_as_one(tiny_config, batches, sizes):
    expected, expected_state = train(tiny_config, MeshConfig(1, 1, 1), 1, batches)
    figures, state = train(tiny_config, MeshConfig(*sizes), 8, batches)
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    for name, value in expected_state.trainable.items():
        np.testing.assert_allclose(state.trainable[name], value, atol=2e-5, err_msg=name)


def bytes_per_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_the_state_on_each_device_shrinks_with_fsdp(tiny_config, batches):
    _, state = train(tiny_config, MeshConfig(1, 8, 1), 8, batches[:1])
    moments = {name: value for name, value in state.opt_state[0].nu.items()}
    for parameters in (state.trainable, moments):
        for name, value in parameters.items():
            parts = 1 if name.endswith((".scale", ".bias")) else 8
            assert bytes_per_device(value) * parts == value.nbytes, name


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


def test_dimensions_that_do_not_divide_are_named():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(ConfigError, match=r"mesh\.fsdp=8 does not divide .*lm_head\.kernel \(12, 64\)"):
        parameter_sharding(mesh, "language_model.lm_head.kernel", (12, 64))


def test_one_axis_of_the_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert num_row_shards(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "mesh.data=3, mesh.fsdp=-1, mesh.tensor=1 does not fit 8 devices"),
        ((2, 2, 1), "does not fit 8 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, -1, 1), "mesh.data=0: sizes are positive"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_real_steps_lower_for_eight_devices(size):
    text = from_json(TextConfig, vicuna(size).to_dict())
    config = Config(model=ModelConfig(text=text))
    mesh = make_mesh(MeshConfig(1, 4, 2))
    graphdef, shapes = abstract_model(config.model, **model_settings(config, constrain_rows(mesh)))

    def struct(leaf, dtype, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    place = {name: parameter_sharding(mesh, name, leaf.shape) for name, leaf in shapes.items()}
    trained = {n: struct(v, jnp.float32, place[n]) for n, v in shapes.items() if is_trainable(n, config)}
    frozen = {n: struct(v, jnp.bfloat16, place[n]) for n, v in shapes.items() if n not in trained}
    optimizer = make_optimizer(config.optimizer, 10)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained))
    rows = {
        key: jax.ShapeDtypeStruct((1, 8, 2048), jnp.int32)
        for key in ("tokens", "labels", "positions", "segment_ids")
    }
    batch = rows | {"images": jax.ShapeDtypeStruct((1, 8, 1, 336, 336, 3), jnp.uint8)}
    lowered = jax.jit(make_train_step(graphdef, optimizer, config.loss)).lower(state, frozen, batch)
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: leaf.shape, new_state.trainable) == {
        n: v.shape for n, v in trained.items()
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
