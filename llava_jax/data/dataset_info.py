"""LLaMA-Factory's dataset_info.json: data sets by name, with their files and formats."""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable

from llava_jax.data.formats import FORMATS, Format, json_type
from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset of `dataset_info.json`."""

    name: str
    path: str
    format: Format
    num_samples: int | None
    image_folder: str | None  # None: where the setting says


_ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "image_folder", "media_dir")
_UNSUPPORTED = {
    "hf_hub_url": "download from a hub",
    "ms_hub_url": "download from a hub",
    "om_hub_url": "download from a hub",
    "script_url": "loading scripts",
    "cloud_file_name": "cloud storage",
    "subset": "datasets of a hub",
    "split": "datasets of a hub",
    "folder": "datasets of a hub",
    "ranking": "preference data",
    "tools": "the use of tools",
    "audios": "audio",
    "chosen": "preference data",
    "rejected": "preference data",
    "kto_tag": "preference data",
}


def read_dataset_info(folder: str, names: Iterable[str], setting: str = "data.dataset") -> list[Entry]:
    """Looks datasets up in the `dataset_info.json` of a folder, as LLaMA-Factory names them.

    Paths in it are relative to the folder. Raises ConfigError for names that it lacks, which `setting` gives, and
    for what it asks for and is not supported.
    """
    path = os.path.join(folder, "dataset_info.json")
    info = _read_object(path)
    entries = []
    for name in names:
        if name not in info:
            near = difflib.get_close_matches(name, info, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(info)) or 'none'}."
            raise ConfigError(f"{setting}={name!r} is not in {path}. {hint}")
        entries.append(_parse_entry(folder, name, info[name], f"{path}: {name!r}"))
    return entries


def _read_object(path: str) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except OSError as error:
        raise ConfigError(f"{path!r}: cannot be read ({error.strerror}); check data.dataset_dir.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: broken JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: should be an object of dataset names, not {json_type(value)}.")
    return value


def _parse_entry(folder: str, name: str, value: object, where: str) -> Entry:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} should be an object with 'file_name', not {json_type(value)}.")
    _require_known(value, _ENTRY_KEYS, where)
    file_name, count = value.get("file_name"), value.get("num_samples")
    if not isinstance(file_name, str) or not file_name:
        raise ConfigError(f"{where}: 'file_name' should be the path of a JSON file, not {file_name!r}.")
    if count is not None and (type(count) is not int or count < 1):
        raise ConfigError(f"{where}: 'num_samples' should be a positive whole number, not {count!r}.")
    images = value.get("image_folder", value.get("media_dir"))
    if "image_folder" in value and "media_dir" in value:
        raise ConfigError(f"{where}: 'image_folder' and 'media_dir' mean the same; keep one.")
    if images is not None and not isinstance(images, str):
        raise ConfigError(f"{where}: 'image_folder' should be a path, not {images!r}.")
    return Entry(
        name,
        os.path.join(folder, file_name),
        _parse_format(value, where),
        count,
        None if images is None else os.path.join(folder, images),
    )


def _parse_format(value: dict, where: str) -> Format:
    formatting = value.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in FORMATS:
        raise ConfigError(
            f"{where}: formatting {formatting!r} is not one of {', '.join(map(repr, FORMATS))}."
        )
    base = FORMATS[formatting]
    keys = [field.name for field in dataclasses.fields(base)]
    columns, tags = (_parse_names(value, section, where) for section in ("columns", "tags"))
    _require_known(columns, [key for key in keys if not key.endswith("_tag")], f"{where}, columns")
    _require_known(tags, [key for key in keys if key.endswith("_tag")], f"{where}, tags")
    return dataclasses.replace(base, **columns, **tags)


def _parse_names(value: dict, section: str, where: str) -> dict[str, str]:
    names = value.get(section, {})
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise ConfigError(f"{where}: {section!r} should be an object of names, not {names!r}.")
    return names


def _require_known(given: dict, known: Iterable[str], where: str) -> None:
    for key, value in given.items():
        if key in _UNSUPPORTED and value not in (None, False):
            raise ConfigError(f"{where}: {key!r} asks for {_UNSUPPORTED[key]}, which is not supported.")
        if key not in known and key not in _UNSUPPORTED:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
            raise ConfigError(f"{where}: unknown key {key!r}. {hint}")
