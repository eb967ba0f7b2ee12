"""How large the parts of a step's activations are, by arithmetic; the compiler's own account is the peak it reports."""

from llava_jax.config import Config

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
    """What a device holds whatever the rows: the gathered matrices of two layers, and the gradient of the head."""
    text = config.model.text
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    layer = text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)
    head = text.hidden_size * text.vocab_size
    return 2 * layer * _BYTES[config.train.dtype] + (4 * head if config.tune.language_model == "full" else 0)
