"""Continues prompts with a KV cache: greedy or sampled, many at a time."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from llava_jax.convert.source import ModelSource
from llava_jax.data.conversation import IMAGE_TOKEN, render_prompt
from llava_jax.data.image_processor import ImageLayout, ImageProcessor, row_feature_ids
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from llava_jax.errors import ConfigError
from llava_jax.models.llama import Cache
from llava_jax.models.quantization import Quantization, quantized_kernels
from llava_jax.sharding import gather_codes, make_mesh, parameter_sharding, replicated
from llava_jax.step import abstract_model, abstract_tuned_model, bind
from llava_jax.tuned_weights import restored
from llava_jax.tuning import check_blocks
from llava_jax.weights import is_run, load, open_any, open_trained

PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, so that few lengths are compiled


def load_generator(
    path: str, *, template: str = "", dtype: str = "bfloat16", quantization: str = "none"
) -> "Generator":
    """A generator from a run directory, our model directory or a Hugging Face directory.

    template: a conversation template in place of the model's own. quantization: of the decoder's kernels: none, int8
    or nf4. Pictures are read as the run's last stage reads them.
    """
    stage = None
    if is_run(Path(path).expanduser()):
        weights, stage = open_trained(Path(path))
    else:
        weights = open_any(path)
    if not isinstance(weights.config, ModelConfig) or not weights.tokenizer_path:
        raise ConfigError(
            f"{path} is not a whole model with its tokenizer. `python tools/convert_weights.py inspect {path}` says what it "
            "holds; from-hf --vision-tower=CLIP --language-model=DECODER DST puts a model together of its parts."
        )
    tokenizer = load_tokenizer(weights.tokenizer_path, weights.config.extra_tokens)
    mesh = make_mesh(MeshConfig())
    how = dict(template=template or weights.template, dtype=dtype, quantization=quantization)
    if stage:
        return open_trained_generator(weights, stage, tokenizer, mesh, **how)
    return open_generator(weights, tokenizer, mesh, **how)


def open_trained_generator(
    weights: ModelSource,
    stage: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    template: str,
    dtype: str,
    quantization: str,
) -> "Generator":
    """A generator from weights in the form in which a stage trains them, which are read onto the mesh.

    Quantised as they were trained, they answer with adapters beside them; otherwise adapters are merged first.
    """
    if quantization == "none" or quantization != stage.lora.quantization:
        merged = restored(weights, stage)
        how = dict(template=template, dtype=dtype, quantization=quantization, data=stage.data)
        return open_generator(merged, tokenizer, mesh, **how)
    graphdef, shapes, _ = abstract_tuned_model(
        stage, dropout=False, gather_codes=gather_codes(mesh), dtype=jnp.dtype(dtype)
    )
    return Generator(
        graphdef,
        _load(weights, quantized_kernels(shapes, Quantization.of(stage.lora)), dtype, mesh),
        tokenizer,
        mesh,
        template=template,
        image_processor=ImageProcessor.from_config(stage.data, stage.model),
    )


def open_generator(
    weights: ModelSource,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    template: str,
    dtype: str,
    quantization: str = "none",
    data: DataConfig | None = None,
) -> "Generator":
    """A generator from weights, which are read onto the mesh.

    data: says how pictures are read; None: as the model's aspect ratio says, without limits to their pixels.
    """
    config = weights.config
    check_blocks("--quantization", quantization, config.text)
    method = None if quantization == "none" else Quantization(quantization)
    graphdef, shapes = abstract_model(
        config, quantization=method, gather_codes=gather_codes(mesh), dtype=jnp.dtype(dtype)
    )
    return Generator(
        graphdef,
        _load(weights, quantized_kernels(shapes, method), dtype, mesh),
        tokenizer,
        mesh,
        template=template,
        image_processor=ImageProcessor(config, aspect_ratio=weights.image_aspect_ratio)
        if data is None
        else ImageProcessor.from_config(data, config),
    )


def _load(
    weights: ModelSource, quantized: dict[str, Quantization], dtype: str, mesh: Mesh
) -> dict[str, jax.Array]:
    place = partial(parameter_sharding, mesh)
    return load(weights, weights.names(), jnp.dtype(dtype), place, quantized=quantized)


class Generator:
    """A network and all its parameters by name, on the mesh, ready to continue prompts.

    All processes of a mesh call it with the same arguments and get the same answers.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        parameters: dict[str, jax.Array],
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        template: str,
        image_processor: ImageProcessor,
    ):
        self.graphdef = graphdef
        self.parameters = parameters
        self.config = image_processor.model
        self.template = get_template(template)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.mesh = mesh

    def answer(self, questions: list[str], images: list[list[np.ndarray]], **how) -> list[str]:
        """Single-turn answers. images: per question, in the order of its placeholders, as `generate` takes them; a
        question without `<image>` gets its placeholders in front. `how` goes to `generate`."""
        prompts = [
            render_prompt(
                question,
                self.template,
                self.tokenizer,
                num_images=len(its_images),
                image_markers=self.config.use_im_start_end,
            )
            for question, its_images in zip(questions, images, strict=True)
        ]
        return self.complete(prompts, images, **how)

    def complete(self, prompts: list[np.ndarray], images: list[list[np.ndarray]], **how) -> list[str]:
        """What `generate` makes of its arguments, as text: up to the end of the assistant's turn, stripped."""
        # Where no token ends a turn, this text does.
        end = self.template.assistant.after + self.template.human.opening
        texts = [self.tokenizer.decode(tokens) for tokens in self.generate(prompts, images, **how)]
        return [(text.partition(end)[0] if end.strip(" ") else text).strip() for text in texts]

    def generate(
        self,
        prompts: list[np.ndarray],
        images: list[list[np.ndarray]],
        *,
        max_new_tokens: int,
        layouts: list[list[ImageLayout]] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        length: int | None = None,
        slots: int | None = None,
    ) -> list[list[int]]:
        """Continues token sequences int32[T], in which IMAGE_TOKEN stands for one image.

        images: per sequence, uint8[tiles, H, W, 3] each, with `layouts` to match (`image_processor` reads both);
        without layouts uint8[H, W, 3], told as one tile.
        Returns the new tokens up to and without the one that ends them, no more than the model's positions allow.
        temperature 0 is greedy; otherwise tokens are drawn from the smallest set of probability top_p.
        length, slots: tokens and tiles to which each row is padded, so that calls alike are compiled once.
        """
        if layouts is None:
            images = [[image[None] for image in its_images] for its_images in images]
            one_tile = ImageLayout(1, np.arange(self.config.num_image_tokens, dtype=np.int32))
            layouts = [[one_tile] * len(its_images) for its_images in images]
        expanded = [
            expand_prompt(prompt, its_layouts, self.config.num_image_tokens)
            for prompt, its_layouts in zip(prompts, layouts, strict=True)
        ]
        sequences, feature_ids = zip(*expanded, strict=True)
        tiles = [[tile for image in its_images for tile in image] for its_images in images]
        room = self.config.text.max_position_embeddings - max(len(sequence) for sequence in sequences)
        if room < 1:
            raise ConfigError(
                f"The prompt takes {max(map(len, sequences))} tokens and leaves no room for an answer in the model's "
                f"{self.config.text.max_position_embeddings} positions; shorten it."
            )
        end_ids = self.template.end_ids(self.tokenizer)
        batch = left_pad(
            sequences, tiles, self.config.vision.image_size, feature_ids, length=length, slots=slots
        )
        batch = jax.device_put(batch, replicated(self.mesh))
        tokens = continue_prompts(
            self.parameters,
            batch,
            jax.random.key(seed),
            temperature,
            top_p,
            graphdef=self.graphdef,
            max_new_tokens=min(max_new_tokens, room),
            end_ids=end_ids,
            sample=temperature > 0,
            mesh=self.mesh,
        )
        return [_until(row, end_ids) for row in np.asarray(tokens).tolist()]


