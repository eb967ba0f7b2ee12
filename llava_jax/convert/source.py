"""A model to read from, whatever it is stored as: our leaf names, read one at a time."""

import dataclasses
from collections.abc import Callable

import numpy as np

from llava_jax.config import ModelConfig, TextConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that is not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model, or a part of one, under our names.

    `config` is a ModelConfig; for the layouts "clip" and "llama" a VisionConfig and a TextConfig, for
    "projector" None. `layout` is "ours", "llava-hf", "llava", "clip", "llama", "projector" or "parts".
    `leaves` maps our flat names to arrays. `idle` maps canonical names to the tensors that are not run but
    belong to the model: CLIP's layers above the one that is read, its last norm, token rows above ours.
    """

    layout: str
    config: ModelConfig | VisionConfig | TextConfig | None
    leaves: dict[str, Leaf]
    idle: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    tokenizer_path: str = ""  # a directory or file, "" if there is none
    template: str = "v1"
    image_aspect_ratio: str = "pad"

    def names(self) -> list[str]:
        return list(self.leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.leaves[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.leaves[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One leaf, layers stacked, kernels [in, out]. Reads only the bytes it needs."""
        return self.leaves[name].read()

    def with_leaves(self, leaves: dict[str, Leaf], layout: str = "") -> "ModelSource":
        """The same model with some leaves replaced or added."""
        return dataclasses.replace(self, leaves=self.leaves | leaves, layout=layout or self.layout)

    def set_aside(self) -> dict[str, np.ndarray]:
        """The tensors of `idle`, for an export to restore."""
        return {name: leaf.read() for name, leaf in self.idle.items()}
