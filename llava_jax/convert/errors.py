"""The error of this room."""

from llava_jax.errors import CheckpointError


class ConversionError(CheckpointError):
    """A directory or file that cannot be converted; the message names it, the reason and the fix."""


def listing(names, limit: int = 4) -> str:
    """The first few names and how many more there are, for an error message."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + rest
