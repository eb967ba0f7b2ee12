"""What the vision transformers of CLIP and SigLIP have in common: normalised pixels, patches, and blocks.

Letters: B images, P patches, C width, N heads, H head width, L layers.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.config import VisionConfig
from llava_jax.models.linear import Linear


def normalize(images: jax.Array, config: VisionConfig) -> jax.Array:
    """uint8[..., 3] -> float32[..., 3] as the tower's image processor rescales and normalises, up to rounding (5e-7)."""
    pixels = images.astype(jnp.float32) * jnp.float32(1 / 255)
    return (pixels - jnp.array(config.image_mean, jnp.float32)) / jnp.array(config.image_std, jnp.float32)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU, with which CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """[B, height, width, 3] -> [B, P, patch_size * patch_size * 3], patches row by row, of whole ones."""
    B, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(B, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, rows * columns, -1)


class Attention(nnx.Module):
    """Self-attention among the patches of one image."""

    def __init__(self, config: VisionConfig, *, attention: Callable, dtype, rngs: nnx.Rngs):
        linear = partial(Linear, config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()
        self.head_dim = config.head_dim
        self.attention = attention

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.head_dim)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(self.attention(q, k, v, causal=False).reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with the activation between."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to the stream."""

    def __init__(self, config: VisionConfig, *, attention: Callable, dtype, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config, dtype, rngs)
        self.self_attn = Attention(config, attention=attention, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layer_norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def layer_norm(config: VisionConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A norm over the width, with the tower's epsilon."""
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=dtype, rngs=rngs
    )
