"""Rows for tokens that a model's vocabulary is to gain."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_jax.convert.download import fetch
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.names import VOCABULARY
from llava_jax.convert.ours import is_ours
from llava_jax.convert.source import Index, Leaf, ModelSource, completed, extent
from llava_jax.convert.tensors import TensorFiles

EMBEDDING = "language_model.embed_tokens.embedding"
# Our leaves with one row or column per token.
_TOKEN_AXES = {EMBEDDING: 0, "language_model.lm_head.kernel": 1}
_TOKENS_AT_ONCE = 8192


def with_mean_rows(source: ModelSource, begin: int, end: int) -> ModelSource:
    """`source`, where the tokens `begin` to `end` of its vocabulary, which grows if it has to, have the mean of those
    before them, in the embedding and in the head.

    So the original begins <im_start> and <im_end> (initialize_vision_tokenizer in llava/model/llava_arch.py). Rows that
    were set aside at import belonged to the end of the old vocabulary; a grown one is without them.
    """
    size = source.config.text.vocab_size
    grown = max(size, end)
    leaves = {
        name: _with_mean(source.leaves[name], axis, begin, end, grown)
        for name, axis in _TOKEN_AXES.items()
        if name in source.leaves
    }
    text = dataclasses.replace(source.config.text, vocab_size=grown)
    idle = {n: leaf for n, leaf in source.idle.items() if grown == size or n not in VOCABULARY}
    config = dataclasses.replace(source.config, text=text)
    return dataclasses.replace(source.with_leaves(leaves), config=config, idle=idle)


def with_embeddings(source: ModelSource, ids: list[int], rows: Callable[[], np.ndarray]) -> ModelSource:
    """`source`, where the embeddings of some tokens are `rows()`, float[n, D]."""
    old = source.leaves[EMBEDDING]

    def read(index: Index = ()) -> np.ndarray:
        tokens, columns = completed(index, old.shape)
        values = np.array(old.part((tokens, columns)))
        for id, row in zip(ids, rows(), strict=True):
            if tokens.start <= id < tokens.stop:
                values[id - tokens.start] = row[columns]
        return values

    return source.with_leaves({EMBEDDING: dataclasses.replace(old, read=read, axis=0)})


def embeddings_of(source: ModelSource, ids: list[int]) -> Callable[[], np.ndarray] | None:
    """The embeddings of some tokens in another model; None if its vocabulary is too small to have them."""
    leaf = source.leaves[EMBEDDING]
    if leaf.shape[0] <= max(ids):
        return None
    everything = slice(0, leaf.shape[1])
    return lambda: np.concatenate([leaf.part((slice(id, id + 1), everything)) for id in ids])


def saved_embeddings(path, ids: list[int], shape: tuple[int, int]) -> Callable[[], np.ndarray] | None:
    """The same from a file or directory of others, such as the original's first stage leaves with its projector: it
    may hold these embeddings alone, or all of them, of this shape. None if it holds none.

    Raises ConversionError where they are of another model.
    """
    if is_ours(fetch(path)):
        return None
    files = TensorFiles(Path(fetch(path)))
    name = next((name for name in files.names() if name.endswith("embed_tokens.weight")), None)
    if name is None:
        return None
    if files.shape(name) == (len(ids), shape[1]):
        return lambda: files.read(name)
    if files.shape(name) != shape:
        raise ConversionError(
            f"{path} holds {name} of shape {list(files.shape(name))}, but this model's embedding has {list(shape)}: it "
            "was trained with another decoder or vocabulary. Name a file with the projector alone, or that model."
        )
    return lambda: np.concatenate([files.read(name, id, id + 1) for id in ids])


def _with_mean(leaf: Leaf, axis: int, begin: int, end: int, grown: int) -> Leaf:
    """A leaf [V, D] (axis 0) or [D, V] (axis 1) with `grown` tokens, of which `begin` to `end` have the mean of those
    before."""
    shape = tuple(grown if i == axis else size for i, size in enumerate(leaf.shape))

    def part_of(tokens: slice, others: slice) -> np.ndarray:
        part = leaf.part((tokens, others) if axis == 0 else (others, tokens))
        return part if axis == 0 else part.T

    @functools.cache
    def mean() -> np.ndarray:
        everything = slice(0, shape[1 - axis])
        total = np.zeros(shape[1 - axis])
        for first in range(0, begin, _TOKENS_AT_ONCE):
            tokens = slice(first, min(first + _TOKENS_AT_ONCE, begin))
            total += part_of(tokens, everything).sum(axis=0, dtype=np.float64)
        return (total / begin).astype(leaf.dtype)

    def read(index: Index = ()) -> np.ndarray:
        index = completed(index, shape)
        tokens, others = index[axis], index[1 - axis]
        values = np.empty(extent(index), leaf.dtype)
        rows = values if axis == 0 else values.T
        for first, last in ((0, begin), (begin, end), (end, grown)):
            some = slice(max(first, tokens.start), min(last, tokens.stop))
            if some.start < some.stop:
                found = mean()[others] if first == begin else part_of(some, others)
                rows[some.start - tokens.start : some.stop - tokens.start] = found
        return values

    return Leaf(shape, leaf.dtype, read, leaf.axis)
