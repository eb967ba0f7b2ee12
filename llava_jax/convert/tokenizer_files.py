"""Which files make a tokenizer, where they lie and how they are copied."""

import shutil
from pathlib import Path

from llava_jax.convert.json_files import read_json

# One of the first two is the vocabulary; the rest say how it is used.
_VOCABULARIES = ("tokenizer.model", "tokenizer.json")
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def find_tokenizer(directory: Path) -> str:
    """The directory itself if it holds a tokenizer, else ""."""
    return str(directory) if any((directory / name).exists() for name in _VOCABULARIES) else ""


def is_legacy(directory: Path) -> bool:
    """Whether Llama's tokenizer puts a space behind every special token, as before 2023's correction.

    A tokenizer_config.json that does not say means yes, none at all means no: a bare Vicuna v1.5.
    """
    file = directory / "tokenizer_config.json"
    return file.exists() and read_json(file).get("legacy") is not False


def copy_tokenizer(tokenizer_path: str, directory: Path) -> None:
    """Copies a tokenizer (a directory, or one of its vocabulary files with the settings beside it)."""
    if not tokenizer_path:
        return
    source = Path(tokenizer_path)
    if source.is_file():
        name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(source, directory / name)
        source, names = source.parent, _SETTINGS
    else:
        names = _VOCABULARIES + _SETTINGS
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
