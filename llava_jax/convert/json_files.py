"""Reads JSON files that others wrote."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from llava_jax.convert.errors import ConversionError


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises ConversionError naming the file otherwise.

    Keys that come twice are refused, since readers differ in which of the two they take, and so are NaN and
    Infinity, which are no JSON.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}); fetch or write it again.") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} should hold a JSON object, not a {type(fields).__name__}.")
    return fields


@contextlib.contextmanager
def of_right_kinds(path: Path) -> Iterator[None]:
    """What fails in the block because a value of this JSON file is of another kind than it should be, or is missing,
    is a ConversionError."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError, re.error) as error:
        raise ConversionError(
            f"{path} holds a value of another kind than it should ({type(error).__name__}: {error}); fetch or write it "
            "again."
        ) from error


def repeated_keys(text: str) -> list[str]:
    """The keys that come twice in an object of some valid JSON."""
    found = []

    def look(pairs):
        found.extend(_repeated(pairs))

    json.loads(text, object_pairs_hook=look)
    return found


def _once(pairs: list[tuple]) -> dict:
    repeated = _repeated(pairs)
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} comes twice")
    return dict(pairs)


def _repeated(pairs: list[tuple]) -> list[str]:
    seen = set()
    return [key for key, _ in pairs if key in seen or seen.add(key)]


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")
