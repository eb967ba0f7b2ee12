"""Turns conversations into token ids and labels: one renderer, one masker."""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.data.original_masks import learnt_by_original
from llava_jax.data.templates import Template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError

IGNORE = -100  # the label of what is not learnt
IMAGE_TOKEN = -200  # the id of one image placeholder; no tokenizer has it
PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens. Labels are the tokens, IGNORE where nothing is learnt and at images."""

    tokens: np.ndarray  # int32[T]
    labels: np.ndarray  # int32[T]
    round_ends: np.ndarray  # int32[R]: the index just behind each answer, its end token included
    images: np.ndarray  # int32[M, 2]: each image's first index and the one behind its last


class Span(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    learnt: bool  # by data.mask="assistant"
    is_answer: bool = False


def tokenize(
    turns: Sequence[tuple[str, str]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    num_images: int,
    mask: str = "assistant",
    max_length: int | None = None,
    image_markers: bool = False,
    system: str | None = None,
) -> Encoded:
    """Writes a conversation as tokens, each image as one IMAGE_TOKEN, and labels what is learnt.

    turns: (role, text) with roles human, gpt, human, ... A placeholder `<image>` becomes one IMAGE_TOKEN;
    in a chat without images it is ordinary text, as in the original. `image_markers` puts `<im_start>` and
    `<im_end>` around every placeholder. system: in place of the template's system text.

    mask: what is learnt. "assistant": what the assistant says and its end; "last_answer": of that, the last
    answer; "everything": all text; "original": what the original learns, which may be nothing and depends
    on `max_length`, the length that it would cut to. Tokens are the same with all of them, and never cut.

    Raises DataError for a conversation that does not fit the template or, with the first two masks, in which the
    assistant says nothing; ConfigError for a tokenizer or a mask that does not fit the template.
    """
    template.check(tokenizer)
    spans = render(turns, template, num_images=num_images, image_markers=image_markers, system=system)
    encode = functools.partial(
        _encode, tokenizer=tokenizer, split_images=num_images > 0 or template.caption_only
    )
    tokens, ends = encode("".join(span.text for span in spans))
    learnt_spans = _learnt_spans(spans, ends, tokenizer)
    if mask == "original":
        learnt = learnt_by_original(
            [(span.text, span.learnt) for span in spans],
            tokens,
            template.original_mask,
            lambda text: encode(text)[0],
            has_image=num_images > 0,
            legacy=tokenizer.legacy,
            pad_id=tokenizer.pad_id,
            max_length=max_length,
        )
    else:
        learnt = _learnt(learnt_spans, len(tokens), mask)
    is_image = tokens == IMAGE_TOKEN
    (images,) = is_image.nonzero()
    return Encoded(
        tokens,
        np.where(learnt & ~is_image, tokens, np.int32(IGNORE)),
        np.array([end for _, end, is_answer in learnt_spans if is_answer], np.int32),
        np.array([images, images + 1], np.int32).T,
    )


def render(
    turns: Sequence[tuple[str, str]],
    template: Template,
    *,
    num_images: int,
    image_markers: bool = False,
    system: str | None = None,
) -> list[Span]:
    """Writes a conversation as pieces of text: the first is the system's, an answer and its end are one."""
    turns = _place_images(turns, template, num_images, image_markers)
    if template.caption_only:
        return _render_caption(turns, template, num_images)
    system = template.system if system is None else system
    if system:
        system = system.join(template.around_system)
    if template.system_in_question:
        turns, system = _put_into_question(system, turns), ""
    spans = [Span(system, False)]
    for index, (role, text) in enumerate(turns):
        answers = role == "gpt"
        speaker = template.assistant if answers else template.human
        if template.between_rounds and index and not answers and (speaker.name or text):
            spans.append(Span(template.between_rounds, False))
        if speaker.opening:
            spans.append(Span(speaker.opening, True))
        if speaker.name:
            spans.append(Span(speaker.name, False))
        if text or not template.skip_empty:
            spans.append(Span(speaker.before + text + speaker.after, answers, answers and bool(text)))
    return [*spans, Span(template.closing, True)] if template.closing else spans


