"""The layers that hold most parameters: linear ones, whose outputs rematerialisation can keep by name, and the embedding.

A parameter that many tokens share has a gradient of many terms. In bfloat16 a sum stands still once it is 256 times its
terms, so what is shared is cast to the compute dtype where each token has its own: the terms meet as float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"


def keepable(x: jax.Array) -> jax.Array:
    """x under the name by which rematerialisation keeps products."""
    return checkpoint_name(x, PRODUCT)


def spread(parameter: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """The parameter broadcast to `shape`, in `dtype`; its gradient is summed in its own dtype."""
    return jnp.broadcast_to(parameter, shape).astype(dtype)


class Linear(nnx.Linear):
    """nnx.Linear, its output keepable, its bias's gradient summed in the bias's dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., F]."""
        return keepable(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """x W + bias: float[..., D] -> float[..., F]."""
        x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y if self.bias is None else y + spread(self.bias[...], y.shape, y.dtype)


class Embed(nnx.Embed):
    """nnx.Embed, its gradient summed in the table's dtype."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[...] -> float[..., D]; NaN where a token is not in the table."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
