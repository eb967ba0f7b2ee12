"""Writes what a LoRA run trained as an adapter directory that PEFT or the original LLaVA loads beside its base."""

import dataclasses
import json
from typing import NoReturn

import numpy as np
from safetensors.numpy import save_file

from llava_jax.config import LoraConfig, ModelConfig
from llava_jax.convert.adapter_names import spell_low_rank, spell_replaced, spell_wrapped
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.model_configs import ORIGINAL_TOKENS, write_llava_config
from llava_jax.convert.names import Row, model_rows
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.projector_file import write_torch
from llava_jax.convert.source import Leaf

ADAPTER_LAYOUTS = {"peft": "llava", "peft-llava-hf": "llava-hf"}  # -> the layout of the model that PEFT wraps


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """What training did to a base, not merged. Names are ours."""

    model: ModelConfig
    lora: LoraConfig
    base: str  # where the base lies
    low_rank: dict[str, tuple[Leaf, Leaf]]  # a kernel -> A [..., in, r] and B [..., r, out]
    replaced: dict[str, Leaf]  # what takes the place of the base's, or is not part of it
    template: str
    image_aspect_ratio: str


def write_adapter(directory, adapter: TrainedAdapter, *, layout: str, dtype: str | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `dtype` None keeps float32.

    "peft" is what the original's LoRA runs leave (llava/train/train.py): what was trained whole lies beside in
    non_lora_trainables.bin, with the model's config.json. In "peft-llava-hf", for transformers'
    LlavaForConditionalGeneration, it is part of the adapter, as PEFT's modules_to_save, so that PEFT alone loads it.
    Raises ConversionError if `directory` exists and is not empty.
    """
    wrapped = ADAPTER_LAYOUTS[layout]
    rows = model_rows(adapter.model)
    pairs = _pairs(adapter, rows, wrapped, dtype)
    whole = _whole(adapter, rows, wrapped, dtype)
    fields = _settings(adapter, rows, wrapped)
    with new_directory(directory) as partial:
        if wrapped == "llava":
            if whole:
                write_torch(partial / "non_lora_trainables.bin", whole)
            config = write_llava_config(adapter.model, ORIGINAL_TOKENS, dtype=dtype or "float32")
            config |= {
                "image_aspect_ratio": adapter.image_aspect_ratio,
                "conversation_template": adapter.template,
            }
            (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        else:
            pairs |= whole
            fields |= {"modules_to_save": _modules_to_save(adapter, rows, wrapped)}
        save_file(pairs, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


def _pairs(
    adapter: TrainedAdapter, rows: list[Row], wrapped: str, dtype: str | None
) -> dict[str, np.ndarray]:
    tensors = {}
    for row in rows:
        if row.leaf not in adapter.low_rank:
            continue
        factors = [leaf.read() for leaf in adapter.low_rank[row.leaf]]
        for layer, tensor in enumerate(row.tensors):
            names = spell_low_rank(tensor, wrapped, adapter.model.projector_type)
            for name, factor in zip(names, factors, strict=True):
                part = factor[layer] if row.stacked else factor
                tensors[name] = np.ascontiguousarray(part.T.astype(dtype or part.dtype))
    return tensors


def _whole(
    adapter: TrainedAdapter, rows: list[Row], wrapped: str, dtype: str | None
) -> dict[str, np.ndarray]:
    tensors = {}
    for row in rows:
        if row.leaf not in adapter.replaced:
            continue
        leaf = adapter.replaced[row.leaf].read()
        for layer, tensor in enumerate(row.tensors):
            name = spell_replaced(tensor, wrapped, adapter.model.projector_type)
            if wrapped == "llava-hf" and _is_bias_of_adapted(row.leaf, adapter):
                name = name.removesuffix("bias") + "base_layer.bias"
            part = row.to_theirs(leaf[layer] if row.stacked else leaf)
            tensors[name] = np.ascontiguousarray(part.astype(dtype or part.dtype))
    return tensors


def _is_bias_of_adapted(name: str, adapter: TrainedAdapter) -> bool:
    return name.endswith(".bias") and f"{name.removesuffix('.bias')}.kernel" in adapter.low_rank


def _settings(adapter: TrainedAdapter, rows: list[Row], wrapped: str) -> dict:
    """adapter_config.json with the keys of peft.LoraConfig."""
    lora, alpha = adapter.lora, adapter.lora.effective_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": lora.bias,
        "target_modules": _target_modules(adapter, rows, wrapped),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _target_modules(adapter: TrainedAdapter, rows: list[Row], wrapped: str) -> list[str]:
    """The ends of the layers' names, as the original has them, where only the decoder is adapted.

    PEFT finds such ends in CLIP too, so that elsewhere names are whole.
    """
    adapted = [row for row in rows if row.leaf in adapter.low_rank]
    if wrapped == "llava" and all(row.leaf.startswith("language_model.") for row in adapted):
        return [row.leaf.split(".")[-2] for row in adapted]
    return [_module(tensor, adapter, wrapped) for row in adapted for tensor in row.tensors]


def _modules_to_save(adapter: TrainedAdapter, rows: list[Row], wrapped: str) -> list[str] | None:
    """The layers that take the place of the base's. Raises ConversionError for a part of a layer."""
    tensors = {tensor for row in rows if row.leaf in adapter.replaced for tensor in row.tensors}
    if {"language_model.embed_tokens.embedding", "language_model.lm_head.kernel"} & adapter.replaced.keys():
        refuse_vocabulary()
    twice = sorted(adapter.low_rank.keys() & adapter.replaced.keys())
    if twice:
        raise ConversionError(
            f"{twice[0]} and {len(twice) - 1} more were trained whole by an earlier stage and then adapted, which PEFT "
            "cannot tell apart; choose the layout 'peft', or merge the adapter (layout llava-hf)."
        )
    biases = {t for row in rows if _is_bias_of_adapted(row.leaf, adapter) for t in row.tensors}
    if adapter.lora.bias == "all":
        biases |= {tensor for tensor in tensors if tensor.endswith(".bias")}
    modules = {tensor.rpartition(".")[0] for tensor in tensors - biases}
    # PEFT copies what a module holds, so that those within another that is listed must not be listed again.
    modules = {m for m in modules if not any(m.startswith(f"{other}.") for other in modules)}
    for row in rows:
        for tensor in row.tensors:
            if tensor.rpartition(".")[0] in modules and tensor not in tensors:
                raise ConversionError(
                    f"PEFT replaces whole layers, but of the layer of {tensor} only a part was trained; "
                    "write the adapter as layout 'peft', or merge it (layout llava-hf)."
                )
    return sorted(_module(f"{module}.weight", adapter, wrapped) for module in modules) or None


def refuse_vocabulary() -> NoReturn:
    """Raises ConversionError: of an adapter with embeddings or a head in the layout peft-llava-hf."""
    raise ConversionError(
        "Embeddings or a head that were trained whole cannot go into an adapter for llava-hf: its models have rows that "
        "ours have not, and PEFT takes whole layers only. Choose the layout 'peft', or merge it (layout llava-hf)."
    )


def _module(tensor: str, adapter: TrainedAdapter, wrapped: str) -> str:
    return spell_wrapped(tensor, wrapped, adapter.model.projector_type).removesuffix(".weight")
