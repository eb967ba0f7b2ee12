"""SigLIP's vision transformer, up to the hidden state that LLaVA reads.

Letters: B images, P patches, C width.
"""

from collections.abc import Callable

import jax
from flax import nnx

from llava_jax.config import VisionConfig
from llava_jax.models.linear import Linear, spread
from llava_jax.models.stack import run_stack, stack
from llava_jax.models.vit import Block, patchify


class SiglipVisionTower(nnx.Module):
    """The first `num_layers` layers of SigLIP, without its final norm and pooling head, which LLaVA never reads.

    Beside CLIP's, its hidden states have no class token, its patches a bias, and no norm comes before the layers.
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
        self.patch_embedding = Linear(config.patch_size**2 * 3, C, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.num_patches, C)))
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
        """pixels float[B, image_size, image_size, 3], normalised -> hidden state float[B, P, C]."""
        x = self.patch_embedding(patchify(pixels.astype(self.dtype), self.config.patch_size))
        x = self.constrain(x + spread(self.position_embedding[...], x.shape, self.dtype))
        if self.num_layers:
            x, _ = run_stack(
                lambda block, x, _: (self.constrain(block(x)), None),
                self.layers,
                x,
                remat=self.remat,
                unroll=self.unroll,
            )
        return x
