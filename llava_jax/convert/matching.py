"""Ties the tensors of a set of files to our leaves and accounts for every one of them."""

from collections.abc import Iterable

import numpy as np

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
    spell,
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
        self._used = set()
        self._names = {}  # canonical -> in the file
        self._strange = []
        for name in files.names():
            known = canonical(name, layout)
            if is_ignorable(name, layout) or (only and not (known or "").startswith(only)):
                continue
            if known is None or known in self._names:
                self._strange.append(name)
            else:
                self._names[known] = name

    def names(self) -> Iterable[str]:
        """The canonical names present."""
        return self._names.keys()

    def file_name(self, name: str) -> str:
        return self._names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(self._names[name])

    def drop_tied_head(self) -> None:
        """Forgets the copy of the embeddings that some files of tied models hold. Raises if it is no copy."""
        if HEAD not in self._names or EMBEDDING not in self._names:
            return
        head, embedding = self._names[HEAD], self._names[EMBEDDING]
        rows = self.files.shape(embedding)[0]
        for begin in range(0, rows, 4096):
            parts = [self.files.read(name, begin, min(begin + 4096, rows)) for name in (head, embedding)]
            if not np.array_equal(*parts):
                raise ConversionError(
                    f"{self.files.path}: config.json ties lm_head to the embeddings, but {head} and "
                    f"{embedding} differ; set tie_word_embeddings to false if they were trained apart."
                )
        del self._names[HEAD]

    def leaves(
        self, rows: Iterable[Row], idle_rows: Iterable[Row] = (), *, file_vocabulary: int | None = None
    ) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """Our leaves and the idle tensors. Files may hold `file_vocabulary` token rows, more than ours.

        Raises one ConversionError that names missing, unexpected and mis-shaped tensors.
        """
        rows, idle_rows = list(rows), list(idle_rows)
        self._check([*rows, *idle_rows], file_vocabulary)
        leaves = {row.leaf: self._leaf(row) for row in rows}
        idle = {row.leaf: self._leaf(row) for row in idle_rows}
        for row in rows:
            (*_, name) = row.tensors
            if name in VOCABULARY and self.shape(name)[0] > row.tensor_shape[0]:
                idle[name] = self._extra_rows(name, row.tensor_shape[0])
        return leaves, idle

    def _check(self, rows: list[Row], file_vocabulary: int | None) -> None:
        expected = {}
        for row in rows:
            for name in row.tensors:
                expected[name] = row.tensor_shape
                if name in VOCABULARY and file_vocabulary is not None:
                    expected[name] = (file_vocabulary, *row.tensor_shape[1:])
        missing = [spell(name, self.layout) for name in expected if name not in self._names]
        unexpected = self._strange + [name for known, name in self._names.items() if known not in expected]
        wrong = [
            f"{self._names[name]} {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self._names and self.shape(name) != shape
        ]
        found = {"are missing": missing, "are unexpected": unexpected, "have another shape": wrong}
        problems = [
            f"{len(names)} tensors {what} ({listing(names)})" for what, names in found.items() if names
        ]
        if problems:
            raise ConversionError(
                f"{self.files.path} does not match its config.json as a {self.layout} checkpoint: "
                f"{'; '.join(problems)}. Fetch the files again, or correct config.json."
            )

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
            stacked = np.empty(extent(index), dtype)
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