def render_prompt(
    question: str,
    template: Template,
    tokenizer: Tokenizer,
    *,
    num_images: int,
    image_markers: bool = False,
    system: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> np.ndarray:
    """Writes a question so that the assistant's answer comes next -> tokens int32[T].

    All is written as in training, with every template. earlier: the turns before it, as for `tokenize`. Where no text
    has a placeholder, each gets a line of its own in front of the question. Raises DataError if their number is not
    `num_images`; without images a placeholder is text unless it `stands_for_an_image`.
    """
    template.check(tokenizer)
    for what, text in (("question", question), ("system text", system or "")):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"the {what} holds half of a surrogate pair, which is no character.")
    if PLACEHOLDER in (system or ""):
        raise DataError(f"the system text has {PLACEHOLDER}, which belongs into a question; take it out.")
    if num_images and not any(PLACEHOLDER in text for text in (question, *(text for _, text in earlier))):
        question = f"{PLACEHOLDER}\n" * num_images + question
    turns = [*earlier, ("human", question)]
    if num_images == 1:
        turns = [(role, _image_first(text)) for role, text in turns]
    found = sum(text.count(PLACEHOLDER) for _, text in turns)
    if found != num_images and (num_images or stands_for_an_image(question)):
        what = "conversation" if earlier else "question"
        raise DataError(
            f"the {what} has {found} {PLACEHOLDER} for {num_images} images: {question[:60]!r}. Give as many, or take it out."
        )
    if template.caption_only:
        text = PLACEHOLDER * num_images
    else:
        open_ended = dataclasses.replace(template, closing="")
        spans = render(
            turns,
            open_ended,
            num_images=num_images,
            image_markers=image_markers,
            system=system,
        )
        text = "".join(span.text for span in spans) + template.assistant.opening + template.assistant.name
    return _encode(text, tokenizer=tokenizer, split_images=num_images > 0)[0]


def stands_for_an_image(text: str) -> bool:
    """Whether a text without images begins or ends with a placeholder, so that its image was forgotten. Elsewhere a
    placeholder is an element of XML, say."""
    text = text.strip()
    return text.startswith(PLACEHOLDER) or text.endswith(PLACEHOLDER)


