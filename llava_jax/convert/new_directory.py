"""Writes a directory so that it either exists complete or not at all."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from llava_jax.convert.errors import ConversionError


@contextlib.contextmanager
def new_directory(destination) -> Iterator[Path]:
    """Yields a directory to fill, named `destination` plus ".incomplete", and renames it at the end.

    The name appears only when all its files are on the disk, so that not even a power cut leaves a directory
    that looks complete. What an interrupted write left behind is removed by the next one. An existing
    `destination` is refused unless it is an empty directory.
    """
    destination = Path(os.path.abspath(destination))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(
            f"{destination} exists and is not an empty directory; remove it or choose another name."
        )
    partial = destination.with_name(destination.name + ".incomplete")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for path in [*(os.path.join(folder, name) for name in files), folder]:
                _synchronise(path)
        os.rename(partial, destination)
        _synchronise(destination.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    for _ in range(10):  # a thread of an interrupted write may still add files
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            return
        time.sleep(0.1)


def _synchronise(path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
