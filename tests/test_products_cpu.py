"""Products on a CPU: the values of `jax.lax.dot_general`, in the forms that the compiler is fast at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.kernels import products_cpu
from llava_jax.kernels.attention import attention
from llava_jax.program import Program
from llava_jax.sharding import make_mesh
from tests.attention_oracle import random_inputs

DIMENSIONS = (((2,), (0,)), ((), ()))


def value_and_gradients(dot_general, x, kernel, grad):
    out, vjp = jax.vjp(lambda x, kernel: dot_general(x, kernel, DIMENSIONS), x, kernel)
    return out, *vjp(grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_dot_general(dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 3, 5), (5, 7), (2, 3, 7))]
    found = value_and_gradients(products_cpu.dot_general, *arrays)
    expected = value_and_gradients(jax.lax.dot_general, *(a.astype(jnp.float32) for a in arrays))
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (dtype, exact.shape)
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=1e-6 if dtype == "float32" else 4e-3)


def products(jaxpr) -> list:
    """All dot_generals of a jaxpr, also of those within."""
    jaxpr, found = getattr(jaxpr, "jaxpr", jaxpr), []
    is_jaxpr = lambda leaf: hasattr(leaf, "jaxpr") or hasattr(leaf, "eqns")
    for equation in jaxpr.eqns:
        found += [equation] if equation.primitive.name == "dot_general" else []
        for inner in filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr)):
            found += products(inner)
    return found


def assert_fast(jaxpr, count: int):
    """Factors are bfloat16 and results float32: else XLA's CPU compiler makes the factors float32."""
    found = products(jaxpr)
    assert len(found) == count
    for equation in found:
        assert [factor.aval.dtype for factor in equation.invars] == [jnp.bfloat16] * 2
        assert equation.outvars[0].aval.dtype == jnp.float32


def test_both_passes_are_in_the_fast_form():
    x, kernel, grad = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 3, 5), (5, 7), (2, 3, 7)))
    assert_fast(
        jax.make_jaxpr(partial(value_and_gradients, products_cpu.dot_general))(x, kernel, grad), count=3
    )

    def attend(q, k, v, grad):
        how = dict(causal=True, implementation="xla_cpu")
        return jax.vjp(partial(attention, **how), q, k, v)[1](grad)

    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(T=8)]
    assert_fast(jax.make_jaxpr(attend)(*inputs), count=6)


def test_a_step_on_one_cpu_has_no_other_products():
    model = ModelConfig(
        vision=VisionConfig(16, 24, 2, 2, image_size=28, patch_size=14),
        text=TextConfig(50, 16, 24, 2, 2, 2, head_dim=8, max_position_embeddings=64),
    )
    config = Config(model=model, data=DataConfig(max_length=32), mesh=MeshConfig(1, 1, 1))
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]), num_steps=1)
    arguments = program.abstract_state(), program.abstract_frozen(), program.abstract_batch(32, 1)
    found = products(program.train_step().trace(*arguments).jaxpr)
    assert len(found) > 20
    assert {equation.outvars[0].aval.dtype for equation in found} == {jnp.dtype("float32")}
    assert {str(factor.aval.dtype) for equation in found for factor in equation.invars} == {"bfloat16"}
