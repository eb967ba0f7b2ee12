"""Labels exactly as the original masks them, its accidents included; they serve to reproduce its runs.

The original tokenizes pieces of the text once more and counts: see preprocess_* in llava/train/train.py.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.errors import ConfigError

Encode = Callable[[str], Sequence[int]]  # text -> ids as in a whole conversation, BOS and images included


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """How the original finds the rounds of a chat, and what it takes their tokens to be."""

    end: str  # of a round
    answer: str  # is in front of every answer
    first: int  # tokens before the first round
    merged: int  # of the tokens up to the answer, how many belong to it or were counted before
    later_if_legacy: int  # tokens that rounds behind the first have more than when they stand alone
    later: int


_ROUNDS = {
    "v1": _Rounds("</s>", " ASSISTANT: ", first=1, merged=2, later_if_legacy=0, later=-1),
    "llama_2": _Rounds("</s>", "[/INST] ", first=1, merged=2, later_if_legacy=0, later=0),
    "mpt": _Rounds(
        "<|im_end|>", "<|im_end|><|im_start|>assistant\n", first=0, merged=1, later_if_legacy=1, later=0
    ),
}


def learnt_by_original(
    spans: Sequence[tuple[str, bool]],
    tokens: np.ndarray,
    mask: str,
    encode: Encode,
    *,
    has_image: bool,
    legacy: bool,
    pad_id: int | None,
    max_length: int | None,
) -> np.ndarray:
    """Which tokens int32[T] the original learns -> bool[T].

    spans: the conversation's text in pieces, each with whether the template says that it is learnt.
    Conversations without an image are masked as cut to `max_length`; nothing behind it is learnt.
    """
    if not mask:
        raise ConfigError(
            "data.mask='original' needs a data.template that the original had; choose data.mask='assistant'."
        )
    learnt = np.ones(len(tokens), bool)
    if mask == "plain":
        learnt[: len(encode(spans[0][0]))] = False
        return learnt
    limit = None if has_image else max_length
    learnt[len(tokens[:limit]) :] = False
    if mask == "v0":
        _mask_turns(learnt[:limit], spans, lambda text: _length(encode(text), limit, pad_id, has_image))
        return learnt
    text = "".join(text for text, _ in spans)
    position = _mask_rounds(learnt[:limit], text, _ROUNDS[mask], encode, legacy)
    mismatch = position != np.count_nonzero(tokens[:limit] != pad_id)
    if mismatch and (max_length is None or position < max_length):
        learnt[:] = False  # "tokenization mismatch (ignored)"
    return learnt


def _mask_rounds(learnt: np.ndarray, text: str, rounds: _Rounds, encode: Encode, legacy: bool) -> int:
    """Masks, round after round, what stands in front of the answer -> where the last round should end."""
    position = rounds.first
    learnt[:position] = False
    for index, part in enumerate(_split(text, rounds)):
        pieces = part.split(rounds.answer)
        if len(pieces) != 2:
            break
        later = (rounds.later_if_legacy if legacy else rounds.later) if index else 0
        asked = len(encode(pieces[0] + rounds.answer)) - rounds.merged + later
        learnt[position : position + asked] = False
        position += len(encode(part)) + later
    learnt[position:] = False
    return position


def _split(text: str, rounds: _Rounds) -> list[str]:
    """The rounds, without the marks between them."""
    parts = text.split(rounds.end)
    if rounds.first == 0:  # the mark ends every turn: system, question and answer, then question and answer
        bounds = [0, *range(3, len(parts), 2), len(parts)]
        parts = [rounds.end.join(parts[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return parts


def _mask_turns(learnt: np.ndarray, spans: Sequence[tuple[str, bool]], length: Callable[[str], int]) -> None:
    """Masks the system text, and of every question what stands behind its first two tokens, the `###`."""
    position = length(spans[0][0])
    learnt[:position] = False
    turns: list[list[tuple[str, bool]]] = []
    for text, is_learnt in spans[1:]:
        if is_learnt and text.startswith("###"):
            turns.append([])
        turns[-1].append((text, is_learnt))
    for turn in turns:
        size = length("".join(text for text, _ in turn))
        if not all(is_learnt for _, is_learnt in turn):
            learnt[position + 2 : position + size] = False
        position += size


def _length(ids: Sequence[int], limit: int | None, pad_id: int | None, has_image: bool) -> int:
    """Tokens of one turn; without images the original counts neither those behind the limit nor pads."""
    return len(ids) if has_image else sum(id != pad_id for id in ids[:limit])
