"""A projector to start stage 1 from."""

import numpy as np

from llava_jax.config import ModelConfig
from llava_jax.convert.names import projector_rows
from llava_jax.convert.source import Leaf


def draw_projector(model: ModelConfig, seed: int) -> dict[str, Leaf]:
    """Float32 leaves drawn like the original's: torch's default, uniform in +-1/sqrt(inputs), biases too."""
    rows = projector_rows(model.vision.hidden_size, model.text.hidden_size, model.projector_depth)
    generator = np.random.default_rng(seed)
    leaves, bound = {}, 0.0
    for row in rows:  # each kernel comes before its bias
        if row.leaf.endswith(".kernel"):
            bound = row.shape[0] ** -0.5
        values = generator.uniform(-bound, bound, row.shape).astype(np.float32)
        leaves[row.leaf] = Leaf(row.shape, values.dtype, lambda values=values: values)
    return leaves
