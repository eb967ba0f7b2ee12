"""The linear layers of blocks, whose outputs rematerialisation can keep by name."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"


def keepable(x: jax.Array) -> jax.Array:
    """x under the name by which rematerialisation keeps products."""
    return checkpoint_name(x, PRODUCT)


class Linear(nnx.Linear):
    """nnx.Linear, its output keepable."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., F]."""
        return keepable(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """x W + bias: float[..., D] -> float[..., F]."""
        return super().__call__(x)
