"""Merges a LoRA adapter into the model that it was trained on."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches numpy the name "bfloat16")
import numpy as np

from llava_jax.config import ModelConfig, TextConfig
from llava_jax.convert import layouts
from llava_jax.convert.adapters import Adapter, LowRank
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.model_configs import read_llava_config
from llava_jax.convert.names import (
    TRANSPOSE,
    VISION,
    VOCABULARY,
    Row,
    has_head,
    idle_vision_rows,
    model_rows,
)
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.tokenizer_files import find_tokenizer


def merge(base: ModelSource, adapter: Adapter, *, vision_tower="") -> ModelSource:
    """`base` with the adapter's changes, computed in float32 and rounded once to the base's dtype.

    Tensors that were trained whole take the place of the base's and keep their own dtype. A base that is only a
    decoder becomes the LLaVA of the adapter's config.json, with the tower named there or in `vision_tower`.
    Nothing is read yet. Raises ConversionError where the adapter does not fit.
    """
    if isinstance(base.config, TextConfig):
        base = _llava_around(base, adapter, vision_tower)
    if not isinstance(base.config, ModelConfig):
        raise ConversionError(
            f"An adapter belongs on a whole LLaVA or a decoder, not on a model of layout {base.layout}."
        )
    model = base.config
    rows = model_rows(model)
    idle_rows = idle_vision_rows(model.vision, model.num_vision_layers_run, head=has_head(base.idle))
    _check_fit(base, adapter, [*rows, *idle_rows])
    leaves = {row.leaf: _merged(base.leaves.get(row.leaf), row, adapter) for row in rows}
    idle = base.idle | {
        row.leaf: _merged(base.idle.get(row.leaf), row, adapter)
        for row in idle_rows
        if row.leaf in base.idle and _is_touched(row, adapter)
    }
    idle |= {
        name: _merged_rows(base.idle[name], name, model.text.vocab_size, adapter)
        for name in VOCABULARY
        if name in base.idle and (name in adapter.low_rank or name in adapter.replaced)
    }
    tokenizer_path = find_tokenizer(adapter.path) or base.tokenizer_path
    return dataclasses.replace(base, layout="merged", leaves=leaves, idle=idle, tokenizer_path=tokenizer_path)


def describe_changes(adapter: Adapter) -> list[str]:
    """One line per module that the adapter changes, and a note where that is the tower.

    Counted are arrays as our models have them, of which one stacks the tensors of all layers.
    """
    low_rank, replaced = map(_arrays_of_modules, (adapter.low_rank, adapter.replaced))
    lines = [
        f"{module}: {low_rank[module]} arrays with LoRA, {replaced[module]} replaced"
        for module in sorted(low_rank | replaced)
    ]
    if low_rank[VISION.rstrip(".")]:
        # PEFT takes target modules by the end of their names, and the tower's q_proj, k_proj and v_proj are named alike.
        lines.append("note: the adapter reaches into the vision tower, which is merged as well")
    return lines


def _arrays_of_modules(tensors: Iterable[str]) -> Counter[str]:
    arrays = {re.sub(r"\.layers\.\d+\.", ".layers.", tensor) for tensor in tensors}
    return Counter(array.split(".")[0] for array in arrays)


def _llava_around(decoder: ModelSource, adapter: Adapter, vision_tower) -> ModelSource:
    """A decoder, and the tower that the adapter's config.json names, as a LLaVA that still lacks its projector."""
    fields = layouts.config_fields(adapter.path)
    where = layouts.where(adapter.path, fields)
    tower = layouts.tower_directory(adapter.path, fields, vision_tower)
    tower = tower or layouts.fetched_tower(adapter.path, fields)
    tower_fields = layouts.config_fields(tower)
    vision = layouts.read_tower(tower, TensorFiles(tower), tower_fields).config
    model = dataclasses.replace(read_llava_config(fields, vision, where), text=decoder.config)
    alone = layouts.read_tower(tower, TensorFiles(tower), tower_fields, model.num_vision_layers_run).source()
    settings = layouts.whole("llava", adapter.path, fields, model, (), default_aspect_ratio="square").source()
    return dataclasses.replace(
        settings,
        leaves=decoder.leaves | alone.leaves,
        idle=alone.idle,
        tokenizer_path=decoder.tokenizer_path,
    )


