"""Writes a directory so that it either exists complete or not at all."""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llava_jax.convert.errors import ConversionError


@contextlib.contextmanager
def new_directory(destination) -> Iterator[Path]:
    """Yields a directory to fill, named `destination` plus ".incomplete", and renames it at the end.

    The name appears only when all its files are on the disk, so that not even a power cut leaves a directory
    that looks complete. What an interrupted write left behind is removed by the next one. Raises ConversionError
    if `destination` is there and no empty directory, if another process is writing it, or if something that no
    write has left is in the way.
    """
    destination = Path(destination).expanduser().resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(
            f"{destination} exists and is not an empty directory; remove it or choose another name."
        )
    partial = destination.with_name(destination.name + ".incomplete")
    with _claimed(partial):
        partial.mkdir()
        try:
            with _written_early(partial):
                yield partial
            for folder, _, files in os.walk(partial):
                for path in [*(os.path.join(folder, name) for name in files), folder]:
                    _synchronise(path)
            os.rename(partial, destination)
            _synchronise(destination.parent)
        except BaseException:
            _remove(partial, settled=0.3)
            raise


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Sees to it that nothing lies at `partial` and no other process writes there.

    A file beside it, locked as long as its writer lives, tells that what lies there is only an interrupted write.
    """
    claim = partial.with_name(f"{partial.name}.lock")
    if os.path.lexists(partial) and not claim.exists():
        raise ConversionError(
            f"{partial} is in the way, and no interrupted conversion has left it; move it or choose another name."
        )
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = claim.open("a")
    except OSError as error:
        raise ConversionError(
            f"Nothing can be written in {partial.parent} ({error.strerror}); choose another place."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"Another process is writing {partial}; wait for it, or choose another name."
            ) from error
        _remove(partial)
        try:
            yield
        finally:
            if not partial.exists():
                claim.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_early(directory: Path) -> Iterator[None]:
    """Meanwhile writes what comes into `directory` to the disk, and gives up the memory that held it.

    Else the system collects gigabytes before it begins, in memory that it first has to find.
    """
    done, failures = threading.Event(), []

    def write() -> None:
        sizes = {}
        while not done.wait(0.2):
            try:
                _write_grown(directory, sizes)
            except OSError as error:  # is told only once, not to the one who synchronises at the end
                failures.append(error)
                return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


def _write_grown(directory: Path, sizes: dict[str, int]) -> None:
    """Writes the files that are not as large as `sizes` says, and notes how large they are."""
    for folder, _, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in files):
            with contextlib.suppress(FileNotFoundError):  # it was renamed
                size = os.path.getsize(path)
                if sizes.get(path, 0) != size:
                    sizes[path] = size
                    _synchronise(path, forget=True)


def _remove(partial: Path, *, settled: float = 0.0) -> None:
    """Removes a directory for good: a thread of an interrupted write may still add files for `settled` seconds."""
    until = time.monotonic() + settled
    for _ in range(100):
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists() and time.monotonic() >= until:
            return
        time.sleep(0.1)


def _synchronise(path, *, forget: bool = False) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk; `forget`: and no longer in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
