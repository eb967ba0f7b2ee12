"""What options of benchmarks take: numbers above 0, and several values with commas between."""

import argparse
from collections.abc import Callable, Iterable


def several(*choices: str) -> Callable[[str], list[str]]:
    """For add_argument's `type`: some of these choices."""
    return lambda text: [_one_of(choices, part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    """For add_argument's `type`: numbers above 0."""
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    """For add_argument's `type`: a number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _one_of(choices: Iterable[str], text: str) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
    return text
