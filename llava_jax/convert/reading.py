"""How the tensors of some files become a model, decided from headers: before, or without, reading any."""

import dataclasses
from collections.abc import Sequence

from llava_jax.config import ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.matching import Matching
from llava_jax.convert.names import HEAD, VOCABULARY, Row, is_ignorable, spell
from llava_jax.convert.source import Leaf, ModelSource


@dataclasses.dataclass(frozen=True)
class Part:
    """Files, and the rows of the name table that their tensors should fill.

    `tied`: a head in the files is only a copy of the embeddings. `file_vocabulary`: how many token rows they
    hold, where these are more than ours.
    """

    matching: Matching
    rows: Sequence[Row]
    idle_rows: Sequence[Row] = ()
    tied: bool = False
    file_vocabulary: int | None = None

    def read(self) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """Leaves and idle tensors; raises one ConversionError that names all tensors that do not fit."""
        found = {
            "are missing": self.missing(),
            "are unexpected": self.unexpected(),
            "have another shape": self.misshaped(),
        }
        problems = [
            f"{len(names)} tensors {what} ({listing(names)})" for what, names in found.items() if names
        ]
        if problems:
            raise ConversionError(
                f"{self._files.path} does not match its config.json as a {self._layout} checkpoint: "
                f"{'; '.join(problems)}. Fetch the files again, or correct config.json."
            )
        if self.tied:
            self.matching.check_tied_head()
        return self.matching.leaves(self.rows, self.idle_rows)

    def ignorable(self) -> list[str]:
        """The tensors that mean nothing to LLaVA, as the files spell them."""
        return [name for name in self._files.names() if is_ignorable(name, self._layout)]

    def missing(self) -> list[str]:
        """The tensors that the config asks for and the files lack, as their layout spells them."""
        present = set(self.matching.names())
        return [spell(name, self._layout) for name in self._expected() if name not in present]

    def unexpected(self) -> list[str]:
        """The tensors that the config does not ask for, as the files spell them."""
        expected = self._expected().keys() | ({HEAD} if self.tied else set())
        others = [self.matching.file_name(name) for name in self.matching.names() if name not in expected]
        return self.matching.strange + others

    def misshaped(self) -> list[str]:
        """The tensors of another shape than the config asks for, with both shapes."""
        present = set(self.matching.names())
        return [
            f"{self.matching.file_name(name)} {list(self.matching.shape(name))} instead of {list(shape)}"
            for name, shape in self._expected().items()
            if name in present and self.matching.shape(name) != shape
        ]

    @property
    def _files(self):
        return self.matching.files

    @property
    def _layout(self) -> str:
        return self.matching.layout

    def _expected(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for row in [*self.rows, *self.idle_rows]:
            for name in row.tensors:
                grown = name in VOCABULARY and self.file_vocabulary is not None
                shapes[name] = (self.file_vocabulary, *row.tensor_shape[1:]) if grown else row.tensor_shape
        return shapes


@dataclasses.dataclass(frozen=True)
class Reading:
    """A foreign model, or a part of one: its config and where its leaves will come from.

    The fields are those of `ModelSource`, with `parts` in place of the leaves. `lacks` says what has to be given
    before it can be read, and is empty where nothing has.
    """

    layout: str
    config: ModelConfig | VisionConfig | TextConfig | None
    parts: tuple[Part, ...]
    tokenizer_path: str = ""
    template: str = "v1"
    image_aspect_ratio: str = "pad"
    lacks: str = ""

    def source(self) -> ModelSource:
        """The model, ready to be read; raises ConversionError if tensors do not fit."""
        if self.lacks:
            raise ConversionError(self.lacks)
        leaves, idle = {}, {}
        for part in self.parts:
            more_leaves, more_idle = part.read()
            leaves |= more_leaves
            idle |= more_idle
        return ModelSource(
            self.layout,
            self.config,
            leaves,
            idle,
            self.tokenizer_path,
            self.template,
            self.image_aspect_ratio,
        )
