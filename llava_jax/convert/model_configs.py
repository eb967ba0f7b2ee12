"""The config.json of a whole LLaVA, as transformers and as the original write it, to ours and back."""

import ast
import dataclasses

from llava_jax.config import CLIP, ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.component_configs import (
    build,
    read_text_config,
    read_vision_config,
    refuse,
    write_text_config,
    write_vision_config,
)
from llava_jax.convert.errors import ConversionError

_ORIGINAL_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

# Towers that an original checkpoint may name without holding them.
PUBLISHED_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids that a config.json names."""

    image: int
    pad: int
    bos: int
    eos: int


# The original's placeholder is no row of the vocabulary, and it pads with the unknown token.
ORIGINAL_TOKENS = SpecialTokens(image=-200, pad=0, bos=1, eos=2)


def read_llava_hf_config(fields: dict, where: str, generation: dict) -> tuple[ModelConfig, int]:
    """-> the model with its base vocabulary, and how many token rows its files hold.

    Rows from the image placeholder's id on were appended with `<image>` and `<pad>` and are cut. An id in the
    lower half, or below that of the end of sequence (`generation`: generation_config.json), was not appended.
    """
    layer = fields.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        refuse(where, "vision_feature_layer", layer, "features are read from one layer")
    if fields.get("projector_hidden_act", "gelu") != "gelu":
        refuse(
            where, "projector_hidden_act", fields["projector_hidden_act"], "projectors are built with 'gelu'"
        )
    if not fields.get("multimodal_projector_bias", True):
        refuse(where, "multimodal_projector_bias", False, "projectors are built with biases")
    text_fields = fields.get("text_config") or {}
    tied = bool(fields.get("tie_word_embeddings") or text_fields.get("tie_word_embeddings"))
    text_fields = text_fields | {"tie_word_embeddings": tied}
    file_vocabulary = read_text_config(text_fields, where).vocab_size
    image_token = fields.get("image_token_index", fields.get("image_token_id", 32000))
    ends = [generation.get("eos_token_id"), text_fields.get("eos_token_id"), fields.get("eos_token_id")]
    ends = [
        end for value in ends for end in (value if isinstance(value, list) else [value]) if end is not None
    ]
    appended = file_vocabulary // 2 < image_token < file_vocabulary and all(end < image_token for end in ends)
    base = image_token if appended else file_vocabulary
    vision_fields = fields.get("vision_config")  # without it transformers too assumes ViT-L/14 at 336 px
    vision = VisionConfig() if vision_fields is None else read_vision_config(vision_fields, where)
    strategy = fields.get("vision_feature_select_strategy", "default")
    features = {"default": "patch", "full": "cls_patch"}
    if strategy not in features:
        refuse(where, "vision_feature_select_strategy", strategy, "it is 'default' or 'full'")
    model = build(
        ModelConfig,
        where,
        vision=vision,
        text=read_text_config(text_fields | {"vocab_size": base}, where),
        projector_type="mlp2x_gelu",
        select_layer=layer,
        select_feature=features[strategy],
        **(_read_llava_next(fields, where) if fields.get("model_type") == "llava_next" else {}),
        **_read_extra_tokens(fields),
    )
    return model, file_vocabulary


def _read_llava_next(fields: dict, where: str) -> dict:
    """What a LlavaNextForConditionalGeneration says about tiles. Its grid has heights before widths."""
    if not fields.get("use_image_newline_parameter", True):
        refuse(where, "use_image_newline_parameter", False, "its lines end with image_newline")
    grid = fields.get("image_grid_pinpoints") or [
        [336, 672],
        [672, 336],
        [672, 672],
        [1008, 336],
        [336, 1008],
    ]
    pinpoints = tuple((width, height) for height, width in _read_grid(grid, where))
    return {"image_grid_pinpoints": pinpoints, "patch_merge_type": "spatial_unpad"}


def _read_grid(grid, where: str) -> tuple[tuple[int, int], ...]:
    """A list of pairs, which the original's configs may spell as text."""
    try:
        pairs = ast.literal_eval(grid) if isinstance(grid, str) else grid
        return tuple((int(first), int(second)) for first, second in pairs)
    except (ValueError, SyntaxError, TypeError):
        refuse(where, "image_grid_pinpoints", grid, "it is a list of pairs (width, height)")


def write_llava_hf_config(
    model: ModelConfig, tokens: SpecialTokens, *, dtype: str, vocab_size: int, vision_head: bool = False
) -> dict:
    """The config.json of a LlavaForConditionalGeneration, for a model with tiles of a LlavaNext one.

    Their files hold `vocab_size` token rows and, with `vision_head`, SigLIP's pooling head.
    """
    if model.projector_type != "mlp2x_gelu":
        raise ConversionError(
            f"The llava-hf layout has no projector of type {model.projector_type!r}, only 'mlp2x_gelu'; "
            "choose the layout llava."
        )
    if model.num_vision_layers_run == 0:
        raise ConversionError(
            "transformers cannot run llava-hf models with vision_feature_layer=0; choose the layout llava."
        )
    text = model.text
    next_fields = _write_llava_next(model)
    kind = "LlavaNext" if next_fields else "Llava"
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "llava_next" if next_fields else "llava",
        "torch_dtype": dtype,
        "ignore_index": -100,
        "image_token_index": tokens.image,
        "image_seq_length": model.num_image_tokens,
        "pad_token_id": tokens.pad,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": model.select_layer,
        "vision_feature_select_strategy": "default" if model.select_feature == "patch" else "full",
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": write_text_config(text)
        | {
            "model_type": "qwen2" if text.attention_bias == "qkv" else "llama",
            "vocab_size": vocab_size,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
            "torch_dtype": dtype,
        },
        "vision_config": write_vision_config(model.vision, head=vision_head),
        **(
            _write_extra_tokens(model) if model.extra_tokens else {}
        ),  # transformers ignores them; we read them
        **next_fields,
    }


