"""How large the parts of a step's activations are, by arithmetic; the compiler's own account is the peak it reports."""

import math

from llava_jax.config import Config, TextConfig
from llava_jax.models.quantization import Quantization
from llava_jax.tuning import lora_targets

_BYTES = {"bfloat16": 2, "float32": 4}


def saved_bytes(config: Config, rows: int, length: int) -> int:
    """What a device keeps of the decoder for the backward pass, for that many rows of a microbatch.

    remat="full" keeps the input of each block, "dots" also the outputs of its linear layers, "minimal" also attention's;
    of an adapter what A gives. With "offload" the inputs alone are on the device.
    """
    text, size = config.model.text, _BYTES[config.train.dtype]
    D, F, H = text.hidden_size, text.intermediate_size, text.head_dim
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * H  # q, k, v and its output
    if config.train.remat in ("full", "offload"):
        width = D
    elif config.train.remat == "none":
        return rows * length * text.num_hidden_layers * _unrecomputed(config, attention)
    else:
        width = 2 * D + attention + 2 * F + config.lora.rank * len(_adapted(config))
        if config.train.remat == "dots":
            width -= text.num_attention_heads * H
    return rows * length * text.num_hidden_layers * width * size


def _unrecomputed(config: Config, attention: int) -> int:
    """Bytes per token and layer with remat="none": norms in float32, attention, the MLP's elementwise steps, and the inputs
    of what has a gradient."""
    text, size = config.model.text, _BYTES[config.train.dtype]
    D, F = text.hidden_size, text.intermediate_size
    kept = 4 * 2 * D + size * (attention + 5 * F)
    if config.tune.language_model in ("full", "partial"):
        kept += size * (4 * D + F)
    adapted = _adapted(config)
    kept += size * config.lora.rank * len(adapted)
    if config.lora.dropout:  # of each adapter another, and a byte that says what it dropped
        kept += (size + 1) * sum(inputs for inputs, _ in adapted.values())
    return kept


def _adapted(config: Config) -> dict[str, tuple[int, int]]:
    names = lora_targets(config).get("language_model", ())
    return {name: shape for name, shape in decoder_kernels(config.model.text).items() if name in names}


def gathered_bytes(config: Config) -> int:
    """What a device holds whatever the rows: the gathered matrices of two layers, and the gradient of the head.

    Quantised matrices are gathered as their codes, and one at a time is unpacked.
    """
    text = config.model.text
    layer = sum(kernel_bytes(config, shape) for shape in decoder_kernels(text).values())
    unpacked = 0
    if config.lora.quantization != "none":
        unpacked = max(D * F for D, F in decoder_kernels(text).values()) * _BYTES[config.train.dtype]
    head = 4 * text.hidden_size * text.vocab_size if config.tune.language_model == "full" else 0
    return 2 * layer + unpacked + head


def decoder_kernels(text: TextConfig) -> dict[str, tuple[int, int]]:
    """The shapes [D, F] of a decoder layer's matrices by name."""
    D, F, H = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * H, text.num_key_value_heads * H
    return {
        "q_proj": (D, queries),
        "k_proj": (D, keys),
        "v_proj": (D, keys),
        "o_proj": (queries, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }


def kernel_bytes(config: Config, shape: tuple[int, int]) -> int:
    """Of one such matrix as products read it, or, quantised, as it is kept."""
    quantization = Quantization.of(config.lora)
    if quantization is None:
        return math.prod(shape) * _BYTES[config.train.dtype]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in quantization.leaves(shape).values())
