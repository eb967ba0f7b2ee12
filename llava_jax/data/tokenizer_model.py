"""Llama's sentencepiece tokenizer, with the seams around special strings that LLaVA was trained on."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence

import sentencepiece

from llava_jax.errors import DataError

SPACE = "\u2581"  # how sentencepiece spells a space
# A serialized ModelProto whose normalizer_spec.add_dummy_prefix is false. Serialized messages that are
# concatenated merge, so behind a model it switches the prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_WORDS_KEPT = 1 << 16  # at most about 100 MB, most often 20
_LONGEST_KEPT = 32  # characters; longer words seldom come again


class SentencePieceTokenizer:
    """Text to token ids and back, equal to HF's slow LlamaTokenizer 4.37.

    Special strings such as `</s>` are split off first and the text between them is encoded piece by piece.
    The original tokenizers put a space before every such piece (`legacy`); corrected ones, Vicuna v1.5
    among them, before the first only.
    """

    def __init__(
        self,
        path: str,
        model: bytes,
        *,
        legacy: bool = False,
        add_bos: bool = True,
        extra_tokens: Sequence[str] = (),
    ):
        """Builds from a serialized sentencepiece model; `extra_tokens` get the ids behind its vocabulary."""
        self.path = path
        self.legacy = legacy
        self._arguments = (path, model, legacy, add_bos, tuple(extra_tokens))
        settings = json.dumps([legacy, *extra_tokens] if add_bos else [legacy, add_bos, *extra_tokens])
        self.fingerprint = hashlib.sha256(model + settings.encode()).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise DataError(f"{path}: is not a sentencepiece model ({error}).") from error
        bos, self.eos_id, unk = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        if min(bos, self.eos_id) < 0:
            raise DataError(f"{path}: has no <s> or </s>; this is not the tokenizer of a Llama-like model.")
        self.bos_id = bos if add_bos else None
        size = self._model.vocab_size()
        self.vocab_size = size + len(extra_tokens)
        self._special = {self._model.id_to_piece(id): id for id in (bos, self.eos_id, unk)}
        self._special |= {token: size + index for index, token in enumerate(extra_tokens)}
        self._names = {id: token for token, id in self._special.items()}
        self.pad_id = self._special.get("[PAD]", unk)  # the original's --version v0 adds a [PAD]
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._find_words = re.compile(self._word()).findall
        self._words = _Words(self._encode_word)

    def __reduce__(self):
        path, model, legacy, add_bos, extra_tokens = self._arguments
        how = {"legacy": legacy, "add_bos": add_bos, "extra_tokens": extra_tokens}
        return functools.partial(SentencePieceTokenizer, path, model, **how), ()

    def encode(self, text: str) -> list[int]:
        """text -> ids, without `<s>` in front."""
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """text -> ids and, for each, how many bytes of `text` it and those before it spell.

        Bytes are counted as `num_bytes` does. The space that the tokenizer adds in front takes none.
        """
        ids, sizes = [], []
        for index, part in enumerate(self._split(text.replace(SPACE, " "))):
            if index % 2:
                ids.append(self._special[part])
                sizes.append(len(part.encode()))
            elif part:
                prefixed = self.legacy or not ids
                first = len(ids)
                words = self._find_words(" " + part if prefixed else part)
                for word_ids, word_sizes in map(self._words.__getitem__, words):
                    ids += word_ids
                    sizes += word_sizes
                sizes[first] -= prefixed
        return ids, list(itertools.accumulate(sizes))

    def num_bytes(self, text: str) -> int:
        """The length of text in UTF-8, where the sentencepiece space counts as the space it is read as."""
        return len(text) if text.isascii() else len(text.replace(SPACE, " ").encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """ids -> text, without the space that the tokenizer adds in front."""
        names = self._names
        if skip_special_tokens:
            ids = [id for id in ids if id not in names]
        parts = []
        for special, run in itertools.groupby(ids, names.__contains__):
            if special:
                parts += [names[id] for id in run]
                continue
            text = self._model.decode([int(id) for id in run])
            parts.append(text.removeprefix(" ") if self.legacy or not parts else text)
        return "".join(parts)

    def special_id(self, token: str) -> int | None:
        """The id of a special string; None where it would be tokenized as ordinary text."""
        return self._special.get(token)

    def _word(self) -> str:
        """The pattern of what can be encoded alone: no token reaches from a word into the next, or has a newline."""
        pieces = self._model.id_to_piece(list(range(self._model.vocab_size())))
        crossing = any(SPACE in piece.lstrip(SPACE) or "\n" in piece for piece in pieces)
        return r"(?s:.+)" if crossing else r" *[^ \n]+| +|\n"

    def _encode_word(self, word: str) -> tuple[list[int], list[int]]:
        """A word with the spaces in front of it -> ids and how many bytes each spells."""
        ids = self._model.encode(word)
        is_byte, pieces = self._model.is_byte(ids), self._model.id_to_piece(ids)
        sizes = [1 if byte else self.num_bytes(piece) for byte, piece in zip(is_byte, pieces, strict=True)]
        if sum(sizes) != self.num_bytes(word):
            raise DataError(
                f"{self.path}: tokens do not spell the text {word[:40]!r}; only models like Llama's are "
                "supported, without a normalizer and with bytes for unknown characters."
            )
        return ids, sizes


class _Words(dict):
    """What words are encoded to, kept for when they come again: text has few words, and each often."""

    def __init__(self, encode: Callable[[str], tuple[list[int], list[int]]]):
        self._encode = encode

    def __missing__(self, word: str) -> tuple[list[int], list[int]]:
        encoded = self._encode(word)
        if len(word) <= _LONGEST_KEPT and len(self) < _WORDS_KEPT:
            self[word] = encoded
        return encoded
