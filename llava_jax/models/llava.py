"""LLaVA: a vision tower's features, projected, take the places that the data pipeline kept for them in the token sequence.

Letters: B rows, T tokens, M image slots per row (an image in tiles takes several), P features per slot, C the
tower's width, D decoder width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.config import CLIP, SIGLIP, ModelConfig
from llava_jax.kernels.attention import attention
from llava_jax.models.clip import CLIPVisionTower
from llava_jax.models.linear import Embed, Linear, spread
from llava_jax.models.llama import Cache, Llama
from llava_jax.models.siglip import SiglipVisionTower
from llava_jax.models.vit import normalize

IMAGE_TOKEN = -200  # the id of one placeholder, as in the original (llava/constants.py)
NEWLINE = -1  # the feature id of image_newline


class Projector(nnx.Module):
    """`linear`, `mlp{N}x_gelu` (exact GELU between N layers) or `identity`, with torch's default init."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.depth = config.projector_depth
        width = config.vision.hidden_size
        for i in range(1, self.depth + 1):
            uniform = _symmetric_uniform(width**-0.5)
            linear = Linear(
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


def insert_image_features(
    embeddings: jax.Array,
    features: jax.Array,
    is_image: jax.Array,
    feature_ids: jax.Array | None = None,
    newline: jax.Array | None = None,
) -> jax.Array:
    """Fills each image placeholder with a feature of its row: the one of its id, without ids the next in order.

    embeddings float[B, T, D], features float[B, M * P, D], is_image bool[B, T], feature_ids int32[B, T], read at
    placeholders only, where NEWLINE stands for `newline` float[D] and others differ -> float[B, T, D].
    """
    if feature_ids is None:
        feature_ids = jnp.cumsum(is_image, axis=1) - 1
    nowhere = features.shape[1] + jnp.arange(
        is_image.shape[1]
    )  # all different, so gradients are moved and not added
    places = jnp.where(is_image & (feature_ids != NEWLINE), feature_ids, nowhere)
    take = jax.vmap(
        lambda of_row, places: of_row.at[places].get(mode="fill", fill_value=0, unique_indices=True)
    )
    chosen = take(features, places)
    if newline is not None:
        newlines = spread(newline, chosen.shape, chosen.dtype)
        chosen = jnp.where((feature_ids == NEWLINE)[..., None], newlines, chosen)
    return jnp.where(is_image[..., None], chosen, embeddings)


class LLaVA(nnx.Module):
    """Vision tower, projector and decoder.

    remat and unroll say how the layer stacks run (models/stack.py). `attention` is the door with what the trainer
    binds of it, for tokens that attend to themselves; steps of generation take the plain door. `constrain` is
    applied to every activation that flows between blocks, float[rows, ...], and with a cache to queries, keys and
    values instead; the trainer and the generator use it to say how rows lie on the devices. `look_up` applies the
    embedding table to tokens int32[B, T], for the same reason.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        attention: Callable[..., jax.Array] = attention,
        constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
        look_up: Callable[[Embed, jax.Array], jax.Array] = lambda table, tokens: table(tokens),
        dot_general: Callable = jax.lax.dot_general,
        rngs: nnx.Rngs,
    ):
        how = dict(
            dtype=dtype, remat=remat, unroll=unroll, attention=attention, constrain=constrain, rngs=rngs
        )
        tower = {CLIP: CLIPVisionTower, SIGLIP: SiglipVisionTower}[config.vision.model_type]
        self.vision_tower = tower(config.vision, config.num_vision_layers_run, **how)
        self.multi_modal_projector = Projector(config, dtype=dtype, rngs=rngs)
        self.language_model = Llama(config.text, **how)
        if config.patch_merge_type == "spatial_unpad":
            # Beside the embeddings, as in the original, and so trained with the decoder.
            width = config.text.hidden_size
            newline = jax.random.normal(rngs.params(), (width,)) * width**-0.5
            self.language_model.image_newline = nnx.Param(newline)
        self.config = config
        self.look_up = look_up
        for _, module in nnx.iter_graph(self):
            if isinstance(module, nnx.Linear):
                module.dot_general = dot_general

    def __call__(
        self,
        tokens: jax.Array,
        images: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        feature_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states before the head, float[B, T, D].

        tokens int32[B, T] with IMAGE_TOKEN at placeholders; images [B, M, height, width, 3], uint8 or already
        normalised float, where M may be 0; positions int32[B, T]; segment_ids int32[B, T], 0 at padding.
        feature_ids int32[B, T] says for each placeholder which of its row's M * P features it takes, NEWLINE
        that it takes `image_newline`; without them a row's features are taken in order.
        """
        return self.language_model(self.embed(tokens, images, feature_ids), positions, segment_ids)

    def embed(self, tokens: jax.Array, images: jax.Array, feature_ids: jax.Array | None = None) -> jax.Array:
        """Token embeddings with image features in place, float[B, T, D]; arguments as in `__call__`."""
        is_image = tokens == IMAGE_TOKEN
        embeddings = self.look_up(self.language_model.embed_tokens, jnp.where(is_image, 0, tokens))
        B, M = images.shape[:2]
        if M == 0:
            return embeddings
        features = self.encode_images(images.reshape(B * M, *images.shape[2:]))
        features = features.reshape(B, -1, features.shape[-1])
        newline = getattr(self.language_model, "image_newline", None)
        return insert_image_features(
            embeddings, features, is_image, feature_ids, None if newline is None else newline[...]
        )

    def encode_images(self, images: jax.Array) -> jax.Array:
        """[N, height, width, 3], uint8 or normalised float -> features for the decoder, float[N, P, D]."""
        pixels = normalize(images, self.config.vision) if images.dtype == jnp.uint8 else images
        features = self.vision_tower(pixels)
        if self.config.select_feature == "patch":
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def extend(
        self,
        tokens: jax.Array,
        images: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache,
        feature_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Next-token logits float32[B, V] after tokens that follow those in the cache, and the longer cache.

        The last column of `tokens` must be real in every row (left padding).
        """
        embeddings = self.embed(tokens, images, feature_ids)
        hidden, cache = self.language_model.extend(embeddings, positions, segment_ids, cache)
        return self.language_model.logits(hidden[:, -1]), cache
