"""Writes a model as a Hugging Face directory (llava-hf), in the original LLaVA's layout, or its decoder alone."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np

from llava_jax.config import ModelConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.hf_processor import (
    write_decoder_template,
    write_processor,
    write_slow_tokenizer_config,
    write_tokenizer,
)
from llava_jax.convert.matching import reading_axis
from llava_jax.convert.model_configs import (
    ORIGINAL_TOKENS,
    SpecialTokens,
    write_llama_config,
    write_llava_config,
    write_llava_hf_config,
)
from llava_jax.convert.names import (
    PATCHES,
    VOCABULARY,
    Row,
    has_head,
    idle_vision_rows,
    model_rows,
    spell,
    text_rows,
)
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.progress import Progress, silent
from llava_jax.convert.shard_writer import ShardWriter
from llava_jax.convert.source import Index, Leaf, read_ahead
from llava_jax.convert.tokenizer_files import copy_tokenizer
from llava_jax.convert.transposing import contiguous
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer


def write_hf(
    directory,
    *,
    layout: str,
    model: ModelConfig,
    read: Callable[[str], Leaf | np.ndarray],
    set_aside: Mapping[str, np.ndarray] | None = None,
    tokenizer_path: str = "",
    template: str = "v1",
    image_aspect_ratio: str = "pad",
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    progress: Progress = silent,
) -> None:
    """Writes safetensors, configs, tokenizer and processor so that the layout's own software loads them.

    `read` gives an array by our name. Of a Leaf, which is not read yet, a few parts are held at a time.
    `dtype` None keeps each array's own. `progress` is told of every part that has been written.

    "llava-hf" gets the names of the published files, which all versions of transformers read. Its vocabulary
    grows by `<image>` and `<pad>` to a multiple of 64; the token rows above ours are those set aside at
    import, else the mean of ours. "llava" keeps our vocabulary and holds the tower. The tower's layers and
    norm that are never run come from `set_aside`; without it they are written as identities: layers whose
    projections and biases are zero, norms of scale one. A pooling head is written if one was set aside. "llama" is
    the decoder alone, as a LlamaForCausalLM or, with Qwen2's biases, a Qwen2ForCausalLM, whose tokenizer_config.json
    has the chat template.

    Raises ConversionError if the layout cannot express the model or `directory` exists and is not empty.
    """
    if layout not in ("llava-hf", "llava", "llama"):
        raise ConversionError(f"layout={layout!r} is not one of 'llava-hf', 'llava', 'llama'.")
    set_aside = set_aside or {}
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConversionError(f"dtype={dtype!r} is not one of 'float32', 'bfloat16', 'float16'.")
    named_dtype = dtype or read("language_model.norm.scale").dtype.name
    with new_directory(directory) as partial:
        if layout == "llava-hf":
            tokens, image_in_prompt = write_tokenizer(partial, tokenizer_path, model)
            vocabulary = _padded_vocabulary(model.text.vocab_size, tokens, set_aside)
            fields = write_llava_hf_config(
                model, tokens, dtype=named_dtype, vocab_size=vocabulary, vision_head=has_head(set_aside)
            )
            write_processor(
                partial,
                model,
                template=template,
                image_aspect_ratio=image_aspect_ratio,
                image_in_prompt=image_in_prompt,
            )
        else:
            copy_tokenizer(tokenizer_path, partial, model.extra_tokens)
            write_slow_tokenizer_config(partial)
            tokens, vocabulary = ORIGINAL_TOKENS, model.text.vocab_size
            if layout == "llava":
                fields = write_llava_config(model, tokens, dtype=named_dtype)
            else:
                if tokenizer_path:
                    tokenizer = load_tokenizer(tokenizer_path, model.extra_tokens)
                    tokens = _tokens_of(tokenizer)
                    write_decoder_template(partial, template, tokenizer)
                fields = write_llama_config(model.text, tokens, dtype=named_dtype)
        if layout != "llama":
            fields |= {"image_aspect_ratio": image_aspect_ratio}
        fields |= {"conversation_template": template}
        generation = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        (partial / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        rows = text_rows(model.text) if layout == "llama" else model_rows(model)
        leaves = (_checked(row, read(row.leaf)) for row in rows)
        _write_tensors(
            partial, layout, model, rows, leaves, set_aside, vocabulary, dtype, max_shard_size, progress
        )


def _tokens_of(tokenizer: Tokenizer) -> SpecialTokens:
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return dataclasses.replace(ORIGINAL_TOKENS, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=pad)


def check_layout(model: ModelConfig, layout: str) -> None:
    """Raises ConversionError when `layout` cannot express the model, as `write_hf` would."""
    if layout == "llava-hf":
        tokens = SpecialTokens(image=model.text.vocab_size, pad=model.text.vocab_size + 1, bos=1, eos=2)
        write_llava_hf_config(model, tokens, dtype="float32", vocab_size=model.text.vocab_size + 2)
    elif layout == "llava":
        write_llava_config(model, ORIGINAL_TOKENS, dtype="float32")


def _padded_vocabulary(base: int, tokens: SpecialTokens, set_aside: Mapping[str, np.ndarray]) -> int:
    """How many token rows to write: as many as were imported, else a multiple of 64."""
    needed = max(base, tokens.image + 1, tokens.pad + 1)
    imported = base + max((len(set_aside[name]) for name in VOCABULARY if name in set_aside), default=0)
    return imported if base < imported >= needed else -(-needed // 64) * 64


def _checked(row: Row, array: Leaf | np.ndarray) -> Leaf:
    """What `read` gave for a row of the table, which must have the shape that the config asks for."""
    if tuple(array.shape) != row.shape:
        raise ConversionError(f"{row.leaf} has shape {array.shape}, but its config asks for {row.shape}.")
    if isinstance(array, Leaf):
        return array
    return Leaf(array.shape, array.dtype, lambda: np.asarray(array))


def _write_tensors(
    directory: Path, layout, model, rows, leaves, set_aside, vocabulary, dtype, max_shard_size, progress
) -> None:
    idle_rows = []
    if layout != "llama":
        idle_rows = idle_vision_rows(model.vision, model.num_vision_layers_run, head=has_head(set_aside))
    names = {
        name: spell(name, layout, model.projector_type) for row in [*rows, *idle_rows] for name in row.tensors
    }
    writer = ShardWriter(directory, names=list(names.values()), max_shard_size=max_shard_size)
    for row, leaf in zip(rows, leaves, strict=True):
        stored = np.dtype(dtype or leaf.dtype)
        for name, parts in _tensors(row, leaf):
            shape, parts = row.tensor_shape, _to_theirs(row, parts, dtype, progress)
            if name in VOCABULARY:
                more = set_aside.get(name, np.empty((0, shape[1]), stored))
                parts = _with_more_rows(parts, shape[0], _cast(more, stored.name, name), vocabulary)
                shape = (vocabulary, shape[1])
            writer.add(names[name], shape, stored, parts)
        if row.leaf == "vision_tower.position_embedding":
            vision_dtype = leaf.dtype
    for row in idle_rows:
        tensor = set_aside.get(row.leaf)
        if tensor is None:
            is_norm_scale = re.search(r"norm\d?\.weight$", row.leaf)
            tensor = np.full(row.shape, 1 if is_norm_scale else 0, vision_dtype)
        tensor = _cast(tensor, dtype, row.leaf)
        writer.add(names[row.leaf], tensor.shape, tensor.dtype, [tensor])
    writer.close()


def _tensors(row: Row, leaf: Leaf) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """For each tensor of a row the canonical name and the parts of the leaf that follow each other in it."""
    parts = read_ahead(leaf, _ranges(row, leaf))
    if not row.stacked:
        yield row.tensors[0], parts
        return
    names = iter(row.tensors)
    for layers in parts:
        for layer, name in zip(layers, names):  # noqa: B905 (a part may hold fewer layers)
            yield name, [layer]


def _ranges(row: Row, leaf: Leaf) -> list[Index]:
    """Where the parts of a leaf lie: whole layers, or what becomes rows of the only tensor."""
    if leaf.axis is None or row.how == PATCHES:
        return [()]
    return dataclasses.replace(leaf, axis=reading_axis(row)).parts()


def _to_theirs(row: Row, parts: Iterable[np.ndarray], dtype, progress) -> Iterator[np.ndarray]:
    for part in parts:
        yield contiguous(row.to_theirs(_cast(part, dtype, row.leaf)))
        progress(part.nbytes)


def _with_more_rows(
    parts: Iterable[np.ndarray], length: int, more: np.ndarray, count: int
) -> Iterator[np.ndarray]:
    """The `length` rows of `parts` [_, D], `more` below them, then the mean of the former: `count` rows in all."""
    more = more[: count - length]
    missing = count - length - len(more)
    total = np.zeros(more.shape[1])
    for rows in parts:
        if missing:
            total += rows.sum(axis=0, dtype=np.float64)
        yield rows
    yield more
    yield np.tile((total / length).astype(more.dtype), (missing, 1))


def _cast(array: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    if dtype is None or array.dtype.name == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == "float16" and np.isinf(cast).any() and not np.isinf(array).any():
        raise ConversionError(f"{name} holds values beyond float16's range; export as bfloat16 or float32.")
    return cast