def _write_llava_next(model: ModelConfig) -> dict:
    """What a LlavaNextForConditionalGeneration says about tiles; empty for a model without any."""
    if not model.image_grid_pinpoints and model.patch_merge_type == "flat":
        return {}
    if not model.image_grid_pinpoints or model.patch_merge_type != "spatial_unpad":
        raise ConversionError(
            "In the llava-hf layout tiles are laid out with patch_merge_type='spatial_unpad' and a list of sizes, "
            f"but the model has image_grid_pinpoints={model.image_grid_pinpoints} and patch_merge_type="
            f"{model.patch_merge_type!r}; choose the layout llava."
        )
    if model.vision.model_type != CLIP:
        raise ConversionError(
            "Neither transformers nor the original LLaVA lays out tiles of a SigLIP tower; export models without tiles."
        )
    if model.select_feature != "patch":
        raise ConversionError(
            f"transformers lays out tiles without the class token, but the model has select_feature="
            f"{model.select_feature!r}; choose the layout llava."
        )
    grid = [[height, width] for width, height in model.image_grid_pinpoints]
    return {"image_grid_pinpoints": grid, "use_image_newline_parameter": True}


def read_llava_config(fields: dict, vision: VisionConfig, where: str) -> ModelConfig:
    """An original LLaVA's fields and its tower's config -> ModelConfig."""
    kind = fields.get("model_type", "llava_llama")
    if kind not in _ORIGINAL_DECODERS:
        refuse(
            where,
            "model_type",
            kind,
            f"the original models that can be read are {', '.join(_ORIGINAL_DECODERS)}",
        )
    if fields.get("s2"):
        refuse(where, "s2", True, "features are read at one scale")
    if vision.model_type != CLIP:
        tower = fields.get("mm_vision_tower")
        refuse(
            where, "mm_vision_tower", tower, "the original reads CLIP, and what forks read of SigLIP differs"
        )
    return build(
        ModelConfig,
        where,
        vision=vision,
        text=read_text_config(fields, where, _ORIGINAL_DECODERS[kind]),
        projector_type=fields.get("mm_projector_type", "linear"),
        select_layer=fields.get("mm_vision_select_layer", -2),
        select_feature=fields.get("mm_vision_select_feature", "patch"),
        image_grid_pinpoints=_read_grid(fields.get("image_grid_pinpoints") or [], where),
        patch_merge_type=fields.get("mm_patch_merge_type", "flat"),
        **_read_extra_tokens(fields),
    )


def _read_extra_tokens(fields: dict) -> dict:
    """Which tokens were added to the vocabulary. Where a config.json is silent on <im_patch>, the original adds it
    to the tokenizer after training, so that it has no meaning to a model."""
    return {
        "use_im_start_end": bool(fields.get("mm_use_im_start_end")),
        "use_im_patch_token": bool(fields.get("mm_use_im_patch_token")),
    }


def _write_extra_tokens(model: ModelConfig) -> dict:
    return {
        "mm_use_im_start_end": model.use_im_start_end,
        "mm_use_im_patch_token": model.use_im_patch_token,
    }


def write_llava_config(model: ModelConfig, tokens: SpecialTokens, *, dtype: str) -> dict:
    """The config.json of an original LLaVA, with the fields of the published ones.

    The tower's weights travel inside the checkpoint; `unfreeze_mm_vision_tower` makes the original load them.
    It takes image settings from the tower named by `mm_vision_tower`, which stays empty where the tower has
    none of the published shapes; `vision_config` is our own addition and describes the tower.
    """
    if model.text.attention_bias == "qkv":
        raise ConversionError(
            "The original LLaVA has no decoder with biases in its attention (Qwen2); choose the layout llava-hf, "
            "or peft-llava-hf for an adapter."
        )
    if model.vision.model_type != CLIP:
        raise ConversionError(
            "The original LLaVA has no SigLIP tower; choose the layout llava-hf, or peft-llava-hf for an adapter."
        )
    tower = next((name for name, config in PUBLISHED_TOWERS.items() if config == model.vision), "")
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": dtype,
        **write_text_config(model.text),
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "pretraining_tp": 1,
        "use_cache": True,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_patch_merge_type": model.patch_merge_type,
        "mm_projector_type": model.projector_type,
        "mm_resampler_type": None,
        **_write_extra_tokens(model),
        "mm_vision_select_feature": model.select_feature,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        **({"image_grid_pinpoints": model.image_grid_pinpoints} if model.image_grid_pinpoints else {}),
        "vision_config": write_vision_config(model.vision),
    }


def write_llama_config(text: TextConfig, tokens: SpecialTokens, *, dtype: str) -> dict:
    """The config.json of a decoder of its own."""
    kind = "qwen2" if text.attention_bias == "qkv" else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "torch_dtype": dtype,
        **write_text_config(text),
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }


def read_tinyllava_config(fields: dict, text: dict, vision: dict, where: str) -> ModelConfig:
    """TinyLLaVA Factory's fields -> ModelConfig. `text` and `vision` are the config.json of its components."""
    return build(
        ModelConfig,
        where,
        vision=read_vision_config(vision, where),
        text=read_text_config(text, where),
        projector_type=fields.get("connector_type") or "linear",
        select_layer=fields.get("vision_feature_layer", -2),
        select_feature=fields.get("vision_feature_select_strategy", "patch"),
    )
