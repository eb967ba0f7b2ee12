"""The name table between our parameter tree and Hugging Face's tensors, read in both directions.

Every layout spells the same tensors with other prefixes. `canonical` and `spell` translate between a layout's
spelling and one canonical spelling (`vision_tower.`, `multi_modal_projector.linear_1.`, `language_model.`,
then Hugging Face's own words); the rows of this table tie canonical tensors to our leaves.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from llava_jax.config import CLIP, SIGLIP, ModelConfig, TextConfig, VisionConfig

COPY, TRANSPOSE, PATCHES = "copy", "transpose", "patches"

VISION, PROJECTOR, TEXT = "vision_tower.", "multi_modal_projector.", "language_model."
EMBEDDING, HEAD = TEXT + "embed_tokens.weight", TEXT + "lm_head.weight"
VOCABULARY = (EMBEDDING, HEAD)  # the tensors with one row per token
TOWERS = {CLIP: "clip", SIGLIP: "siglip"}  # the layout of a tower of its own, by its kind

# Our leaf, Hugging Face's tensor ("{}" is a layer; such a leaf stacks all layers on axis 0), how the one
# becomes the other, and our sizes without the layer axis.
# C vision width, F its MLP, S its positions, X one patch's pixels, A its query, key and value heads side by side.
_CLIP_BEGIN = (
    ("class_embedding", "embeddings.class_embedding", COPY, "C"),
    ("patch_embedding.kernel", "embeddings.patch_embedding.weight", PATCHES, "XC"),
    ("position_embedding", "embeddings.position_embedding.weight", COPY, "SC"),
    ("pre_layrnorm.scale", "pre_layrnorm.weight", COPY, "C"),
    ("pre_layrnorm.bias", "pre_layrnorm.bias", COPY, "C"),
)
_SIGLIP_BEGIN = (
    ("patch_embedding.kernel", "embeddings.patch_embedding.weight", PATCHES, "XC"),
    ("patch_embedding.bias", "embeddings.patch_embedding.bias", COPY, "C"),
    ("position_embedding", "embeddings.position_embedding.weight", COPY, "SC"),
)
_VISION_LAYERS = (
    ("layers.layer_norm1.scale", "encoder.layers.{}.layer_norm1.weight", COPY, "C"),
    ("layers.layer_norm1.bias", "encoder.layers.{}.layer_norm1.bias", COPY, "C"),
    ("layers.self_attn.q_proj.kernel", "encoder.layers.{}.self_attn.q_proj.weight", TRANSPOSE, "CC"),
    ("layers.self_attn.q_proj.bias", "encoder.layers.{}.self_attn.q_proj.bias", COPY, "C"),
    ("layers.self_attn.k_proj.kernel", "encoder.layers.{}.self_attn.k_proj.weight", TRANSPOSE, "CC"),
    ("layers.self_attn.k_proj.bias", "encoder.layers.{}.self_attn.k_proj.bias", COPY, "C"),
    ("layers.self_attn.v_proj.kernel", "encoder.layers.{}.self_attn.v_proj.weight", TRANSPOSE, "CC"),
    ("layers.self_attn.v_proj.bias", "encoder.layers.{}.self_attn.v_proj.bias", COPY, "C"),
    ("layers.self_attn.out_proj.kernel", "encoder.layers.{}.self_attn.out_proj.weight", TRANSPOSE, "CC"),
    ("layers.self_attn.out_proj.bias", "encoder.layers.{}.self_attn.out_proj.bias", COPY, "C"),
    ("layers.layer_norm2.scale", "encoder.layers.{}.layer_norm2.weight", COPY, "C"),
    ("layers.layer_norm2.bias", "encoder.layers.{}.layer_norm2.bias", COPY, "C"),
    ("layers.mlp.fc1.kernel", "encoder.layers.{}.mlp.fc1.weight", TRANSPOSE, "CF"),
    ("layers.mlp.fc1.bias", "encoder.layers.{}.mlp.fc1.bias", COPY, "F"),
    ("layers.mlp.fc2.kernel", "encoder.layers.{}.mlp.fc2.weight", TRANSPOSE, "FC"),
    ("layers.mlp.fc2.bias", "encoder.layers.{}.mlp.fc2.bias", COPY, "C"),
)
# After the last layer: never run, since LLaVA reads a hidden state.
_VISION_END = (
    ("post_layernorm.scale", "post_layernorm.weight", COPY, "C"),
    ("post_layernorm.bias", "post_layernorm.bias", COPY, "C"),
)
_SIGLIP_HEAD = (
    ("head.probe", "head.probe", COPY, "11C"),
    ("head.attention.in_proj_weight", "head.attention.in_proj_weight", COPY, "AC"),
    ("head.attention.in_proj_bias", "head.attention.in_proj_bias", COPY, "A"),
    ("head.attention.out_proj.kernel", "head.attention.out_proj.weight", TRANSPOSE, "CC"),
    ("head.attention.out_proj.bias", "head.attention.out_proj.bias", COPY, "C"),
    ("head.layernorm.scale", "head.layernorm.weight", COPY, "C"),
    ("head.layernorm.bias", "head.layernorm.bias", COPY, "C"),
    ("head.mlp.fc1.kernel", "head.mlp.fc1.weight", TRANSPOSE, "CF"),
    ("head.mlp.fc1.bias", "head.mlp.fc1.bias", COPY, "F"),
    ("head.mlp.fc2.kernel", "head.mlp.fc2.weight", TRANSPOSE, "FC"),
    ("head.mlp.fc2.bias", "head.mlp.fc2.bias", COPY, "C"),
)
# D decoder width, F its MLP, V vocabulary, Q and K all query and all key/value heads side by side.
_TEXT = (
    ("embed_tokens.embedding", "embed_tokens.weight", COPY, "VD"),
    ("layers.input_layernorm.scale", "layers.{}.input_layernorm.weight", COPY, "D"),
    ("layers.self_attn.q_proj.kernel", "layers.{}.self_attn.q_proj.weight", TRANSPOSE, "DQ"),
    ("layers.self_attn.q_proj.bias", "layers.{}.self_attn.q_proj.bias", COPY, "Q"),
    ("layers.self_attn.k_proj.kernel", "layers.{}.self_attn.k_proj.weight", TRANSPOSE, "DK"),
    ("layers.self_attn.k_proj.bias", "layers.{}.self_attn.k_proj.bias", COPY, "K"),
    ("layers.self_attn.v_proj.kernel", "layers.{}.self_attn.v_proj.weight", TRANSPOSE, "DK"),
    ("layers.self_attn.v_proj.bias", "layers.{}.self_attn.v_proj.bias", COPY, "K"),
    ("layers.self_attn.o_proj.kernel", "layers.{}.self_attn.o_proj.weight", TRANSPOSE, "QD"),
    ("layers.self_attn.o_proj.bias", "layers.{}.self_attn.o_proj.bias", COPY, "D"),
    ("layers.post_attention_layernorm.scale", "layers.{}.post_attention_layernorm.weight", COPY, "D"),
    ("layers.mlp.gate_proj.kernel", "layers.{}.mlp.gate_proj.weight", TRANSPOSE, "DF"),
    ("layers.mlp.up_proj.kernel", "layers.{}.mlp.up_proj.weight", TRANSPOSE, "DF"),
    ("layers.mlp.down_proj.kernel", "layers.{}.mlp.down_proj.weight", TRANSPOSE, "FD"),
    ("norm.scale", "norm.weight", COPY, "D"),
    ("lm_head.kernel", "lm_head.weight", TRANSPOSE, "DV"),
)
_BIASES = {"none": "", "qkv": "qkv", "qkvo": "qkvo"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and the canonical tensors it is made of (one per layer if stacked)."""

    leaf: str
    tensors: tuple[str, ...]
    how: str
    shape: tuple[int, ...]  # of the leaf
    stacked: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of `tensors` in Hugging Face's files."""
        shape = self.shape[1:] if self.stacked else self.shape
        if self.how == PATCHES:
            side = math.isqrt(shape[0] // 3)
            return (shape[1], 3, side, side)
        return shape[::-1] if self.how == TRANSPOSE else shape

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor of `tensor_shape` -> its part of the leaf (without the layer axis)."""
        if self.how == PATCHES:
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        return tensor.T if self.how == TRANSPOSE else tensor

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.how == PATCHES:
            channels, _, side, _ = self.tensor_shape
            return part.reshape(side, side, 3, channels).transpose(3, 2, 0, 1)
        return part.T if self.how == TRANSPOSE else part


def _rows(prefix: str, table, sizes: dict[str, int], num_layers: int) -> list[Row]:
    rows = []
    for leaf, tensor, how, letters in table:
        stacked = "{}" in tensor
        if stacked and not num_layers:
            continue
        shape = tuple(sizes[letter] for letter in letters)
        tensors = tuple(prefix + tensor.format(i) for i in range(num_layers if stacked else 1))
        rows.append(Row(prefix + leaf, tensors, how, (num_layers, *shape) if stacked else shape, stacked))
    return rows


def _vision_sizes(config: VisionConfig) -> dict[str, int]:
    return {
        "C": config.hidden_size,
        "F": config.intermediate_size,
        "S": config.num_positions,
        "X": config.patch_size**2 * 3,
        "A": 3 * config.hidden_size,
        "1": 1,
    }


def vision_rows(config: VisionConfig, num_layers: int) -> list[Row]:
    """The rows of a tower's first `num_layers` layers and all before them."""
    begin = {CLIP: _CLIP_BEGIN, SIGLIP: _SIGLIP_BEGIN}[config.model_type]
    return _rows(VISION, (*begin, *_VISION_LAYERS), _vision_sizes(config), num_layers)


def has_head(names: Iterable[str]) -> bool:
    """Whether the pooling head, which many SigLIP towers come without, is among tensors of these canonical names."""
    return any(name.startswith(VISION + "head.") for name in names)


def idle_vision_rows(config: VisionConfig, num_layers: int, *, head: bool) -> list[Row]:
    """A tower's tensors above its first `num_layers` layers, each under its canonical name and as stored.

    head: with SigLIP's pooling head.
    """
    sizes = _vision_sizes(config)
    layer_rows = _rows(VISION, _VISION_LAYERS, sizes, config.num_hidden_layers)
    tensors = [
        (row.tensors[i], row) for i in range(num_layers, config.num_hidden_layers) for row in layer_rows
    ]
    end = (*_VISION_END, *_SIGLIP_HEAD) if head else _VISION_END
    tensors += [(row.tensors[0], row) for row in _rows(VISION, end, sizes, 0)]
    return [Row(name, (name,), COPY, row.tensor_shape, False) for name, row in tensors]


def projector_rows(vision_width: int, text_width: int, depth: int) -> list[Row]:
    """The rows of a projector of `depth` linear layers."""
    rows = []
    for i in range(1, depth + 1):
        table = (
            (f"linear_{i}.kernel", f"linear_{i}.weight", TRANSPOSE, "ID"),
            (f"linear_{i}.bias", f"linear_{i}.bias", COPY, "D"),
        )
        rows += _rows(PROJECTOR, table, {"I": vision_width if i == 1 else text_width, "D": text_width}, 0)
    return rows


def text_rows(config: TextConfig) -> list[Row]:
    """The rows of the decoder."""
    sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
    }
    biased = tuple(f"{letter}_proj.bias" for letter in _BIASES[config.attention_bias])
    table = [
        row
        for row in _TEXT
        if (not row[0].endswith("_proj.bias") or row[0].endswith(biased))
        and (row[0] != "lm_head.kernel" or not config.tie_word_embeddings)
    ]
    return _rows(TEXT, table, sizes, config.num_hidden_layers)


