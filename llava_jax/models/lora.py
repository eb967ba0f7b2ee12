"""Low-rank adapters beside the kernels of a network's linear layers (LoRA, https://arxiv.org/abs/2106.09685).

Letters: D inputs, F outputs, r rank, L layers; parameters of stacked layers have the axis L first.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.linear import keepable
from llava_jax.models.quantization import QuantizableLinear
from llava_jax.models.random_mask import random_mask

DROPOUT_KEY = "dropout_key"


class DropoutKey(nnx.Variable):
    """The key of one step's dropout in one layer, key[]; stacked layers have one each."""


class LoraLinear(QuantizableLinear):
    """x W + bias + scale * dropout(x) A B, where W is the kernel of the layer that it is made of.

    The parameters A [D, r] and B [r, F] are float32 and take part in the layer's dtype. `dropout` is a share;
    above 0 the caller puts a key into `dropout_key` before each pass. Of the two products alone the sum can be kept.
    """

    def __init__(self, linear: nnx.Linear, *, rank: int, scale: float, dropout: float):
        super().__init__(linear)
        *stacked, D, F = self.kernel.shape
        self.lora_a = nnx.Param(jnp.zeros((*stacked, D, rank)))
        self.lora_b = nnx.Param(jnp.zeros((*stacked, rank, F)))
        if dropout:
            self.dropout_key = DropoutKey(jax.random.split(jax.random.key(0), tuple(stacked)))
        self.scale = scale
        self.dropout = dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., F]."""
        y = self.product(x)
        x, a, b = self.promote_dtype((x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        if self.dropout:
            kept = random_mask(self.dropout_key[...], 1 - self.dropout, x.shape)
            grown = (x.astype(jnp.float32) / (1 - self.dropout)).astype(x.dtype)
            x = jnp.where(kept, grown, 0)
        return keepable(y + keepable(x @ a) @ b * self.scale)


def add_lora(
    model: nnx.Module, targets: Mapping[str, Sequence[str]], *, rank: int, scale: float, dropout: float
) -> nnx.Module:
    """Replaces, in place, the linear layers of `targets`: for each part of the model the names of its layers."""
    found = [
        path
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and path[-1] in targets.get(path[0], ())
    ]
    for *parents, name in found:
        parent = model
        for part in parents:
            parent = getattr(parent, part)
        linear = getattr(parent, name)
        setattr(parent, name, LoraLinear(linear, rank=rank, scale=scale, dropout=dropout))
    return model


def dropout_keys(shapes: Mapping[str, jax.ShapeDtypeStruct], key: jax.Array) -> dict[str, jax.Array]:
    """The `dropout_key` of every layer, all different: a function of `key` and the names in `shapes`."""
    return {
        name: jax.random.split(jax.random.fold_in(key, number), leaf.shape)
        for number, (name, leaf) in enumerate(sorted(shapes.items()))
    }
