"""Reads LLaVA's training files: a JSON list or JSONL of records, checked before anything is trained on."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence

from llava_jax.errors import DataError

MAX_PROBLEMS_SHOWN = 5
ROLES = ("human", "gpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One training sample: a conversation and the images it talks about.

    `turns` are (role, text) with roles human, gpt, human, ...; an opening turn of the assistant is gone,
    as in the original, because there is no question it answers.
    """

    name: str  # for messages: "record 7 (id 'abc')"
    images: tuple[str, ...]  # paths relative to the image folder, in the order of the placeholders
    turns: tuple[tuple[str, str], ...]


def read_records(path: str) -> list[Record]:
    """Reads every record of a JSON list or JSONL file; the content decides which it is.

    Raises DataError for a file that is no JSON (with line and column), or naming the bad records.
    """
    records, problems = [], []
    for index, value in enumerate(_read_json(path)):
        try:
            records.append(parse_record(value, index))
        except DataError as error:
            problems.append(str(error))
    raise_problems(path, problems)
    if not records:
        raise DataError(f"{path}: there is no record in this file.")
    return records


def parse_record(value: object, index: int) -> Record:
    """Checks one decoded JSON value and returns it as a `Record`; raises DataError naming the record."""
    name = f"record {index}"
    if not isinstance(value, dict):
        raise DataError(f"{name}: should be an object with 'conversations', not {_json_type(value)}.")
    if "id" in value:
        name = f"{name} (id {value['id']!r})"
    images = _parse_images(value.get("image"), name)
    return Record(name, images, _parse_turns(value.get("conversations"), name))


def check_images(records: Sequence[Record], folder: "ImageFolder") -> list[str]:
    """Looks for the image files of all records and returns one problem per file that is absent or outside."""
    problems = []
    for record in records:
        for image in record.images:
            try:
                folder.locate(image)
            except DataError as error:
                problems.append(f"{record.name}: {error}")
    return problems


def raise_problems(path: str, problems: Sequence[str]) -> None:
    """Raises one DataError that shows the first problems and counts them all; does nothing without any."""
    if not problems:
        return
    noun = "problem" if len(problems) == 1 else "problems"
    shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    raise DataError(f"{path}: {len(problems)} {noun}; correct or remove these records:\n  {shown}{more}")


class ImageFolder:
    """Finds image files below one folder, listing each directory once."""

    def __init__(self, path: str):
        path = path or "."
        self.path = path
        self._real_path = os.path.realpath(path)
        self._entries: dict[str, dict[str, bool]] = {}  # directory -> name of a file -> is it a link

    def locate(self, image: str) -> str:
        """Returns the path of an image file; raises DataError if it is absent or lies outside the folder.

        Links are followed only to places inside the folder.
        """
        try:
            return self._locate(image)
        except (OSError, ValueError) as error:  # names that no file can have
            if isinstance(error, DataError):
                raise
            raise DataError(f"image {image[:80]!r} cannot be looked for ({error}).") from error

    def _locate(self, image: str) -> str:
        path = os.path.join(self.path, image)
        directory, name = os.path.split(path)
        if directory not in self._entries:
            self._entries[directory] = self._list(directory, image)
        entries = self._entries[directory]
        if name not in entries:
            raise DataError(f"image {image!r} is not in image_folder {self.path!r}.")
        if entries[name]:
            self._require_inside(path, image)
        return path

    def _list(self, directory: str, image: str) -> dict[str, bool]:
        self._require_inside(directory, image)
        try:
            with os.scandir(directory) as entries:
                return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _require_inside(self, path: str, image: str) -> None:
        real_path = os.path.realpath(path)
        if real_path != self._real_path and not real_path.startswith(self._real_path.rstrip(os.sep) + os.sep):
            raise DataError(
                f"image {image!r} lies outside image_folder {self.path!r} (at {real_path!r}); "
                "choose an image_folder that holds all images."
            )


def _read_json(path: str) -> Iterable[object]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise DataError(f"{path!r}: cannot be read ({error.strerror}); check data.path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    if text.lstrip()[:1] == "[":
        return _decode(text, path, 1)
    lines = enumerate(text.split("\n"), start=1)
    return [_decode(line, path, number) for number, line in lines if line.strip()]


def _decode(text: str, path: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}:{error.colno}: broken JSON ({error.msg}); the file "
            "should be a list of records, or hold one record per line."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}:{first_line}: JSON that cannot be read ({error}).") from error
    except RecursionError as error:
        raise DataError(f"{path}:{first_line}: JSON nested too deeply to be read.") from error


def _parse_images(value: object, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise DataError(f"{name}: 'image' should be a path or a list of paths, not {value!r}.")
    return tuple(images)


def _parse_turns(value: object, name: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: 'conversations' should be a list of turns, not {_json_type(value)}.")
    turns = [_parse_turn(turn, f"{name}, turn {index}") for index, turn in enumerate(value)]
    start = 1 if turns[0][0] == "gpt" else 0
    for index, (role, _) in enumerate(turns[start:]):
        if role != ROLES[index % 2]:
            raise DataError(
                f"{name}, turn {start + index}: comes from {role!r} where {ROLES[index % 2]!r} should speak; "
                "turns alternate between 'human' and 'gpt'."
            )
    return tuple(turns[start:])


def _parse_turn(value: object, name: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{name}: should be an object with 'from' and 'value', not {_json_type(value)}.")
    role, text = value.get("from"), value.get("value")
    if role not in ROLES:
        raise DataError(f"{name}: 'from' should be 'human' or 'gpt', not {role!r}.")
    if not isinstance(text, str):
        raise DataError(f"{name}: 'value' should be text, not {_json_type(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: 'value' has half a surrogate pair at character {error.start}; remove it."
        ) from error
    return role, text


def _json_type(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
