"""Runs two models on the same drawn picture and prompt, and says where their logits differ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_jax.config import ModelConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.source import ModelSource
from llava_jax.data.conversation import IMAGE_TOKEN, render_prompt
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tiles import make_tiles, tile_features
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.step import abstract_model, bind

QUESTION = "What is in the picture?"
# Of the largest logit. Float32 sums in another order differ by less; weights rounded to bfloat16 by more.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """The largest difference of any logit, and where it is.

    `position` counts the tokens as the decoder sees them, image tokens included; `largest`: the largest logit.
    """

    maximum: float
    position: int
    token: int
    values: tuple[float, float]
    largest: float
    num_positions: int

    @property
    def equal(self) -> bool:
        """Whether the models are the same up to float32's rounding."""
        return self.maximum <= TOLERANCE * self.largest

    def __str__(self) -> str:
        a, b = self.values
        return (
            f"max difference {self.maximum:.3g} at position {self.position} of {self.num_positions}, vocabulary id "
            f"{self.token}: {a:.6g} and {b:.6g}; the largest logit is {self.largest:.4g}"
        )


def compare_logits(first: ModelSource, second: ModelSource) -> LogitDifference:
    """Both models in float32, one after the other; each takes 4 bytes per parameter.

    Raises ConversionError where they cannot be asked the same.
    """
    for source in (first, second):
        if not isinstance(source.config, ModelConfig):
            raise ConversionError(f"Logits need whole models, but one is of layout {source.layout}.")
    if _asked(first.config) != _asked(second.config):
        raise ConversionError(
            "The models cannot be asked the same, they have other vocabularies or see pictures otherwise: "
            f"{_asked(first.config)} and {_asked(second.config)}."
        )
    prompt = _prompt(first)
    a, b = (run_prompt(source, prompt) for source in (first, second))
    distances = np.abs(a - b)
    distances = np.where(np.isnan(distances), np.inf, distances)
    position, token = np.unravel_index(distances.argmax(), distances.shape)
    return LogitDifference(
        maximum=float(distances[position, token]),
        position=int(position),
        token=int(token),
        values=(float(a[position, token]), float(b[position, token])),
        largest=float(np.abs(a).max()),
        num_positions=len(a),
    )


def drawn_picture(width: int, height: int) -> np.ndarray:
    """A disc and a square on a background that changes in both directions, uint8[height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    picture = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], axis=-1)
    picture[(x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.05] = (250, 210, 40)
    picture[(abs(x - 0.75) < 0.12) & (abs(y - 0.7) < 0.12)] = (20, 40, 200)
    return picture.round().astype(np.uint8)


def _asked(model: ModelConfig) -> dict:
    """What the question looks like to a model."""
    return {
        "vocab_size": model.text.vocab_size,
        "image_size": model.vision.image_size,
        "num_image_tokens": model.num_image_tokens,
        "image_grid_pinpoints": model.image_grid_pinpoints,
        "patch_merge_type": model.patch_merge_type,
    }


def _prompt(source: ModelSource) -> np.ndarray:
    """The question int32[T] with one placeholder; without a tokenizer, ids from all over the vocabulary."""
    if source.tokenizer_path and source.template in TEMPLATES:
        template = TEMPLATES[source.template]
        return render_prompt(
            QUESTION,
            template,
            load_tokenizer(source.tokenizer_path, source.config.extra_tokens),
            num_images=1,
            image_markers=source.config.use_im_start_end,
        )
    ids = np.linspace(1, source.config.text.vocab_size - 1, 24).astype(np.int32)
    return np.insert(ids, 8, IMAGE_TOKEN)


def picture_of(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The picture's tiles uint8[M, H, W, 3] and the features that its tokens show int32[n]."""
    side, grid = model.vision.image_size, model.image_grid_pinpoints
    if not grid:
        return drawn_picture(side, side)[None], np.arange(model.num_image_tokens, dtype=np.int32)
    size = grid[0]
    features = tile_features(
        size,
        grid=(size[0] // side, size[1] // side),
        side=side // model.vision.patch_size,
        merge_type=model.patch_merge_type,
    )
    return make_tiles(Image.fromarray(drawn_picture(*size)), side, size, size), features


def run_prompt(source: ModelSource, prompt: np.ndarray) -> np.ndarray:
    """Logits float32[T, V] of a prompt int32[P] whose only placeholder is the drawn picture, expanded to T."""
    images, features = picture_of(source.config)
    (place,) = np.flatnonzero(prompt == IMAGE_TOKEN)
    tokens = np.insert(prompt, [place] * (len(features) - 1), IMAGE_TOKEN)
    feature_ids = np.zeros_like(tokens)
    feature_ids[tokens == IMAGE_TOKEN] = features
    graphdef, _ = abstract_model(source.config)
    parameters = {name: jnp.asarray(source.read(name), jnp.float32) for name in source.names()}
    with jax.default_matmul_precision("highest"):
        return np.asarray(_run(graphdef, parameters, tokens, images, feature_ids))


@functools.partial(jax.jit, static_argnames="graphdef")
def _run(graphdef, parameters, tokens, images, feature_ids):
    model = bind(graphdef, parameters)
    positions = jnp.arange(len(tokens))[None]
    hidden = model(tokens[None], images[None], positions, jnp.ones_like(positions), feature_ids[None])
    return model.language_model.logits(hidden)[0]
