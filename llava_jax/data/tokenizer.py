"""What the data needs of a tokenizer, and how one is loaded."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from llava_jax.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """Text to token ids and back. Special strings such as `</s>` become one token wherever they stand."""

    path: str  # the vocabulary's file
    fingerprint: str  # hex digest of all that ids depend on
    legacy: bool  # Llama's first tokenizers, which put a space behind every special string
    bos_id: int | None  # None: texts begin without one
    eos_id: int
    pad_id: int | None
    vocab_size: int  # all ids are below it

    def encode(self, text: str) -> list[int]:
        """text -> ids, without a beginning or an end of sequence."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """text -> ids and, for each, how many bytes of `text` it and those before it spell.

        The last one's is `num_bytes(text)`. What the tokenizer adds itself, such as a space in front, takes none.
        """

    def num_bytes(self, text: str) -> int:
        """The length of text in UTF-8."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """ids -> text, without the space that the tokenizer adds in front."""

    def special_id(self, token: str) -> int | None:
        """The id of a special string; None where it would be tokenized as ordinary text."""


def load_tokenizer(path: str, extra_tokens: Sequence[str] = ()) -> Tokenizer:
    """Loads `tokenizer.model` or `tokenizer.json`, given as a file or as the directory that holds it.

    A directory with both is read from tokenizer.model, as the original does. `extra_tokens` are special strings to
    add behind the vocabulary; where the files beside it give ids to all of them, these hold. Settings are read from
    the tokenizer_config.json beside the file. For a tokenizer.model without it, `legacy` is False, as in Vicuna
    v1.5; a file that does not say means True, as HF reads it. Raises DataError for files that cannot be used.
    """
    file = _find(path)
    beside = os.path.dirname(file)
    settings = _read_object(os.path.join(beside, "tokenizer_config.json"))
    with open(file, "rb") as stream:
        vocabulary = stream.read()
    if file.endswith(".json"):
        from llava_jax.data.tokenizer_json import (
            JsonTokenizer,
        )  # takes `tokenizers`, which not everybody needs

        names = _read_object(os.path.join(beside, "special_tokens_map.json"))
        return JsonTokenizer(file, vocabulary, (names or {}) | (settings or {}), extra_tokens)
    added = added_tokens(beside, settings or {})
    if extra_tokens and added.keys() >= set(extra_tokens):
        extra_tokens = list(added)[: 1 + max(list(added).index(token) for token in extra_tokens)]
    tokenizer = SentencePieceTokenizer(
        file,
        vocabulary,
        legacy=settings is not None and settings.get("legacy") is not False,
        add_bos=settings is None or settings.get("add_bos_token") is not False,
        extra_tokens=extra_tokens,
    )
    for token in extra_tokens:
        if added.get(token) not in (None, tokenizer.special_id(token)):
            raise DataError(
                f"{beside}: gives {token} the id {added[token]}, but added tokens follow the {file} and each other, which "
                f"makes it {tokenizer.special_id(token)}; correct added_tokens.json and tokenizer_config.json."
            )
    return tokenizer


def added_tokens(directory: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that a directory adds to its tokenizer.model, in the order of their ids.

    settings: what its tokenizer_config.json says.
    """
    decoder = settings.get("added_tokens_decoder") or {}
    ids = {token["content"]: int(id) for id, token in decoder.items()}
    ids |= _read_object(os.path.join(directory, "added_tokens.json")) or {}
    own = ("<unk>", "<s>", "</s>")  # which Llama's files list too
    return {token: id for token, id in sorted(ids.items(), key=lambda item: item[1]) if token not in own}


def require_room(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError if a model's embedding has fewer rows than the tokenizer has tokens."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model's embedding only "
            f"model.text.vocab_size={vocab_size}; use the tokenizer that belongs to the decoder, or add "
            f"--config.model.text.vocab_size={tokenizer.vocab_size} for new rows, which start as the mean of the others."
        )


def require_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Raises ConfigError if one of the special tokens would be tokenized as ordinary text."""
    for token in tokens:
        if tokenizer.special_id(token) is None:
            raise ConfigError(
                f"The tokenizer {tokenizer.path} was loaded without {token}, which model.use_im_start_end or "
                "model.use_im_patch_token asks for."
            )


def _find(path: str) -> str:
    names = ("tokenizer.model", "tokenizer.json")
    files = [os.path.join(path, name) for name in names] if os.path.isdir(path) else [path]
    file = next(filter(os.path.isfile, files), None)
    if file is None:
        raise DataError(
            f"{path}: holds no tokenizer.model or tokenizer.json; set init.tokenizer to such a file or to its directory."
        )
    return file


def _read_object(path: str) -> dict[str, Any] | None:
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except ValueError as error:
        raise DataError(f"{path}: is not a JSON object ({error}).") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}: is not a JSON object (it holds {type(fields).__name__}).")
    return fields