def _check_fit(base: ModelSource, adapter: Adapter, rows: list[Row]) -> None:
    shapes = {name: row.tensor_shape for row in rows for name in row.tensors}
    width = shapes[VOCABULARY[0]][1]
    for name in VOCABULARY:
        if name in base.idle and name in shapes:
            shapes[name] = (shapes[name][0] + base.idle[name].shape[0], width)
    changed = {name: change.shape for name, change in adapter.low_rank.items()}
    changed |= {name: files.shape(theirs) for name, (files, theirs) in adapter.replaced.items()}
    strange = [name for name in changed if name not in shapes]
    wrong = [
        f"{name} {list(shape)} instead of {list(shapes[name])}"
        for name, shape in changed.items()
        if name in shapes and shape != shapes[name]
    ]
    lacking = [
        name
        for row in rows
        if row.leaf not in base.leaves | base.idle
        for name in row.tensors
        if name not in adapter.replaced and not row.leaf.startswith(VISION)
    ]
    found = {
        "it changes tensors that the base does not have": strange,
        "tensors have another shape": wrong,
        "neither it nor the base has": lacking,
    }
    problems = [f"{what} ({listing(names)})" for what, names in found.items() if names]
    if problems:
        raise ConversionError(
            f"The adapter {adapter.path} does not fit the base: {'; '.join(problems)}. It was trained on "
            f"{adapter.base or 'another model'}."
        )


def _is_touched(row: Row, adapter: Adapter) -> bool:
    return any(name in adapter.low_rank or name in adapter.replaced for name in row.tensors)


def _merged(leaf: Leaf | None, row: Row, adapter: Adapter) -> Leaf | None:
    """`leaf` with the changes of its tensors; without any it is returned as it is."""
    if not _is_touched(row, adapter):
        return leaf
    if all(name in adapter.replaced and name not in adapter.low_rank for name in row.tensors):
        dtypes = [files.dtype(name) for files, name in map(adapter.replaced.get, row.tensors)]
        dtype = np.result_type(*dtypes)
    else:
        dtype = leaf.dtype

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part that `index` selects, a slice for each axis; () is the whole."""
        old = None if leaf is None else leaf.read(*([index] if index else []))
        index = index or tuple(slice(0, size) for size in row.shape)
        merged = np.empty(
            [len(range(*part.indices(n))) for part, n in zip(index, row.shape, strict=True)], dtype
        )
        names, within = (row.tensors[index[0]], index[1:]) if row.stacked else (row.tensors, index)
        layers = merged if row.stacked else [merged]
        old_layers = [None] * len(names) if old is None else (old if row.stacked else [old])
        for name, layer, old_layer in zip(names, layers, old_layers, strict=True):
            layer[...] = _change(name, row, old_layer, within, dtype, adapter)
        return merged

    return Leaf(row.shape, dtype, read) if leaf is None else dataclasses.replace(leaf, dtype=dtype, read=read)


def _change(name: str, row: Row, old, index: tuple[slice, ...], dtype, adapter: Adapter) -> np.ndarray:
    """A part of one layer in our orientation: the base's part `old`, merged and rounded."""
    if name in adapter.replaced:
        files, theirs = adapter.replaced[name]
        old = row.to_ours(files.read(theirs, 0, row.tensor_shape[0]))[index]
    if name in adapter.low_rank:
        change = adapter.low_rank[name]
        left, right = _factors(change)
        if row.how == TRANSPOSE:
            left, right = right.T, left.T
        rows, columns = index
        old = old.astype(np.float32) + np.float32(change.scale) * (left[rows] @ right[:, columns])
    return _round(old, dtype, name, adapter.path)


def _merged_rows(leaf: Leaf, name: str, begin: int, adapter: Adapter) -> Leaf:
    """The token rows above ours, from `begin` on, with their part of the changes."""
    end = begin + leaf.shape[0]

    def read() -> np.ndarray:
        old = leaf.read()
        if name in adapter.replaced:
            files, theirs = adapter.replaced[name]
            old = files.read(theirs, begin, end)
        if name in adapter.low_rank:
            change = adapter.low_rank[name]
            left, right = _factors(change)
            old = old.astype(np.float32) + np.float32(change.scale) * (left[begin:end] @ right)
        return _round(old, leaf.dtype, name, adapter.path)

    return dataclasses.replace(leaf, read=read)


def _factors(change: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """What a change is the product of, as Hugging Face stores tensors: left [n, r], right [r, m]."""
    a, b = (change.files.read(name).astype(np.float32) for name in (change.a, change.b))
    return (a.T, b.T) if change.transposed else (b, a)


def _round(tensor: np.ndarray, dtype, name: str, path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = tensor.astype(dtype)
    if np.isinf(rounded).any() and not np.isinf(tensor).any():
        raise ConversionError(
            f"{path}: merged, {name} holds values beyond the range of {np.dtype(dtype).name}; convert the base to "
            "bfloat16 or float32 first (to-hf --dtype=float32)."
        )
    return rounded
