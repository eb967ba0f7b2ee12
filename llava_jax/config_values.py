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
from llava_jax.known_names import KNOWN_NAMES, counterpart_of, explain, explain_value


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
    if near := difflib.get_close_matches(key, known, n=1):
        return f" Did you mean {near[0]!r}?"
    settings, elsewhere = meant(key)
    if elsewhere:
        return f" {elsewhere}"
    if settings:
        return f" Did you mean {' or '.join(map(repr, settings))}?"
    return f" Known: {', '.join(sorted(known))}."


def meant(key: str) -> tuple[tuple[str, ...], str]:
    """The settings, by full name, that a key means or may mean, and what is to be said of it if it is known elsewhere.

    Nothing is as near as a setting of the schema; then come names of other trainers, the same name in another section,
    and similar ones, of the key's own section first.
    """
    kinds = _kinds()
    if key in kinds:
        return (key,), ""
    section, _, name = key.rpartition(".")
    if elsewhere := counterpart_of(name):
        return elsewhere.ours, explain(name)
    by_name = {}
    for setting in kinds:
        by_name.setdefault(setting.rpartition(".")[2], []).append(setting)
    own = [setting.removeprefix(f"{section}.") for setting in kinds if setting.startswith(f"{section}.")]
    if name not in by_name and (near := difflib.get_close_matches(name, own, n=1)):
        return (f"{section}.{near[0]}",), ""
    near = difflib.get_close_matches(name, [*by_name, *KNOWN_NAMES], n=1, cutoff=0.75)
    if near and near[0] in by_name:
        return tuple(by_name[near[0]]), ""
    if near:
        return counterpart_of(near[0]).ours, f"Did you mean {near[0]}? {explain(near[0])}"
    return (), ""


def wrong_type(key: str, value: str) -> str | None:
    """What a setting takes, where it was given text that is nothing of the kind; None for what is no setting.

    `key` is the setting's full name, that of a stage (stages.NAME.KEY) or not.
    """
    setting = re.sub(r"^stages\.[^.]+\.", "", key)
    kind = _kinds().get(setting)
    takes = _INTERVALS.get(setting) or _WORDS.get(kind)
    return takes and f"{key}={value!r} should be {takes}. {explain_value(key, value) or ''}".rstrip()


_INTERVALS = dict.fromkeys(
    ("checkpoint.save_steps", "train.eval_steps"), "a number of steps or, below 1, a share of the stage"
) | {
    "optimizer.warmup_steps": "a whole number (optimizer.warmup_ratio is a share of the stage)",
    "train.log_steps": "a whole number of steps",
}
_WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


def _kinds() -> dict[str, type]:
    """The type of every setting by its full name, without the None that some may be."""
    kinds = {}

    def visit(cls, prefix):
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                visit(kind, f"{prefix}{name}.")
            else:
                kinds[prefix + name] = _without_none(kind)

    visit(Config, "")
    return kinds


def _without_none(kind):
    """ "X | None" -> X."""
    if not isinstance(kind, types.UnionType):
        return kind
    return next(member for member in typing.get_args(kind) if member is not types.NoneType)


def _convert(kind, value, key: str):
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{key}={value!r} should be a section with keys.")
        return build(kind, dict(value), key + ".")
    if value is None and isinstance(kind, types.UnionType):
        return None
    kind = _without_none(kind)
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
    if isinstance(value, str) and (elsewhere := explain_value(key, value)):
        raise ConfigError(f"{key}={value!r} is a name from elsewhere. {elsewhere}")
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
