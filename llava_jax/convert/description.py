"""What a model is, from headers alone: for people as text, for programs as JSON."""

import dataclasses
import math
from collections import Counter

from llava_jax.config_values import to_json
from llava_jax.convert.adapters import Adapter
from llava_jax.convert.merging import describe_changes
from llava_jax.convert.names import VOCABULARY
from llava_jax.convert.reading import Part, Reading
from llava_jax.convert.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Array:
    """One of our leaves, or a tensor set aside. `dtype` is "missing" where the files lack it."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Description:
    """What was found. Names in `ignorable`, `missing`, `unexpected` and `misshaped` are spelled as in the files."""

    layout: str
    config: dict
    arrays: dict[str, Array]
    set_aside: dict[str, Array]
    tokenizer: str = ""
    template: str = ""
    image_aspect_ratio: str = ""
    ignorable: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[str] = dataclasses.field(default_factory=list)
    lacks: str = ""
    sources: list[str] = dataclasses.field(
        default_factory=list
    )  # where the tensors lie, if in several places

    def num_parameters(self) -> dict[str, int]:
        """The number of values per module."""
        counts = Counter()
        for name, array in self.arrays.items():
            counts[name.split(".")[0]] += array.size
        return dict(counts)

    def num_bytes(self) -> dict[str, int]:
        """The number of bytes per dtype, of what is set aside too."""
        counts = Counter()
        for array in [*self.arrays.values(), *self.set_aside.values()]:
            counts[array.dtype] += array.num_bytes
        return {dtype: count for dtype, count in counts.items() if count}

    def as_json(self) -> dict:
        """All of it as plain JSON data, with the counts."""
        return dataclasses.asdict(self) | {
            "num_parameters": self.num_parameters(),
            "num_bytes": self.num_bytes(),
        }

    def as_text(self) -> str:
        """All of it for people."""
        lines = [f"layout: {self.layout}"]
        if self.template:
            lines += [
                f"template: {self.template}",
                f"image_aspect_ratio: {self.image_aspect_ratio}",
                f"tokenizer: {self.tokenizer or 'none'}",
            ]
        lines += [f"from: {source}" for source in self.sources]
        lines += _config_lines(self.config)
        width = max(map(len, self.arrays), default=0)
        for name, array in self.arrays.items():
            lines.append(f"{name:{width}}  {array.dtype:8}  {list(array.shape)}")
        counts = self.num_parameters()
        lines += [f"{module}: {count:,} parameters" for module, count in counts.items()]
        lines.append(f"total: {sum(counts.values()):,} parameters")
        if self.set_aside:
            count = sum(array.size for array in self.set_aside.values())
            lines.append(f"set aside: {count:,} parameters in {len(self.set_aside)} tensors that are not run")
        lines += [f"size: {count:,} bytes of {dtype}" for dtype, count in self.num_bytes().items()]
        for what in ("ignorable", "missing", "unexpected", "misshaped"):
            lines += [f"{what}: {name}" for name in getattr(self, what)]
        return "\n".join([*lines, self.lacks] if self.lacks else lines)


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """What a LoRA adapter changes: the rank and scale of each tensor, and the tensors that it replaces."""

    base: str
    wrapped_layout: str
    low_rank: dict[str, dict]
    replaced: list[str]
    notes: list[str]

    def as_json(self) -> dict:
        """All of it as plain JSON data."""
        return {"layout": "adapter"} | dataclasses.asdict(self)

    def as_text(self) -> str:
        """All of it for people."""
        lines = [
            "layout: adapter",
            f"base: {self.base or 'not named'}",
            f"wrapped layout: {self.wrapped_layout}",
        ]
        lines += [
            f"{name}: rank {change['rank']}, scale {change['scale']:g}"
            for name, change in self.low_rank.items()
        ]
        lines += [f"{name}: replaced" for name in self.replaced]
        return "\n".join([*lines, *self.notes])


def describe(model: ModelSource | Reading | Adapter) -> Description | AdapterDescription:
    """Reads no weights. Tensors that do not fit their config.json are reported, not raised."""
    if isinstance(model, Adapter):
        low_rank = {
            name: {"rank": change.files.shape(change.a)[0], "scale": change.scale}
            for name, change in model.low_rank.items()
        }
        notes = describe_changes(model)
        return AdapterDescription(model.base, model.layout, low_rank, sorted(model.replaced), notes)
    return _describe_reading(model) if isinstance(model, Reading) else _describe_source(model)


def _describe_source(source: ModelSource) -> Description:
    arrays, aside = (
        {
            name: Array(leaf.dtype.name, leaf.shape, math.prod(leaf.shape) * leaf.dtype.itemsize)
            for name, leaf in leaves.items()
        }
        for leaves in (source.leaves, source.idle)
    )
    return Description(arrays=arrays, set_aside=aside, **_settings(source))


def _describe_reading(reading: Reading) -> Description:
    arrays, aside = {}, {}
    for part in reading.parts:
        for row in part.rows:
            arrays[row.leaf] = _array(part, row.tensors, row.shape)
        for row in part.idle_rows:
            aside[row.leaf] = _array(part, row.tensors, row.shape)
        rows = {name: row.tensor_shape for row in part.rows for name in row.tensors if name in VOCABULARY}
        for name, shape in rows.items():
            more = 0 if part.file_vocabulary is None else part.file_vocabulary - shape[0]
            if more:
                aside[name] = _array(part, (name,), (more, shape[1]))
    folders = dict.fromkeys(str(part.matching.files.path) for part in reading.parts)
    return Description(
        arrays=arrays,
        set_aside=aside,
        lacks=reading.lacks,
        sources=list(folders) if len(folders) > 1 else [],
        **{
            what: [name for part in reading.parts for name in getattr(part, what)()]
            for what in ("ignorable", "missing", "unexpected", "misshaped")
        },
        **_settings(reading),
    )


def _array(part: Part, tensors: tuple[str, ...], shape: tuple[int, ...]) -> Array:
    present = set(part.matching.names())
    names = [part.matching.file_name(name) for name in tensors if name in present]
    if len(names) < len(tensors):
        return Array("missing", shape, 0)
    dtypes = [part.matching.files.dtype(name) for name in names]
    return Array(dtypes[0].name, shape, math.prod(shape) * dtypes[0].itemsize)


def _settings(model: ModelSource | Reading) -> dict:
    settings = {"layout": model.layout, "config": to_json(model.config) if model.config else {}}
    if "vision" not in settings["config"]:  # a component, which is used with no template
        return settings
    return settings | {
        "tokenizer": model.tokenizer_path,
        "template": model.template,
        "image_aspect_ratio": model.image_aspect_ratio,
    }


def _config_lines(config: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            lines += _config_lines(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value}")
    return lines
