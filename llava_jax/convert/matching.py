"""Ties the tensors of a set of files to our leaves and accounts for every one of them."""

from collections.abc import Iterable

import numpy as np

from llava_jax.convert import recycled
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.names import (
    EMBEDDING,
    HEAD,
    PATCHES,
    TRANSPOSE,
    VOCABULARY,
    Row,
    canonical,
    is_ignorable,
)
from llava_jax.convert.source import Index, Leaf, completed, extent
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.transposing import contiguous, copy_into


class Matching:
    """The tensors of `files` under their canonical names."""

    def __init__(self, files: TensorFiles, layout: str, *, only: str = ""):
        """`only`: a canonical prefix; other tensors are none of our business."""
        self.files = files
        self.layout = layout
        self._names = {}  # canonical -> in the file
        self.strange = []  # the tensors of the files that the layout does not know, or that it has already
        for name in files.names():
            known = canonical(name, layout)
            if is_ignorable(name, layout) or (only and not (known or "").startswith(only)):
                continue
            if known is None or known in self._names:
                self.strange.append(name)
            else:
                self._names[known] = name

    def names(self) -> Iterable[str]:
        """The canonical names present."""
        return self._names.keys()

    def file_name(self, name: str) -> str:
        return self._names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(self._names[name])

    def check_tied_head(self) -> None:
        """Some files of tied models hold a head all the same. Raises if it is no copy of the embeddings."""
        if HEAD not in self._names:
            return
        head, embedding = self._names[HEAD], self._names[EMBEDDING]
        rows = self.files.shape(embedding)[0]
        ranges = [(begin, min(begin + 4096, rows)) for begin in range(0, rows, 4096)]
        if self.files.shape(head) != self.files.shape(embedding) or not all(
            np.array_equal(self.files.read(head, *rows), self.files.read(embedding, *rows)) for rows in ranges
        ):
            raise ConversionError(
                f"{self.files.path}: config.json ties lm_head to the embeddings, but {head} and "
                f"{embedding} differ; set tie_word_embeddings to false if they were trained apart."
            )

    def leaves(
        self, rows: Iterable[Row], idle_rows: Iterable[Row]
    ) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """Our leaves and the idle tensors, of rows whose tensors are all there and have their shapes.

        The files may hold more token rows than ours, which are idle.
        """
        leaves = {row.leaf: self._leaf(row) for row in rows}
        idle = {row.leaf: self._leaf(row) for row in idle_rows}
        for row in rows:
            (*_, name) = row.tensors
            if name in VOCABULARY and self.shape(name)[0] > row.tensor_shape[0]:
                idle[name] = self._extra_rows(name, row.tensor_shape[0])
        return leaves, idle

    def _leaf(self, row: Row) -> Leaf:
        names = [self._names[name] for name in row.tensors]
        dtypes = {self.files.dtype(name) for name in names}
        if len(dtypes) > 1:
            raise ConversionError(
                f"{self.files.path}: the layers of {row.leaf} have different dtypes "
                f"({listing(sorted(map(str, dtypes)))}); save the model in one dtype first."
            )
        dtype = dtypes.pop() if dtypes else np.dtype(np.float32)

        def read(index: Index = ()) -> np.ndarray:
            index = completed(index, row.shape)
            if not row.stacked:
                return contiguous(self._read(row, names[0], index))
            stacked = recycled.empty(extent(index), dtype)
            for layer, name in zip(stacked, names[index[0]], strict=True):
                copy_into(layer, self._read(row, name, index[1:]))
            return stacked

        return Leaf(row.shape, dtype, read, reading_axis(row))

    def _read(self, row: Row, name: str, index: Index) -> np.ndarray:
        """A part of one layer. Of the tensor in the file only the rows that it lies in are read."""
        if row.how == PATCHES:
            return row.to_ours(self.files.read(name))[index]
        axis = len(index) - 1 if row.how == TRANSPOSE else 0
        rows = index[axis]
        within = (*index[:axis], slice(None), *index[axis + 1 :])
        return row.to_ours(self.files.read(name, rows.start, rows.stop))[within]

    def _extra_rows(self, name: str, begin: int) -> Leaf:
        file_name = self._names[name]
        count, width = self.shape(name)
        dtype = self.files.dtype(file_name)
        return Leaf((count - begin, width), dtype, lambda: self.files.read(file_name, begin))


def reading_axis(row: Row) -> int:
    """The axis of a row's leaf that is the first one of its tensors, or that of the layers."""
    return 1 if row.how == TRANSPOSE and not row.stacked else 0