def expand_prompt(
    prompt: np.ndarray, layouts: list[ImageLayout], features_per_tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """Repeats each placeholder as its image's layout asks: prompt int32[T] -> tokens and feature_ids int32[T'].

    A feature's id counts through the tiles of all images; it is 0 where there is no placeholder.
    """
    is_image = prompt == IMAGE_TOKEN
    copies = np.ones(len(prompt), np.int64)
    copies[is_image] = [len(layout.feature_ids) for layout in layouts]
    tokens = prompt.repeat(copies)
    feature_ids = np.zeros(len(tokens), np.int32)
    feature_ids[tokens == IMAGE_TOKEN] = row_feature_ids(layouts, features_per_tile)
    return tokens, feature_ids


def left_pad(
    sequences: Sequence[np.ndarray],
    images: list[list[np.ndarray]],
    image_size: int,
    feature_ids: Sequence[np.ndarray] | None = None,
    *,
    length: int | None = None,
    slots: int | None = None,
) -> dict:
    """Expanded prompts int32[T], their feature_ids int32[T] if any, and each one's tiles [H, W, 3] as a batch whose
    last column is every row's last token.

    length, slots: columns and tiles per row; None: as many as the longest needs, rounded up, and the most.
    """
    length = length or -(-max(map(len, sequences)) // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens, positions, segment_ids = (np.zeros((len(sequences), length), np.int32) for _ in range(3))
    slots = max(map(len, images)) if slots is None else slots
    dtype = next((image.dtype for its_images in images for image in its_images), np.uint8)
    pixels = np.zeros((len(sequences), slots, image_size, image_size, 3), dtype)
    for row, (sequence, its_images) in enumerate(zip(sequences, images, strict=True)):
        tokens[row, length - len(sequence) :] = sequence
        positions[row, length - len(sequence) :] = np.arange(len(sequence))
        segment_ids[row, length - len(sequence) :] = 1
        for slot, image in enumerate(its_images):
            pixels[row, slot] = image
    batch = {"tokens": tokens, "images": pixels, "positions": positions, "segment_ids": segment_ids}
    if feature_ids is not None:
        batch["feature_ids"] = np.zeros_like(tokens)
        for row, ids in enumerate(feature_ids):
            batch["feature_ids"][row, length - len(ids) :] = ids
    return batch


def _until(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in end_ids, tokens))


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "end_ids", "sample", "mesh"))
def continue_prompts(
    parameters, batch, key, temperature, top_p, *, graphdef, max_new_tokens, end_ids, sample, mesh=None
) -> jax.Array:
    """Continues a left-padded batch by max_new_tokens tokens or until every row has ended with one of end_ids.

    -> new tokens int32[B, max_new_tokens]; after a row's end token it holds only end_ids[0]. `sample` draws from
    the smallest set of probability top_p at the given temperature; otherwise the likeliest token is taken. With a
    mesh every device gets all of the tokens.
    """
    model = bind(graphdef, parameters)
    B, T = batch["tokens"].shape
    no_images = batch["images"][:, :0]
    ones = jnp.ones((B, 1), jnp.int32)

    def choose(logits, key):
        return (
            _sample(logits, key, temperature, top_p)
            if sample
            else jnp.argmax(logits, axis=-1).astype(jnp.int32)
        )

    def unfinished(carry):
        i, _, _, done, _, _ = carry
        return (i < max_new_tokens) & ~done.all()

    def step(carry):
        i, logits, cache, done, tokens, position = carry
        token = jnp.where(done, end_ids[0], choose(logits, jax.random.fold_in(key, i)))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        logits, cache = model.extend(token[:, None], no_images, position, ones, cache)
        return i + 1, logits, cache, done | jnp.isin(token, jnp.array(end_ids)), tokens, position + 1

    cache: Cache = model.language_model.empty_cache(B, T + max_new_tokens)
    logits, cache = model.extend(
        batch["tokens"],
        batch["images"],
        batch["positions"],
        batch["segment_ids"],
        cache,
        batch.get("feature_ids"),
    )
    carry = (
        jnp.int32(0),
        logits,
        cache,
        jnp.zeros(B, bool),
        jnp.full((B, max_new_tokens), end_ids[0], jnp.int32),
        batch["positions"][:, -1:] + 1,
    )
    tokens = jax.lax.while_loop(unfinished, step, carry)[4]
    return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, replicated(mesh))


def _sample(logits: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """Nucleus sampling. logits float32[B, V] -> int32[B]."""
    logits = logits / temperature
    descending = jnp.sort(logits, axis=-1, descending=True)
    cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    kept = jnp.sum(cumulative < top_p, axis=-1, keepdims=True)  # the token that crosses top_p is kept too
    threshold = jnp.take_along_axis(descending, jnp.minimum(kept, logits.shape[-1] - 1), axis=-1)
    return jax.random.categorical(key, jnp.where(logits < threshold, -jnp.inf, logits)).astype(jnp.int32)