def model_rows(config: ModelConfig) -> list[Row]:
    """The rows of a whole model: exactly the leaves that it has."""
    newline = []
    if config.patch_merge_type == "spatial_unpad":
        newline = _rows(
            TEXT, [("image_newline", "image_newline", COPY, "D")], {"D": config.text.hidden_size}, 0
        )
    return [
        *vision_rows(config.vision, config.num_vision_layers_run),
        *projector_rows(config.vision.hidden_size, config.text.hidden_size, config.projector_depth),
        *text_rows(config.text),
        *newline,
    ]


# (a layout's prefix, the canonical prefix). What is written; what else is read; the longest that fits wins.
_WRITTEN = {
    "llava-hf": (
        ("vision_tower.vision_model.", VISION),
        (PROJECTOR, PROJECTOR),
        ("image_newline", TEXT + "image_newline"),  # of llava-next
        ("language_model.lm_head.", TEXT + "lm_head."),
        ("language_model.model.", TEXT),
    ),
    "llava": (
        ("model.vision_tower.vision_tower.vision_model.", VISION),
        ("lm_head.", TEXT + "lm_head."),
        ("model.", TEXT),
    ),
    "clip": (("vision_model.", VISION),),
    "siglip": (("vision_model.", VISION),),
    "llama": (("lm_head.", TEXT + "lm_head."), ("model.", TEXT)),
    "projector": ((PROJECTOR, PROJECTOR),),
    "tinyllava": (
        ("vision_tower._vision_tower.vision_model.", VISION),
        ("language_model.lm_head.", TEXT + "lm_head."),
        ("language_model.model.", TEXT),
    ),
}
_ALSO_READ = {
    # transformers has renamed its modules twice: names without `vision_model`, without the decoder's inner
    # `model`, and (from tools that dump a state dict) all of them behind `model.`, stripped in `canonical`.
    "llava-hf": (
        ("vision_tower.", VISION),
        ("language_model.", TEXT),
        ("lm_head.", TEXT + "lm_head."),
    ),
    "llava": (("model.vision_tower.vision_tower.", VISION),),
    "clip": tuple(
        (part, VISION + part) for part in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    ),
    "siglip": tuple(
        (part, VISION + part) for part in ("embeddings.", "encoder.", "post_layernorm.", "head.")
    ),
    "llama": (),
    "projector": (),
    "tinyllava": (("vision_tower._vision_tower.", VISION),),
}

