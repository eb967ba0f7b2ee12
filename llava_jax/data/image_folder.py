"""Finds image files below one folder."""

import os
import re
from collections.abc import Iterable

from llava_jax.errors import DataError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFolder:
    """Image files below one folder; each directory is listed once, when it is first asked for.

    A record's path may not leave the folder, by `..` or by being absolute, for records may come from
    strangers. Links that lie in the folder are followed wherever they lead, for they were placed there by
    its owner, who may well keep coco/ and gqa/ on other disks.
    """

    def __init__(self, path: str):
        self.path = path or "."
        self._roots = {os.path.abspath(self.path), os.path.realpath(self.path)}
        self._listings: dict[str, frozenset[str]] = {}  # directory -> names of its files

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_listings": {}}

    def locate(self, image: str) -> str:
        """Returns the path of an image file; raises DataError if it is absent or would leave the folder."""
        try:
            directory, name = os.path.split(self._resolve(image))
            if name in self._files(directory):
                return os.path.join(directory, name)
        except (
            OSError,
            ValueError,
        ) as error:  # names that no file can have, directories that may not be read
            if isinstance(error, DataError):
                raise
            raise DataError(f"image {image[:80]!r} cannot be looked for ({error}).") from error
        if not os.path.isdir(self.path):
            raise DataError(f"image {image!r} is not there: image_folder {self.path!r} is no directory.")
        raise DataError(f"image {image!r} is not in image_folder {self.path!r}.")

    def missing(self, images: Iterable[str]) -> list[tuple[int, str]]:
        """(position, what is wrong) of each image that `locate` refuses."""
        problems = []
        for position, image in enumerate(images):
            try:
                self.locate(image)
            except DataError as error:
                problems.append((position, str(error)))
        return problems

    def frames(self, directory: str) -> list[str]:
        """Paths below the folder of the image files in one of its directories, 2.jpg before 10.jpg.

        Raises DataError if there is none.
        """
        try:
            names = self._files(self._resolve(directory))
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"video {directory[:80]!r} cannot be looked for ({error}).") from error
        found = sorted((name for name in names if name.lower().endswith(_IMAGE_SUFFIXES)), key=_natural)
        if not found:
            raise DataError(
                f"video {directory!r} is no directory with frames in image_folder {self.path!r}; videos are read "
                "as directories of image files, or as lists of their paths."
            )
        return [os.path.join(directory, name) for name in found]

    def _resolve(self, path: str) -> str:
        """Joins a path to the folder, without `..`: behind a link it would not lead back."""
        if not os.path.isabs(path) and ".." not in path:
            return os.path.join(self.path, path)
        absolute = os.path.abspath(os.path.join(self.path, path))
        for root in self._roots:
            if absolute.startswith(root.rstrip(os.sep) + os.sep):
                return os.path.join(self.path, os.path.relpath(absolute, root))
        raise DataError(
            f"image {path!r} lies outside image_folder {self.path!r} (at {absolute!r}); choose an image_folder "
            "that holds all images."
        )

    def _files(self, directory: str) -> frozenset[str]:
        directory = directory.rstrip(os.sep) or os.sep
        if directory not in self._listings:
            self._listings[directory] = _list_files(directory)
        return self._listings[directory]


def _list_files(directory: str) -> frozenset[str]:
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if _is_file(entry))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads nowhere, or round in a circle
        return False


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts numbers in names by value, and names that differ in leading zeros alone by these."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name
