"""Writes a directory so that it either exists complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llava_jax.convert.errors import ConversionError


@contextlib.contextmanager
def new_directory(destination) -> Iterator[Path]:
    """Yields a directory to fill, named `destination` plus ".incomplete", and renames it at the end.

    What an interrupted write left behind is removed by the next one. An existing `destination` is refused
    unless it is an empty directory.
    """
    destination = Path(os.path.abspath(destination))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(
            f"{destination} exists and is not an empty directory; remove it or choose another name."
        )
    partial = destination.with_name(destination.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.rename(partial, destination)
