"""The models and batches of `benchmarks.step_cpu`, the same for both sides."""

import dataclasses
from pathlib import Path

import numpy as np

from llava_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from llava_jax.convert.export import write_hf
from llava_jax.data.batching import Sample, bucket_length, collate
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN
from llava_jax.step import abstract_model, random_parameters

LEARNING_RATE = 1e-4
NUM_BATCHES = 4
ANSWERED = 0.5  # the share of text that is answers


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how it is trained: stage 2, so projector and decoder with a frozen tower."""

    model: ModelConfig
    num_rows: int
    max_length: int  # data.max_length, which decides the lengths to which ours pads
    longest: int  # the longest row of every batch, to which the other side pads
    steps_per_round: int

    def config(self, dtype: str) -> Config:
        """Our recipe: computation and frozen weights in `dtype`, without rematerialisation."""
        depth = max(self.model.text.num_hidden_layers, self.model.vision.num_hidden_layers)
        return Config(
            model=self.model,
            data=DataConfig(batch_size=self.num_rows, max_length=self.max_length),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0),
            loss=LossConfig(chunk_size=128),
            mesh=MeshConfig(1, 1, 1),
            train=TrainConfig(dtype=dtype, frozen_dtype=dtype, remat="none", scan_unroll=depth),
        )

    def samples(self, step: int) -> list[Sample]:
        """The samples of a step: an image each, then text whose second part is the answer."""
        rng = np.random.default_rng(step % NUM_BATCHES)
        num_image, size = self.model.num_image_tokens, self.model.vision.image_size
        lengths = rng.integers((num_image + self.longest) // 2, self.longest, self.num_rows)
        lengths[0] = self.longest
        samples = []
        for length in lengths:
            tokens = rng.integers(1, self.image_token, length).astype(np.int32)
            tokens[1 : 1 + num_image] = IMAGE_TOKEN
            first = length - round(ANSWERED * (length - num_image))
            labels = np.where(np.arange(length) < first, IGNORE, tokens).astype(np.int32)
            images = rng.integers(0, 256, (1, size, size, 3)).astype(np.uint8)
            samples.append(Sample(tokens, labels, images))
        return samples

    def batch(self, step: int, length: int) -> dict[str, np.ndarray]:
        """The step's batch in rows of `length`, as arrays [B, ...]."""
        size = self.model.vision.image_size
        return collate(self.samples(step), length=length, num_images=1, image_size=size)

    @property
    def padded_length(self) -> int:
        return bucket_length(self.longest, self.max_length)

    @property
    def image_token(self) -> int:
        """The id that stands for an image on the other side; text does not use it."""
        return self.model.text.vocab_size - 1


WORKLOADS = {
    "toy": Workload(
        ModelConfig(
            vision=VisionConfig(24, 40, 3, 2, image_size=28, patch_size=14),
            text=TextConfig(128, 32, 48, 2, 4, 2, head_dim=8, max_position_embeddings=64),
        ),
        num_rows=2,
        max_length=32,
        longest=24,
        steps_per_round=1,
    ),
    # The quickstart's, in its second stage.
    "tiny": Workload(
        ModelConfig(
            vision=VisionConfig(128, 512, 4, 4, image_size=32, patch_size=16),
            text=TextConfig(512, 128, 344, 3, 4, 4, head_dim=32, max_position_embeddings=256),
        ),
        num_rows=16,
        max_length=108,
        longest=100,
        steps_per_round=20,
    ),
    # 100 million parameters.
    "small": Workload(
        ModelConfig(
            vision=VisionConfig(384, 1536, 7, 6, image_size=112, patch_size=14),
            text=TextConfig(32000, 640, 1728, 10, 10, 10, head_dim=64, max_position_embeddings=512),
        ),
        num_rows=4,
        max_length=256,
        longest=250,
        steps_per_round=2,
    ),
}


def write_weights(workload: Workload, directory: Path) -> None:
    """Draws the model's weights and writes them, float32, as transformers reads them."""
    names = set(abstract_model(workload.model)[1])
    drawn = {name: np.asarray(leaf) for name, leaf in random_parameters(workload.model, 0, names).items()}
    write_hf(directory, layout="llava-hf", model=workload.model, read=drawn.__getitem__)
