"""The configs of a vision tower and a decoder: Hugging Face's fields to ours and back."""

from llava_jax.config import CLIP, SIGLIP, ConfigError, RopeScaling, TextConfig, VisionConfig
from llava_jax.convert.errors import ConversionError

# What transformers fills in where a config.json is silent (5.23; the values are older than the project).
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWERS = {CLIP: _CLIP, SIGLIP: _SIGLIP}
_WITH_TEXT = {"clip": CLIP, "siglip": SIGLIP}  # a whole model's model_type -> that of its vision half
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DECODERS = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _LLAMA
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}


def refuse(where: str, key: str, value, reason: str):
    """Raises the ConversionError about one field of the config.json called `where`."""
    raise ConversionError(f"{where}: {key}={value!r} cannot be converted, {reason}.")


def build(cls, where: str, **values):
    """One of our config dataclasses; its ConfigError becomes a ConversionError naming `where`."""
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConversionError(f"{where} describes a model that cannot be built: {error}") from error


def read_vision_config(fields: dict, where: str) -> VisionConfig:
    """A tower's fields (of a CLIPModel or a SiglipModel, its vision half, or LLaVA's `vision_config`) -> VisionConfig."""
    whole = fields.get("model_type")
    if "vision_config" in fields:
        # Old CLIP configs hold the true values in a second dictionary.
        fields = fields["vision_config"] | (fields.get("vision_config_dict") or {})
    kind = fields.get("model_type", _WITH_TEXT.get(whole, CLIP))
    kind = _WITH_TEXT.get(kind, kind)
    if kind not in _TOWERS:
        refuse(where, "vision model_type", kind, "only CLIP and SigLIP towers are built")
    if fields.get("num_channels", 3) != 3:
        refuse(where, "num_channels", fields["num_channels"], "images have 3 channels")
    values = {key: fields.get(key, default) for key, default in _TOWERS[kind].items()}
    for key in ("image_size", "patch_size"):
        if not isinstance(values[key], int):
            refuse(where, key, values[key], "only square images and patches are built")
    return build(VisionConfig, where, model_type=kind, **values)


def read_text_config(fields: dict, where: str, model_type: str | None = None) -> TextConfig:
    """A decoder's fields -> TextConfig. `model_type` overrides the one in `fields`.

    A sliding window is not built; `max_position_embeddings` is lowered to it, below which it has no effect.
    """
    kind = model_type or fields.get("model_type", "llama")
    if kind not in _DECODERS:
        refuse(where, "model_type", kind, f"the decoders that can be read are {', '.join(_DECODERS)}")
    if fields.get("hidden_act", "silu") != "silu":
        refuse(where, "hidden_act", fields["hidden_act"], "decoders are built with 'silu'")
    if fields.get("mlp_bias"):
        refuse(where, "mlp_bias", True, "decoders are built without biases in the MLP")
    fields = _DECODERS[kind] | fields
    heads = fields["num_attention_heads"]
    positions = fields["max_position_embeddings"]
    if fields.get("sliding_window") and (kind != "qwen2" or fields.get("use_sliding_window")):
        positions = min(positions, fields["sliding_window"])
    rope_theta, rope_scaling = _read_rope(fields, where)
    bias = "qkvo" if fields.get("attention_bias") else "none"
    return build(
        TextConfig,
        where,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        max_position_embeddings=positions,
        rms_norm_eps=fields["rms_norm_eps"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias="qkv" if kind == "qwen2" else bias,
        tie_word_embeddings=bool(fields["tie_word_embeddings"]),
    )


def _read_rope(fields: dict, where: str) -> tuple[float, RopeScaling]:
    """`rope_parameters` of newer configs, or `rope_theta` and `rope_scaling` of older ones."""
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        refuse(where, "partial_rotary_factor", "below 1", "all of a head is rotated")
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    known = {
        field: parameters.pop(field) for field in RopeScaling.__dataclass_fields__ if field in parameters
    }
    if parameters:
        refuse(where, "rope_parameters", parameters, f"these have no meaning for rope_type {kind!r} here")
    return float(theta), build(RopeScaling, where, rope_type=kind, **known)


def _write_rope(config: TextConfig) -> dict:
    """Both spellings, so that old and new transformers read the same."""
    scaling = config.rope_scaling
    parameters = {"rope_type": scaling.rope_type}
    if scaling.rope_type != "default":
        parameters["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            parameters[key] = getattr(scaling, key)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.rope_type == "default" else parameters | {"type": scaling.rope_type},
        "rope_parameters": parameters | {"rope_theta": config.rope_theta},
    }


def write_text_config(config: TextConfig) -> dict:
    """TextConfig -> the fields that all decoders share (no model_type)."""
    return {
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias == "qkvo",
        "tie_word_embeddings": config.tie_word_embeddings,
        **_write_rope(config),
    }


def write_vision_config(config: VisionConfig, *, head: bool = False) -> dict:
    """VisionConfig -> the fields of a CLIPVisionModel or a SiglipVisionModel, this one with a pooling head or without."""
    own = {CLIP: {"projection_dim": 768}, SIGLIP: {"vision_use_head": head}}[config.model_type]
    values = {key: getattr(config, key) for key in _CLIP}
    return {"model_type": config.model_type, "num_channels": 3, **own, **values}
