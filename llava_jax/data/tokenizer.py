"""Llama's sentencepiece tokenizer, with the seams around special strings that LLaVA was trained on."""

import hashlib
import json
import os
import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

from llava_jax.errors import DataError

SPACE = "\u2581"  # how sentencepiece spells a space
# A serialized ModelProto whose normalizer_spec.add_dummy_prefix is false. Serialized messages that are
# concatenated merge, so behind a model it switches the prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """Text to token ids and back, equal to HF's slow LlamaTokenizer 4.37.

    Special strings such as `</s>` are split off first and the text between them is encoded piece by piece.
    The original tokenizers put a space before every such piece (`legacy`); corrected ones, Vicuna v1.5
    among them, before the first only.
    """

    def __init__(self, path: str, model: bytes, *, legacy: bool = False, extra_tokens: Sequence[str] = ()):
        """Builds from a serialized sentencepiece model; `extra_tokens` get the ids behind its vocabulary."""
        self.path = path
        self.legacy = legacy
        self.fingerprint = hashlib.sha256(model + json.dumps([legacy, *extra_tokens]).encode()).hexdigest()
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
        later = model if legacy else model + _NO_DUMMY_PREFIX
        self._later = sentencepiece.SentencePieceProcessor(model_proto=later)
        self.bos_id, self.eos_id = self._first.bos_id(), self._first.eos_id()
        self.unk_id = self.pad_id = self._first.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: has no <s> or </s>; this is not the tokenizer of a Llama-like model.")
        self.vocab_size = self._first.vocab_size() + len(extra_tokens)
        self._special = {self._first.id_to_piece(id): id for id in (self.bos_id, self.eos_id, self.unk_id)}
        self._special |= {token: self._first.vocab_size() + index for index, token in enumerate(extra_tokens)}
        self._names = {id: token for token, id in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._piece_bytes = np.array([self._bytes_of(id) for id in range(self._first.vocab_size())], np.int32)

    def encode(self, text: str) -> list[int]:
        """text -> ids, without `<s>` in front."""
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """text -> ids and, for each, how many bytes of `text` it and those before it spell.

        Bytes are counted as `num_bytes` does. The space that the tokenizer adds in front takes none.
        """
        ids, ends = [], []
        for index, part in enumerate(self._split(text)):
            position = ends[-1] if ends else 0
            if index % 2:
                ids.append(self._special[part])
                ends.append(position + self.num_bytes(part))
            elif part:
                prefixed = self.legacy or not ids
                part_ids = (self._first if prefixed else self._later).encode(part)
                ends += (position + self._ends(part, part_ids, prefixed)).tolist()
                ids += part_ids
        return ids, ends

    def num_bytes(self, text: str) -> int:
        """The length of text in UTF-8, where the sentencepiece space counts as the space it is read as."""
        return len(text.replace(SPACE, " ").encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """ids -> text, without the space that the tokenizer adds in front."""
        names = self._names
        if skip_special_tokens:
            ids = [id for id in ids if id not in names]
        parts, run = [], []
        for id in ids:
            if id in names:
                parts += [self._later.decode(run), names[id]]
                run = []
            else:
                run.append(int(id))
        text = "".join(parts) + self._later.decode(run)
        return text.removeprefix(" ") if len(ids) and ids[0] not in names and not self.legacy else text

    def _ends(self, text: str, ids: list[int], prefixed: bool) -> np.ndarray:
        """Where each token of a text without special strings ends, in bytes of that text."""
        ends = np.cumsum(self._piece_bytes[ids]) - prefixed
        if ends[-1] != self.num_bytes(text):
            raise DataError(
                f"{self.path}: tokens do not spell the text {text[:40]!r}; only models like Llama's are "
                "supported, without a normalizer and with bytes for unknown characters."
            )
        return ends

    def _bytes_of(self, id: int) -> int:
        return 1 if self._first.is_byte(id) else self.num_bytes(self._first.id_to_piece(id))


def load_tokenizer(path: str, *, extra_tokens: Sequence[str] = ()) -> Tokenizer:
    """Loads `tokenizer.model`, given as a file or as the directory that holds it.

    `legacy` is read from a tokenizer_config.json beside it. Without that file it is False, as in Vicuna
    v1.5; a file that does not say means True, as HF reads it.
    """
    file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(
            f"{path}: holds no tokenizer.model; set init.tokenizer to that file or to its directory "
            "(tokenizer.json is not supported yet)."
        )
    with open(file, "rb") as stream:
        model = stream.read()
    try:
        return Tokenizer(file, model, legacy=_legacy(os.path.dirname(file)), extra_tokens=extra_tokens)
    except RuntimeError as error:
        raise DataError(f"{file}: is not a sentencepiece model ({error}).") from error


def _legacy(directory: str) -> bool:
    path = os.path.join(directory, "tokenizer_config.json")
    if not os.path.exists(path):
        return False
    try:
        with open(path, encoding="utf-8") as file:
            legacy = json.load(file).get("legacy")
    except (json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"{path}: is not a JSON object ({error}).") from error
    return True if legacy is None else legacy
