"""The names of LoRA's tensors in PEFT's files, read and written."""

import dataclasses
import re

from llava_jax.convert.names import TEXT, canonical, spell

# PeftModel.base_model is the LoraModel, whose .model is the model that was wrapped (peft/peft_model.py).
PREFIX = "base_model.model."

# A saved name has no adapter's name in it, a dumped state dict has one ("default").
_LOW_RANK = re.compile(r"(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.[^.]+)?")
_MATRIX = re.compile(r"(.*\.lora_[AB](?:\.[^.]+)?)\.weight")
_COPIED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")


@dataclasses.dataclass(frozen=True)
class AdapterTensor:
    """What a tensor of an adapter is for.

    `tensor`: the canonical name of the model's tensor. `side`: "A" or "B" of its low-rank change, "" for a
    tensor that takes its place. `module`: the model's own name of the layer, as PEFT's patterns match it.
    """

    tensor: str
    side: str
    module: str
    of_embedding: bool = False  # whose two factors multiply to the transpose of the change


def adapter_layout(names: list[str]) -> str:
    """The layout whose model was wrapped, from the names of an adapter's tensors."""
    names = [name.removeprefix(PREFIX) for name in names]
    if any("_vision_tower." in name or "_connector." in name for name in names):
        return "tinyllava"
    if any(
        re.match(r"(model\.)?(language_model|multi_modal_projector|vision_tower(?!\.vision_tower))\.", name)
        for name in names
    ):
        return "llava-hf"
    return "llava"


def parse(name: str, layout: str) -> AdapterTensor | None:
    """What the tensor `name` is for in an adapter of a model of `layout`; None if that layout has no such name."""
    # The original's loader takes names with one `model.` too many alike (llava/model/builder.py).
    name = re.sub(r"^model\.model\.", "model.", name.removeprefix(PREFIX))
    name = _COPIED.sub("", name)
    matrix = _MATRIX.fullmatch(name)
    low_rank = _LOW_RANK.fullmatch(matrix[1] if matrix else name)
    if low_rank is None:
        known = canonical(name, layout)
        return AdapterTensor(known, "", name.rpartition(".")[0]) if known else None
    known = canonical(low_rank["module"] + ".weight", layout)
    if known is None:
        return None
    return AdapterTensor(known, low_rank["side"], low_rank["module"], bool(low_rank["embedding"]))


def spell_low_rank(tensor: str, layout: str, projector_type: str = "mlp2x_gelu") -> tuple[str, str]:
    """A canonical linear weight's name -> the names of its A [r, in] and B [out, r] in PEFT's file."""
    module = spell_replaced(tensor, layout, projector_type).removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def spell_replaced(tensor: str, layout: str, projector_type: str = "mlp2x_gelu") -> str:
    """A canonical name of what was trained whole, as it stands in `non_lora_trainables.bin`."""
    return PREFIX + spell_wrapped(tensor, layout, projector_type)


def spell_wrapped(tensor: str, layout: str, projector_type: str = "mlp2x_gelu") -> str:
    """A canonical name as the model that PEFT wraps calls it; files of llava-hf have older names than transformers 5."""
    if layout != "llava-hf":
        return spell(tensor, layout, projector_type)
    if tensor == TEXT + "image_newline":
        return "model.image_newline"
    return tensor.removeprefix(TEXT) if tensor.startswith(TEXT + "lm_head.") else f"model.{tensor}"