def tokenize_document(text: str, tokenizer: Tokenizer) -> Encoded:
    """Writes a text as tokens between the tokenizer's beginning, if it has one, and its end. All are learnt but the
    first, which nothing predicts."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    # Of a chat model's tokenizer the end is that of a turn; LLaMA-Factory too ends Llama 3's documents as its base does.
    end = tokenizer.special_id("<|end_of_text|>")
    tokens = np.array([*begin, *tokenizer.encode(text), tokenizer.eos_id if end is None else end], np.int32)
    labels = np.concatenate([[IGNORE], tokens[1:]]).astype(np.int32)
    return Encoded(tokens, labels, np.array([len(tokens)], np.int32), np.zeros((0, 2), np.int32))


def expand_images(encoded: Encoded, num_tokens: Sequence[int]) -> Encoded:
    """Repeats each image's placeholder; num_tokens: how often, for every image in order.

    Raises DataError if the text has more or fewer placeholders.
    """
    if len(encoded.images) != len(num_tokens):
        raise DataError(
            f"its text has {len(encoded.images)} {PLACEHOLDER} for {len(num_tokens)} images; write one for each."
        )
    copies = np.ones(len(encoded.tokens), np.int32)
    copies[encoded.images[:, 0]] = num_tokens
    moved = np.concatenate([[0], np.cumsum(copies)]).astype(np.int32)
    return Encoded(
        encoded.tokens.repeat(copies),
        encoded.labels.repeat(copies),
        moved[encoded.round_ends],
        moved[encoded.images],
    )


def truncate(encoded: Encoded, max_length: int, *, whole_turns: bool) -> tuple[Encoded, int]:
    """Cuts to at most `max_length` tokens -> what is left of it and how many of its images that holds.

    whole_turns: cuts behind the last answer that fits, if something is learnt up to there. Otherwise the cut
    is at `max_length`, or in front of an image that it would go through. What is left may teach nothing.
    """
    if len(encoded.tokens) <= max_length:
        return encoded, len(encoded.images)
    length = _whole_rounds(encoded, max_length) if whole_turns else 0
    begins, ends = encoded.images.T
    if not length:
        cut_through = begins[(begins < max_length) & (ends > max_length)]
        length = int(cut_through[0]) if len(cut_through) else max_length
    num_images = np.count_nonzero(ends <= length)
    cut = Encoded(
        encoded.tokens[:length],
        encoded.labels[:length],
        encoded.round_ends[encoded.round_ends <= length],
        encoded.images[:num_images],
    )
    return cut, num_images


def _whole_rounds(encoded: Encoded, max_length: int) -> int:
    """The length of the rounds that fit wholly; 0 if they teach nothing."""
    length = max(encoded.round_ends[encoded.round_ends <= max_length], default=0)
    return int(length) if (encoded.labels[:length] != IGNORE).any() else 0


def _place_images(
    turns: Sequence[tuple[str, str]], template: Template, num_images: int, image_markers: bool
) -> Sequence[tuple[str, str]]:
    """Writes placeholders where and how the original does; without images they are ordinary text."""
    if num_images == 1:
        turns = [(role, _image_first(text)) for role, text in turns]
    written = template.image
    if image_markers:
        written = written.replace(PLACEHOLDER, f"<im_start>{PLACEHOLDER}<im_end>")
    if num_images and written != PLACEHOLDER:
        turns = [(role, text.replace(PLACEHOLDER, written)) for role, text in turns]
    return turns


def _image_first(text: str) -> str:
    """Moves a turn's placeholder to its front, as the original does; several become one."""
    if PLACEHOLDER not in text:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def _put_into_question(system: str, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if turns and not turns[0][1]:
        raise DataError(
            "the first question is empty, which this template cannot write; ask something or use 'v1'."
        )
    return [(role, text if index else system + text) for index, (role, text) in enumerate(turns)]


def _render_caption(turns: Sequence[tuple[str, str]], template: Template, num_images: int) -> list[Span]:
    if len(turns) != 2 or PLACEHOLDER not in turns[0][1]:
        raise DataError(
            f"a caption template takes two turns, a question with {PLACEHOLDER} and its caption; for other "
            "conversations choose a chat template such as data.template='v1'."
        )
    caption = template.assistant.before + turns[1][1] + template.assistant.after
    return [Span(PLACEHOLDER * max(num_images, 1), False), Span(caption, True, is_answer=True)]


def _encode(text: str, *, tokenizer: Tokenizer, split_images: bool) -> tuple[np.ndarray, list[int]]:
    """text -> tokens int32[T] and, for each, how many bytes of the text it and those before it spell.

    The original tokenizes what lies between placeholders separately, so each part is a text of its own.
    """
    tokens, ends = ([], []) if tokenizer.bos_id is None else ([tokenizer.bos_id], [0])
    position = 0
    for index, part in enumerate(text.split(PLACEHOLDER) if split_images else [text]):
        if index:
            position += len(PLACEHOLDER)
            tokens.append(IMAGE_TOKEN)
            ends.append(position)
        part_tokens, part_ends = tokenizer.encode_with_ends(part)
        tokens += part_tokens
        ends += [position + end for end in part_ends] if position else part_ends
        position += tokenizer.num_bytes(part)
    return np.array(tokens, np.int32), ends


def _learnt_spans(
    spans: Sequence[Span], ends: list[int], tokenizer: Tokenizer
) -> list[tuple[int, int, bool]]:
    """The tokens of spans that are learnt: from and to, and whether it is an answer.

    These are all tokens that spell a part of the span. One that the tokenizer adds spells nothing and belongs to
    the text behind it.
    """
    found, end = [], 0
    for text, learnt, is_answer in spans:
        begin, end = end, end + tokenizer.num_bytes(text)
        if learnt:
            first = min(bisect.bisect_left(ends, begin) + 1, bisect.bisect_right(ends, begin))
            last = min(bisect.bisect_left(ends, end) + 1, len(ends))
            found.append((first, last, is_answer))
    return found


def _learnt(learnt_spans: Sequence[tuple[int, int, bool]], num_tokens: int, mask: str) -> np.ndarray:
    """Which tokens are learnt -> bool[T]; raises DataError if the assistant says nothing."""
    if mask == "everything":
        return np.arange(num_tokens) > 0  # nothing predicts the first
    answers = [index for index, (*_, is_answer) in enumerate(learnt_spans) if is_answer]
    if not answers:
        raise DataError("there is nothing to learn: the assistant says nothing.")
    learnt = np.zeros(num_tokens, bool)
    for first, last, _ in learnt_spans[answers[-1] if mask == "last_answer" else 0 :]:
        learnt[first:last] = True
    return learnt
