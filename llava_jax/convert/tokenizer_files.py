"""Which files make a tokenizer, where they lie and how they are copied."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava_jax.convert.json_files import read_json
from llava_jax.data.tokenizer import Tokenizer, added_tokens, load_tokenizer

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


def copy_tokenizer(tokenizer_path: str, directory: Path, extra_tokens: Sequence[str] = ()) -> None:
    """Copies a tokenizer (a directory, or one of its vocabulary files with the settings beside it).

    `extra_tokens`, if any, are added to its files, in place of those that others have added behind the vocabulary.
    """
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
    if extra_tokens:
        _add_tokens(directory, load_tokenizer(tokenizer_path, extra_tokens), extra_tokens)


def _add_tokens(directory: Path, tokenizer: Tokenizer, extra_tokens: Sequence[str]) -> None:
    ids = {token: tokenizer.special_id(token) for token in extra_tokens}
    if (directory / "tokenizer.json").exists():
        _add_to_json(directory / "tokenizer.json", ids)
    if not (directory / "tokenizer.model").exists():
        return
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    before = {
        token: id
        for token, id in added_tokens(str(directory), settings).items()
        if id < min(ids.values()) and tokenizer.special_id(token) == id
    }
    _write_json(directory / "added_tokens.json", before | ids)
    if "added_tokens_decoder" in settings:
        kept = {
            id: token
            for id, token in settings["added_tokens_decoder"].items()
            if token["content"] in ("<unk>", "<s>", "</s>", *before)
        }
        added = {str(id): _SPECIAL | {"content": token} for token, id in ids.items()}
        _write_json(file, settings | {"added_tokens_decoder": kept | added})


_SPECIAL = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def _add_to_json(file: Path, ids: dict[str, int]) -> None:
    """Adds tokens to a tokenizer.json. Beside a tokenizer.model one that would give them other ids is removed."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in ids]
    )
    if all(tokenizer.token_to_id(token) == id for token, id in ids.items()):
        tokenizer.save(str(file))
    elif file.with_name("tokenizer.model").exists():
        file.unlink()