# Projectors that are a torch Sequential: activations take the odd numbers, a single layer has none.
_NUMBER = r"\.(?:(\d*[02468])\.)?(weight|bias)"
_NUMBERED_PROJECTOR = {
    "llava": re.compile(r"(?:model\.)?mm_projector" + _NUMBER),
    "projector": re.compile(r"(?:mm_projector|_connector)" + _NUMBER),
    "tinyllava": re.compile(r"connector\._connector" + _NUMBER),
}

_PROJECTOR_MODULE = {
    "llava": "model.mm_projector",
    "projector": "model.mm_projector",
    "tinyllava": "connector._connector",
}

_IGNORABLE = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
_IGNORABLE_BESIDE_TOWER = re.compile(
    r"^(text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale|logit_bias)$"
)


def is_ignorable(name: str, layout: str) -> bool:
    """Whether a tensor of this name may lie in a file without meaning anything to LLaVA."""
    return bool(
        _IGNORABLE.search(name) or (layout in TOWERS.values() and _IGNORABLE_BESIDE_TOWER.match(name))
    )


def canonical(name: str, layout: str) -> str | None:
    """A tensor's canonical name, or None where the layout knows no such prefix."""
    # PEFT calls the weights that it wraps a layer's base, and TinyLLaVA's LoRA runs save them by that name.
    name = name.replace(".base_layer.", ".")
    if layout == "llava-hf":
        name = name.removeprefix("model.")
    if layout == "projector":  # whatever wraps the model whose projector was saved
        name = re.sub(r"^.*?(mm_projector|multi_modal_projector|_connector)\.", r"\1.", name)
    numbered = _NUMBERED_PROJECTOR[layout].fullmatch(name) if layout in _NUMBERED_PROJECTOR else None
    if numbered:
        return f"{PROJECTOR}linear_{int(numbered[1] or 0) // 2 + 1}.{numbered[2]}"
    prefixes = [pair for pair in _WRITTEN[layout] + _ALSO_READ[layout] if name.startswith(pair[0])]
    if not prefixes:
        return None
    theirs, ours = max(prefixes, key=lambda pair: len(pair[0]))
    return ours + name.removeprefix(theirs)


def spell(name: str, layout: str, projector_type: str = "mlp2x_gelu") -> str:
    """A canonical name as `layout` writes it. A `linear` projector has no number in the original's files."""
    if layout in _PROJECTOR_MODULE and name.startswith(PROJECTOR):
        number, kind = re.match(r"linear_(\d+)\.(.*)", name.removeprefix(PROJECTOR)).groups()
        inner = kind if projector_type == "linear" else f"{2 * (int(number) - 1)}.{kind}"
        return f"{_PROJECTOR_MODULE[layout]}.{inner}"
    theirs, ours = next(pair for pair in _WRITTEN[layout] if name.startswith(pair[1]))
    return theirs + name.removeprefix(ours)
