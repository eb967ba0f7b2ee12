"""Model FLOPs of training, by formula: what the mathematics asks for, whatever a compiler makes of it.

A multiplication and its addition are two. Recomputed activations, norms, softmax and other elementwise work do not
count, causal attention counts the pairs that see each other: the convention of model FLOPs utilisation (PaLM,
arXiv 2204.02311, appendix B).
"""

import dataclasses

from llava_jax.config import ModelConfig, TextConfig, TuneConfig, VisionConfig, layer_range, split_names


@dataclasses.dataclass(frozen=True)
class Work:
    """How much there is to compute, of a row, a step or an epoch."""

    tokens: float  # positions that the decoder runs over, padding included
    pairs: float  # of a query and a key that it sees; n (n + 1) / 2 for a sample of n tokens
    images: float  # slots that the tower runs over, empty ones included
    supervised: float  # positions whose next token is predicted

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(_counts(self), _counts(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * count for count in _counts(self)))


def causal_pairs(length: float) -> float:
    """The pairs of a sample of `length` tokens in which each sees itself and those before it."""
    return length * (length + 1) / 2


def training_flops(model: ModelConfig, tune: TuneConfig, work: Work) -> dict[str, float]:
    """FLOPs of the forward and backward passes of `work`, by part: vision_tower, projector, decoder, head.

    A matrix costs its forward product once more for the gradient of its input, where anything before it trains, and
    once more for its own, where it trains itself. A LoRA pair's own few per cent are left out; for
    partly trained stacks it is an upper bound, as gradients end at the lowest layer that trains.
    """
    text, vision = model.text, model.vision
    decoder = _trained_share(tune, "language_model", text.num_hidden_layers)
    head = tune.language_model == "full" or "lm_head" in split_names(tune.language_model_modules)
    return {
        "vision_tower": work.images * _tower(vision, model.num_vision_layers_run, tune),
        "projector": work.images * model.num_image_tokens * _projector(model, tune),
        # Something trains, so gradients run through all of the decoder, be it to the embeddings or to the projector.
        "decoder": text.num_hidden_layers
        * ((2 + decoder) * work.tokens * _decoder_layer(text) + 3 * work.pairs * _decoder_attention(text)),
        "head": (2 + head) * work.supervised * 2 * text.hidden_size * text.vocab_size,
    }


def _counts(work: Work) -> tuple[float, float, float, float]:
    return work.tokens, work.pairs, work.images, work.supervised


def _decoder_layer(text: TextConfig) -> float:
    """Forward FLOPs of a layer's matrices for one token."""
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads  # q and o, k and v
    return 2 * text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)


def _decoder_attention(text: TextConfig) -> float:
    """Forward FLOPs of a layer for one pair: its score, and its share of the sum of values."""
    return 4 * text.num_attention_heads * text.head_dim


def _trained_share(tune: TuneConfig, module: str, num_layers: int) -> float:
    """The share of a module's layers whose matrices have gradients of their own."""
    mode, layers = getattr(tune, module), getattr(tune, f"{module}_layers")
    if mode != "partial" or not layers:
        return float(mode == "full")
    begin, end = layer_range(f"tune.{module}_layers", layers, num_layers)
    return (end - begin) / num_layers


def _tower(vision: VisionConfig, num_layers: int, tune: TuneConfig) -> float:
    """FLOPs for one image; of the pixels no gradient is taken."""
    C, P = vision.hidden_size, vision.num_positions
    layer = P * 2 * (4 * C * C + 2 * C * vision.intermediate_size)
    pairs = P * P * 4 * C
    patches = vision.num_patches * 2 * 3 * vision.patch_size**2 * C
    if not tune.trains("vision_tower"):
        return num_layers * (layer + pairs) + patches
    share = _trained_share(tune, "vision_tower", num_layers)
    return num_layers * ((2 + share) * layer + 3 * pairs) + (1 + (tune.vision_tower == "full")) * patches


def _projector(model: ModelConfig, tune: TuneConfig) -> float:
    """FLOPs for one feature."""
    total, width = 0, model.vision.hidden_size
    own = _trained_share(tune, "projector", model.projector_depth)
    for layer in range(model.projector_depth):
        gradient_of_input = tune.trains("vision_tower") or (tune.trains("projector") and layer > 0)
        total += (1 + own + gradient_of_input) * 2 * width * model.text.hidden_size
        width = model.text.hidden_size
    return total
