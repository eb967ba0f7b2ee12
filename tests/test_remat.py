"""What each rematerialisation keeps and computes again, and that none changes what is computed."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from llava_jax.config import Config, ConfigError, TextConfig, TrainConfig
from llava_jax.kernels import einsum_attention
from llava_jax.kernels.attention import Placement, attention
from llava_jax.models.llama import Llama
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.step import bind, can_offload, model_settings

L, B, T = 2, 2, 24
TEXT = TextConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=L,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
MATRICES, ATTENTION = 7, 2  # products forward in a layer


@functools.cache
def gradients(remat: str, implementation: str, unroll: int = L):
    """The compiled program, and its gradients for drawn parameters and inputs."""

    def make():
        return Llama(
            TEXT,
            dtype=jnp.float32,
            remat=remat,
            unroll=unroll,
            attention=functools.partial(attention, implementation=implementation),
            constrain=lambda x: x,
            rngs=nnx.Rngs(0),
        )

    graphdef, params = nnx.split(make())
    params = flatten_dict(nnx.to_pure_dict(params), sep=".")
    inputs = jax.random.normal(jax.random.key(1), (B, T, TEXT.hidden_size))
    positions = jnp.tile(jnp.arange(T), (B, 1))

    def loss(params, inputs):
        return (bind(graphdef, params)(inputs, positions, jnp.ones((B, T), int)) ** 2).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
    return compiled, compiled(params, inputs)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(einsum_attention, "CHUNK", T // 2)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_gradients_are_those_without_rematerialisation(remat, implementation):
    expected, found = gradients("none", "reference")[1], gradients(remat, implementation)[1]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def num_products(remat: str, implementation: str) -> int:
    return gradients(remat, implementation)[0].as_text().count(" dot(")


def test_what_is_computed_again():
    """Per layer: scores where the output is kept, the output too with "dots", nearly all with "full"."""
    none = num_products("none", "reference")
    assert none == 3 * L * (MATRICES + ATTENTION)
    again = {remat: num_products(remat, "reference") - none for remat in REMAT_POLICIES}
    assert again.pop("full") > L * (MATRICES - 1)
    assert again == {"minimal": L, "offload": L, "dots": 2 * L}
    # Attention in chunks computes its scores again by itself; whether its output is, the policy says.
    assert num_products("dots", "xla") - num_products("minimal", "xla") == 2 * L  # two chunks


def test_offloading_without_memory_of_the_host_is_refused():
    device = SimpleNamespace(platform="cpu", device_kind="toy", addressable_memories=lambda: [])
    mesh = SimpleNamespace(devices=np.array([device]))
    config = Config(train=TrainConfig(remat="offload"))
    with pytest.raises(ConfigError, match="memory of the host that a toy reads; use 'full'"):
        model_settings(config, lambda x: x, Placement(mesh, rows=("a",), heads="b"))
    # A GPU that is only described does not tell of the host's memory.
    assert can_offload(SimpleNamespace(platform="gpu", addressable_memories=lambda: []))
