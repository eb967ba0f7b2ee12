"""How large the parts of a step's activations are, by arithmetic; the compiler's own account is the peak it reports."""

import math

from llava_jax.config import Config, TextConfig
from llava_jax.models.quantization import Quantization

_BYTES = {"bfloat16": 2, "float32": 4}


def saved_bytes(config: Config, rows: int, length: int) -> int:
    """What a device keeps of the decoder for the backward pass, for that many rows of a microbatch.

    remat="full" keeps the input of each block, "dots" also the outputs of its matrices, "minimal" also attention's, "none"
    also what elementwise steps between them need. With "offload" the inputs alone are on the device.
    """
    text = config.model.text
    D, F, H = text.hidden_size, text.intermediate_size, text.head_dim
    width = D
    if config.train.remat not in ("full", "offload"):
        width += (text.num_attention_heads + 2 * text.num_key_value_heads) * H + 2 * D + 2 * F
    if config.train.remat in ("minimal", "none"):
        width += text.num_attention_heads * H
    if config.train.remat == "none":
        width += 4 * D + 2 * F
    return rows * length * text.num_hidden_layers * width * _BYTES[config.train.dtype]


def gathered_bytes(config: Config) -> int:
    """What a device holds whatever the rows: the gathered matrices of two layers, and the gradient of the head.

    Quantised matrices are gathered as their codes, and one at a time is unpacked.
    """
    text = config.model.text
    layer = sum(kernel_bytes(config, shape) for shape in decoder_kernels(text))
    unpacked = 0
    if config.lora.quantization != "none":
        unpacked = max(D * F for D, F in decoder_kernels(text)) * _BYTES[config.train.dtype]
    head = 4 * text.hidden_size * text.vocab_size if config.tune.language_model == "full" else 0
    return 2 * layer + unpacked + head


def decoder_kernels(text: TextConfig) -> list[tuple[int, int]]:
    """The shapes [D, F] of a decoder layer's matrices."""
    D, F, H = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * H, text.num_key_value_heads * H
    return [(D, queries), (D, keys), (D, keys), (queries, D), (D, F), (D, F), (F, D)]


def kernel_bytes(config: Config, shape: tuple[int, int]) -> int:
    """Of one such matrix as products read it, or, quantised, as it is kept."""
    quantization = Quantization.of(config.lora)
    if quantization is None:
        return math.prod(shape) * _BYTES[config.train.dtype]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in quantization.leaves(shape).values())
