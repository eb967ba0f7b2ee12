"""LLaVA: CLIP features, projected, take the places that the data pipeline kept for them in the token sequence.

Letters: B rows, T tokens, M image slots per row, P features per image, C CLIP's width, D decoder width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.config import ModelConfig
from llava_jax.models.clip import CLIPVisionTower, normalize
from llava_jax.models.llama import Cache, Llama

IMAGE_TOKEN = -200  # the id of one placeholder, as in the original (llava/constants.py)


class Projector(nnx.Module):
    """`linear`, `mlp{N}x_gelu` (exact GELU between N layers) or `identity`, with torch's default init."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.depth = config.projector_depth
        width = config.vision.hidden_size
        for i in range(1, self.depth + 1):
            uniform = _symmetric_uniform(width**-0.5)
            linear = nnx.Linear(
                width, config.text.hidden_size, kernel_init=uniform, bias_init=uniform, dtype=dtype, rngs=rngs
            )
            setattr(self, f"linear_{i}", linear)
            width = config.text.hidden_size

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., C] -> float[..., D]."""
        for i in range(1, self.depth + 1):
            if i > 1:
                x = jax.nn.gelu(x, approximate=False)
            x = getattr(self, f"linear_{i}")(x)
        return x


def _symmetric_uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def insert_image_features(embeddings: jax.Array, features: jax.Array, is_image: jax.Array) -> jax.Array:
    """Fills each image placeholder with the next feature of its row, in order.

    embeddings float[B, T, D], features float[B, M * P, D], is_image bool[B, T] -> float[B, T, D].
    """
    slot = jnp.cumsum(is_image, axis=1) - 1  # which feature a placeholder takes
    chosen = jnp.take_along_axis(features, jnp.maximum(slot, 0)[..., None], axis=1)
    return jnp.where(is_image[..., None], chosen, embeddings)


class LLaVA(nnx.Module):
    """Vision tower, projector and decoder.

    remat and unroll say how the layer stacks run (models/stack.py). `constrain` is applied to every activation
    that flows between blocks, float[rows, ...]; the trainer uses it to say how rows lie on the devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
        rngs: nnx.Rngs,
    ):
        how = dict(dtype=dtype, remat=remat, unroll=unroll, constrain=constrain, rngs=rngs)
        self.vision_tower = CLIPVisionTower(config.vision, config.num_vision_layers_run, **how)
        self.multi_modal_projector = Projector(config, dtype=dtype, rngs=rngs)
        self.language_model = Llama(config.text, **how)
        self.config = config

    def __call__(
        self, tokens: jax.Array, images: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Hidden states before the head, float[B, T, D].

        tokens int32[B, T] with IMAGE_TOKEN at placeholders; images [B, M, height, width, 3], uint8 or already
        normalised float, where a row's k-th run of placeholders takes its image k and M may be 0;
        positions int32[B, T]; segment_ids int32[B, T], 0 at padding.
        """
        return self.language_model(self.embed(tokens, images), positions, segment_ids)

    def embed(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
        """Token embeddings with image features in place, float[B, T, D]; arguments as in `__call__`."""
        is_image = tokens == IMAGE_TOKEN
        embeddings = self.language_model.embed_tokens(jnp.where(is_image, 0, tokens))
        B, M = images.shape[:2]
        if M == 0:
            return embeddings
        features = self.encode_images(images.reshape(B * M, *images.shape[2:]))
        return insert_image_features(embeddings, features.reshape(B, -1, features.shape[-1]), is_image)

    def encode_images(self, images: jax.Array) -> jax.Array:
        """[N, height, width, 3], uint8 or normalised float -> features for the decoder, float[N, P, D]."""
        pixels = normalize(images) if images.dtype == jnp.uint8 else images
        features = self.vision_tower(pixels)
        if self.config.select_feature == "patch":
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def extend(
        self, tokens: jax.Array, images: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Next-token logits float32[B, V] after tokens that follow those in the cache, and the longer cache.

        The last column of `tokens` must be real in every row (left padding).
        """
        hidden, cache = self.language_model.extend(self.embed(tokens, images), positions, segment_ids, cache)
        return self.language_model.logits(hidden[:, -1]), cache
