"""What a stage's steps and epochs consist of: measured where its data lies, assumed where it does not."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from llava_jax.config import Config, ModelConfig, require
from llava_jax.data.batching import bucket_images, bucket_length
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.flops import Work, causal_pairs, training_flops
from llava_jax.weights import find_tokenizer

# Of a mix shaped like LLaVA-1.5's 665K, which `python -m benchmarks.packing` draws: 862 tokens per sample.
MEAN_TEXT_TOKENS = 286
GROUPED_PADDING = 0.353  # of the tokens, in steps of samples alike in length
PACKED_SAMPLES_PER_ROW = 4  # data.row_length=None: that many of data.max_length
SUPERVISED_SHARE = 0.5  # of the text


@dataclasses.dataclass(frozen=True)
class Workload:
    """The rows to plan for."""

    length: int  # tokens
    num_images: int  # slots
    row: Work  # of such a row
    epoch: Work | None  # of a whole epoch; None: it is not known how many samples there are
    source: str  # where all this is from, in words


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user says instead of what the data would."""

    tokens: int | None = None
    images: int | None = None
    samples: int | None = None

    @property
    def shape(self) -> bool:
        return self.tokens is not None or self.images is not None


def find_workload(
    config: Config, given: Given, progress: Callable[[int, int], None] = lambda done, total: None
) -> Workload:
    """The largest rows that the stage's data make, if it and a tokenizer are there and nothing else is given.

    Raises DataError as training would on data that is there and wrong.
    """
    missing = _missing(config)
    if missing or given.shape:
        return assume(config, given, "as told" if given.shape else f"assumed, for {missing}")
    dataset, _ = open_datasets(config.data, config.seed)
    pipeline = Pipeline(
        config.data,
        dataset,
        tokenizer=load_tokenizer(find_tokenizer(config.init), config.model.extra_tokens),
        images=ImageProcessor.from_config(config.data, config.model),
        seed=config.seed,
        accumulation_steps=config.train.accumulation_steps,
        progress=progress,
    )
    return _measured(config, pipeline)


def assume(config: Config, given: Given, why: str) -> Workload:
    """Rows of samples as LLaVA-1.5's mix has them, an image in each, as long as the config lets them be."""
    data = config.data
    features = config.model.num_image_tokens
    sample = min(features + MEAN_TEXT_TOKENS, data.max_length)
    if data.packing:
        length = given.tokens or data.row_length or PACKED_SAMPLES_PER_ROW * data.max_length
        num_images = data.max_images_per_row or math.ceil(length / sample * _tiles(config))
        per_row = length / sample
    else:
        require(
            (given.tokens or 0) <= data.max_length,
            f"--tokens={given.tokens} is more than data.max_length={data.max_length}, to which samples are cut; raise that.",
        )
        length = bucket_length(given.tokens or data.max_length, data.max_length)
        num_images, per_row = _tiles(config), 1
    if given.images is not None:
        require(
            given.images * features < length,
            f"--images={given.images} of {features} tokens each do not fit a row of {length} tokens; raise --tokens.",
        )
        num_images = given.images if data.packing else bucket_images(given.images)
    num_text = max(0, length - num_images * features)
    pairs = per_row * causal_pairs(length / per_row)
    row = Work(length, pairs, num_images, SUPERVISED_SHARE * num_text)
    epoch = None
    if given.samples:
        epoch = row * (given.samples / per_row)
        if data.group_by_modality_length:
            tokens = min(length, sample / (1 - GROUPED_PADDING))
            epoch = dataclasses.replace(
                epoch,
                tokens=given.samples * tokens,
                pairs=given.samples * causal_pairs(tokens),
                supervised=given.samples * SUPERVISED_SHARE * max(0, sample - features),
            )
    return Workload(length, num_images, row, epoch, why)


def _measured(config: Config, pipeline: Pipeline) -> Workload:
    """The costliest of the shapes that an epoch's steps have."""
    shapes = [pipeline.schedule.step_shape(step) for step in range(pipeline.steps_per_epoch)]
    lengths = pipeline.measured.lengths.astype(float)  # 0 for samples that are not used
    epoch = Work(
        tokens=config.data.batch_size * sum(length for length, _ in shapes),
        pairs=causal_pairs(lengths).sum(),
        images=config.data.batch_size * sum(num_images for _, num_images in shapes),
        supervised=pipeline.summary()["supervised_tokens"],
    )

    def row(shape: tuple[int, int]) -> Work:
        length, num_images = shape
        packed = length * epoch.pairs / lengths.sum()  # several samples, which do not see each other
        pairs = packed if config.data.packing else causal_pairs(length)
        return Work(length, pairs, num_images, length * epoch.supervised / epoch.tokens)

    def cost(shape: tuple[int, int]) -> float:
        return sum(training_flops(config.model, config.tune, row(shape)).values())

    largest = max(set(shapes), key=cost)
    source = f"measured: the largest of {len(set(shapes))} shapes of {pipeline.num_samples:,} samples"
    return Workload(*largest, row(largest), epoch, source)


def _missing(config: Config) -> str:
    """What keeps the data from being measured; '' if nothing does."""
    data, init = config.data, config.init
    files = [f"{data.dataset_dir}/dataset_info.json"] if data.dataset else data.path.split(",")
    for file in files:
        if not Path(file.strip()).is_file():
            return f"{file} is not here" if file else "the recipe names no data"
    tokenizer = init.tokenizer or init.model or init.language_model
    if not tokenizer or not Path(tokenizer).exists():
        return f"its tokenizer ({tokenizer or 'not named'}) is not here"
    return ""


def _tiles(config: Config) -> int:
    """Image slots of a sample with one image."""
    if config.data.image_aspect_ratio != "anyres":
        return 1
    return 1 + _most_tiles(config.model)


def _most_tiles(model: ModelConfig) -> int:
    side = model.vision.image_size
    return max((w // side * (h // side) for w, h in model.image_grid_pinpoints), default=0)
