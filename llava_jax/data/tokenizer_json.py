"""Tokenizers in Hugging Face's tokenizer.json, such as those of Llama 3 and Qwen2."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from llava_jax.errors import DataError

# What these tokens are called where no settings say so. A base model's end comes before a chat's: templates
# name the latter themselves.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<eos>")


class JsonTokenizer:
    """Text to token ids and back, as the `tokenizers` library does it, without its post-processor."""

    legacy = False  # the file itself says where spaces are added

    def __init__(
        self, path: str, content: bytes, settings: Mapping[str, Any], extra_tokens: Sequence[str] = ()
    ):
        """Builds from a tokenizer.json and the fields of tokenizer_config.json.

        `extra_tokens` that it does not have yet get ids behind its vocabulary.
        """
        self.path = path
        self._arguments = (path, content, dict(settings), tuple(extra_tokens))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"{path}: is not a tokenizer.json ({error}).") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in extra_tokens]
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items()}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_id = self._named("eos_token", settings, _EOS_NAMES)
        if self.eos_id is None:
            raise DataError(
                f"{path}: has no token that ends a text; name it in tokenizer_config.json, 'eos_token'."
            )
        self.bos_id = self._bos(settings)
        self.pad_id = self._named("pad_token", settings, ())
        about = json.dumps([self.bos_id, self.eos_id, *extra_tokens])
        self.fingerprint = hashlib.sha256(content + about.encode()).hexdigest()

    def __reduce__(self):
        return JsonTokenizer, self._arguments

    def encode(self, text: str) -> list[int]:
        """text -> ids, without a beginning or an end of sequence."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """text -> ids and, for each, how many bytes of `text` it and those before it spell.

        Several tokens may spell one character: its bytes are then counted for the last of them.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return [], []
        begins, ends = zip(*encoding.offsets, strict=True)
        # Up to where the next token begins, so that tokens of one character stay together.
        ends = [min(end, begin) for end, begin in zip(ends, begins[1:], strict=False)]
        ends = [*itertools.accumulate(ends, max), len(text)]
        if not text.isascii():
            sizes = (len(character.encode()) for character in text)
            bytes_before = list(itertools.accumulate(sizes, initial=0))
            ends = [bytes_before[end] for end in ends]
        return encoding.ids, ends

    def num_bytes(self, text: str) -> int:
        """The length of text in UTF-8."""
        return len(text) if text.isascii() else len(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """ids -> text, without the space that the tokenizer adds in front."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def special_id(self, token: str) -> int | None:
        """The id of a special string; None where it would be tokenized as ordinary text."""
        return self._special.get(token)

    def _bos(self, settings: Mapping[str, Any]) -> int | None:
        """What a text begins with: as `add_bos_token` says, else as the file's post-processor does it."""
        bos = self._named("bos_token", settings, _BOS_NAMES)
        begins = self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos]
        return bos if settings.get("add_bos_token", begins) else None

    def _named(self, key: str, settings: Mapping[str, Any], known: Sequence[str]) -> int | None:
        """The id of a token by its role: the settings name it, or else it is the first known one there is."""
        if key in settings:
            token = settings[key]
            token = token["content"] if isinstance(token, dict) else token
            if token is None:
                return None
            if (id := self._tokenizer.token_to_id(token)) is None:
                raise DataError(
                    f"{self.path}: has no {token!r}, which tokenizer_config.json names as {key!r}."
                )
            return id
        return next((self._special[name] for name in known if name in self._special), None)
