"""CLIP's vision transformer, up to the hidden state that LLaVA reads.

Letters: B images, P patches, C width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.config import VisionConfig
from llava_jax.models.linear import spread
from llava_jax.models.stack import run_stack, stack
from llava_jax.models.vit import Block, layer_norm, patchify


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
        self.pre_layrnorm = layer_norm(config, dtype, rngs)  # HF's spelling
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
