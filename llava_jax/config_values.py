"""Settings from plain values and back: every key and type checked, wrong keys answered with the right ones."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from llava_jax.config import Config, refuse_switch, require
from llava_jax.errors import ConfigError
from llava_jax.known_names import explain


def build(cls: type, fields: dict[str, Any], prefix: str):
    """A dataclass of llava_jax/config.py from (nested) values; `prefix` goes before its keys in messages.

    Raises ConfigError on an unknown key (naming the nearest), a wrong type, or values that cannot be.
    """
    types_by_name = typing.get_type_hints(cls)
    for key in fields:
        if key not in types_by_name:
            raise ConfigError(f"Unknown key {prefix + key!r}.{_hint(key, types_by_name)}")
    return cls(**{key: _convert(types_by_name[key], value, prefix + key) for key, value in fields.items()})


def _hint(key: str, known: Iterable[str]) -> str:
    if elsewhere := explain(key):
        return f" {elsewhere}"
    near = difflib.get_close_matches(key, known, n=1) or keys_like(key)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."


def keys_like(key: str) -> list[str]:
    """Full names in the schema that end in (nearly) this key."""
    names = {}

    def visit(cls, prefix):
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                visit(kind, f"{prefix}{name}.")
            else:
                names.setdefault(name, prefix + name)

    visit(Config, "")
    return [names[near] for near in difflib.get_close_matches(key, names, n=1)]


def _convert(kind, value, key: str):
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{key}={value!r} should be a section with keys.")
        return build(kind, dict(value), key + ".")
    if isinstance(kind, types.UnionType):  # "X | None"
        if value is None:
            return None
        kind = next(member for member in typing.get_args(kind) if member is not type(None))
    if typing.get_origin(kind) is tuple:
        require(isinstance(value, list | tuple), f"{key}={value!r} should be a tuple.")
        members = typing.get_args(kind)
        if members[-1] is ...:
            members = members[:1] * len(value)
        require(len(members) == len(value), f"{key}={value!r} should have {len(members)} members.")
        return tuple(
            _convert(member, part, f"{key}[{index}]")
            for index, (member, part) in enumerate(zip(members, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if re.search(r"(^|\.)tune\.(vision_tower|projector|language_model)$", key):
        refuse_switch(key, value)
    require(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        f"{key}={value!r} should be of type {kind.__name__}, not {type(value).__name__}.",
    )
    return value


def to_json(config) -> dict:
    """A dataclass of llava_jax/config.py as plain JSON data; `from_json` reads it back."""
    return dataclasses.asdict(config)


def from_json(cls: type, fields: dict):
    """Rebuilds a dataclass of llava_jax/config.py from `to_json`'s result; raises ConfigError as `build` does."""
    return build(cls, fields, "")
