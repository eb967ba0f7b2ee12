"""A model and its tokenizer, ready to answer many prompts at a time."""

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
from llava_jax.decoding import GREEDY, Sampling, continue_prompts
from llava_jax.errors import ConfigError
from llava_jax.models.quantization import Quantization, quantized_kernels
from llava_jax.sharding import constrain_answers, make_mesh, parameter_sharding, spread_rows
from llava_jax.step import abstract_model, abstract_tuned_model
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
    graphdef, shapes = trained_network(stage, mesh, dtype)
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
    graphdef, shapes = abstract_model(config, quantization=method, **_how_to_run(mesh, dtype))
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


def trained_network(stage: Config, mesh: Mesh, dtype: str) -> tuple[nnx.GraphDef, dict]:
    """The network that a stage trains, to answer with: structure and parameters' shapes."""
    return abstract_tuned_model(stage, dropout=False, **_how_to_run(mesh, dtype))[:2]


def _how_to_run(mesh: Mesh, dtype: str) -> dict:
    return dict(dtype=jnp.dtype(dtype), constrain=constrain_answers(mesh))


def _load(
    weights: ModelSource, quantized: dict[str, Quantization], dtype: str, mesh: Mesh
) -> dict[str, jax.Array]:
    place = partial(parameter_sharding, mesh)
    return load(weights, weights.names(), jnp.dtype(dtype), place, quantized=quantized)


class Generator:
    """A network and all its parameters by name, on the mesh, ready to continue prompts.

    All processes of a mesh call it with the same arguments and get the same answers. Rows are spread over the mesh where
    its row axes divide their number.
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
        self.end_ids = self.template.end_ids(tokenizer)
        self.end_of_turn = self.template.assistant.after + self.template.human.opening

    def answer(
        self, questions: list[str], images: list[list[np.ndarray]], *, system: str | None = None, **how
    ) -> list[str]:
        """Single-turn answers. images: per question, in the order of its placeholders, as `generate` takes them; a
        question without `<image>` gets its placeholders in front. system: in place of the template's system text. `how`
        goes to `generate`."""
        prompts = [
            render_prompt(
                question,
                self.template,
                self.tokenizer,
                num_images=len(its_images),
                image_markers=self.config.use_im_start_end,
                system=system,
            )
            for question, its_images in zip(questions, images, strict=True)
        ]
        return self.complete(prompts, images, **how)

    def complete(self, prompts: list[np.ndarray], images: list[list[np.ndarray]], **how) -> list[str]:
        """What `generate` makes of its arguments, as text: up to the end of the assistant's turn, stripped."""
        return [self.read_answer(tokens)[0] for tokens in self.generate(prompts, images, **how)]

    def read_answer(self, tokens: list[int]) -> tuple[str, bool]:
        """The text of an answer's tokens, stripped, and whether it has come to the end of the turn."""
        text, end = self.tokenizer.decode(tokens), ""
        if self.end_of_turn.strip(" "):  # where no token ends a turn, this text does
            text, end, _ = text.partition(self.end_of_turn)
        return text.strip(), bool(end)

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of this length. Raises ConfigError where none may."""
        positions = self.config.text.max_position_embeddings
        if length >= positions:
            raise ConfigError(
                f"The prompt takes {length} tokens and leaves no room for an answer in the model's {positions} positions; "
                "shorten it."
            )
        return positions - length

    def generate(
        self,
        prompts: list[np.ndarray],
        images: list[list[np.ndarray]],
        *,
        max_new_tokens: int,
        layouts: list[list[ImageLayout]] | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        length: int | None = None,
        slots: int | None = None,
    ) -> list[list[int]]:
        """Continues token sequences int32[T], in which IMAGE_TOKEN stands for one image.

        images: per sequence, uint8[tiles, H, W, 3] each, with `layouts` to match (`image_processor` reads both);
        without layouts uint8[H, W, 3], told as one tile.
        Returns the new tokens up to and without the one that ends them, no more than the model's positions allow.
        seed: of the draws, where `sampling` draws.
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
        room = self.room(max(map(len, sequences)))
        batch = left_pad(
            sequences, tiles, self.config.vision.image_size, feature_ids, length=length, slots=slots
        )
        batch = jax.device_put(batch, spread_rows(self.mesh, len(prompts)))
        tokens = continue_prompts(
            self.parameters,
            batch,
            jax.random.key(seed),
            sampling,
            graphdef=self.graphdef,
            max_new_tokens=min(max_new_tokens, room),
            end_ids=self.end_ids,
            sample=sampling.temperature > 0,
            mesh=self.mesh,
        )
        return [until(row, self.end_ids) for row in np.asarray(tokens).tolist()]


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


def until(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """The tokens in front of the first that is one of end_ids."""
    return list(itertools.takewhile(lambda token: token not in end_ids, tokens))
