"""What a step casts, how often, and that the network computes the same with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from llava_jax.config import LossConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.step import TrainState, abstract_model, make_train_step, random_parameters

MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    ),
    text=TextConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    ),
)
A, B, T = 3, 2, 20


@pytest.fixture(scope="module")
def batch():
    draws = np.random.default_rng(0)
    tokens = draws.integers(1, MODEL.text.vocab_size, (A, B, T))
    return {
        "tokens": jnp.asarray(tokens),
        "labels": jnp.asarray(np.where(draws.random((A, B, T)) < 0.5, tokens, -100)),
        "positions": jnp.broadcast_to(jnp.arange(T), (A, B, T)),
        "segment_ids": jnp.ones((A, B, T), jnp.int32),
        "images": jnp.asarray(draws.integers(0, 256, (A, B, 1, 8, 8, 3)), jnp.uint8),
    }


def make_step(cast_once: bool):
    """A bfloat16 network's step, with plain descent, and its first state."""
    graphdef, abstract = abstract_model(MODEL, dtype=jnp.bfloat16)
    optimizer = optax.sgd(1e-2)
    parameters = random_parameters(MODEL, 0, set(abstract))
    dtype = jnp.bfloat16 if cast_once else jnp.float32  # else layers cast what they read
    step = make_train_step(graphdef, optimizer, LossConfig(), dtype=dtype)
    return step, TrainState(jnp.int32(0), parameters, optimizer.init(parameters))


def test_casting_once_per_step_changes_no_bit(batch):
    results = []
    for cast_once in (False, True):
        step, state = make_step(cast_once)
        results.append(jax.jit(step)(state, {}, batch))
    expected, found = results
    assert float(found[1]["loss"]) == float(expected[1]["loss"]) > 1
    for name, value in expected[0].trainable.items():
        assert np.array_equal(found[0].trainable[name], value), name


def casts_of_kernels(jaxpr, inside: bool = False) -> int:
    """How many casts of float32 matrices to bfloat16 a program has within its loops."""
    count = 0
    for eqn in jaxpr.eqns:
        source = eqn.invars[0].aval if eqn.invars else None
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.bfloat16:
            count += inside and source.dtype == jnp.float32 and source.shape in KERNELS
        for inner in jaxprs_in_params(eqn.params):
            count += casts_of_kernels(inner, inside or eqn.primitive.name == "scan")
    return count


KERNELS = {(16, 20), (20, 16), (16, 8)}  # of a layer: MLP, keys and values


def test_no_loop_casts_kernels(batch):
    counts = []
    for cast_once in (False, True):
        step, state = make_step(cast_once)
        counts.append(casts_of_kernels(jax.make_jaxpr(step)(state, {}, batch).jaxpr))
    assert counts[0] > counts[1] == 0
