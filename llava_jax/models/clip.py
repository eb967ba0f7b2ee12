"""CLIP's vision transformer, up to the hidden state that LLaVA reads.

Letters: B images, P patches, C width, N heads, H head width, L layers.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.config import VisionConfig
from llava_jax.models.linear import Linear, spread
from llava_jax.models.stack import run_stack, stack

# openai/clip-vit-large-patch14-336, preprocessor_config.json.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images: jax.Array) -> jax.Array:
    """uint8[..., 3] -> float32[..., 3] as CLIPImageProcessor rescales and normalises, up to rounding (5e-7)."""
    pixels = images.astype(jnp.float32) * jnp.float32(1 / 255)
    return (pixels - jnp.array(IMAGE_MEAN, jnp.float32)) / jnp.array(IMAGE_STD, jnp.float32)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU, with which CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """[B, height, width, 3] -> [B, P, patch_size * patch_size * 3], patches row by row."""
    B, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels.reshape(B, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
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
        self.layer_norm1 = _layer_norm(config, dtype, rngs)
        self.self_attn = Attention(config, attention=attention, dtype=dtype, rngs=rngs)
        self.layer_norm2 = _layer_norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPVisionTower(nnx.Module):
    """The first `num_layers` layers of CLIP, without its final norm, which LLaVA never reads.

    (llava/model/multimodal_encoder/clip_encoder.py takes hidden_states[select_layer].)
    """

    def __init__(
        self,
        config: VisionConfig,
        num_layers: int,
        *,
        dtype,
        remat: str,
        unroll: int,
        attention: Callable,
        constrain,
        rngs: nnx.Rngs,
    ):
        C = config.hidden_size
        normal = nnx.initializers.normal(C**-0.5)
        self.class_embedding = nnx.Param(normal(rngs.params(), (C,)))
        self.patch_embedding = nnx.Linear(config.patch_size**2 * 3, C, use_bias=False, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(normal(rngs.params(), (1 + config.num_patches, C)))
        self.pre_layrnorm = _layer_norm(config, dtype, rngs)  # HF's spelling
        if num_layers:
            self.layers = stack(
                lambda rngs: Block(config, attention=attention, dtype=dtype, rngs=rngs), num_layers, rngs
            )
        self.config = config
        self.num_layers = num_layers
        self.dtype = dtype
        self.remat = remat
        self.unroll = unroll
        self.constrain = constrain

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels float[B, image_size, image_size, 3], normalised -> hidden state float[B, 1 + P, C]."""
        x = self.patch_embedding(patchify(pixels.astype(self.dtype), self.config.patch_size))
        cls = spread(self.class_embedding[...], (len(x), 1, x.shape[-1]), self.dtype)
        x = jnp.concatenate([cls, x], axis=1)
        x = self.constrain(self.pre_layrnorm(x + spread(self.position_embedding[...], x.shape, self.dtype)))
        if self.num_layers:
            x, _ = run_stack(
                lambda block, x, _: (self.constrain(block(x)), None),
                self.layers,
                x,
                remat=self.remat,
                unroll=self.unroll,
            )
        return x


def _layer_norm(config: VisionConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=dtype, rngs=rngs
    )
