"""Products with kernels in the forms that XLA's CPU compiler hands to its fast library, in both passes.

It does so where the result is float32, also for bfloat16 factors, and where the left factor is contracted along its last
dimension or along several.
"""

import jax
import jax.numpy as jnp


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, **how) -> jax.Array:
    """`jax.lax.dot_general` of x [..., D] and kernel [D, F], as `nnx.Linear` calls it; sums are float32."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())) and precision is None
    assert all(value is None for value in how.values())
    return _product(x, kernel)


@jax.custom_vjp
def _product(x, kernel):
    return _einsum("...D,DF->...F", x, kernel)


def _save(x, kernel):
    return _product(x, kernel), (x, kernel)


def _differentiate(saved, grad):
    x, kernel = saved
    return _einsum("...F,DF->...D", grad, kernel), _einsum("...D,...F->DF", x, grad)


_product.defvjp(_save, _differentiate)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
