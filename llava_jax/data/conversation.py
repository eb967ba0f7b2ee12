"""Turns conversations into token ids and labels: templates as data, one renderer, one masker."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError

IGNORE = -100  # the label of what is not learnt
IMAGE_TOKEN = -200  # the id of one image placeholder; no tokenizer has it
PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True)
class Speaker:
    """How one side's turn is written: `name`, then, unless the text is empty, `before` + text + `after`.

    An assistant's turn is learnt from `before` to the end of `after`.
    """

    name: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written out."""

    system: str
    human: Speaker
    assistant: Speaker
    caption_only: bool = False  # one picture, one caption: what the human asks is not written


_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
_V1 = Template(_SYSTEM.format("user"), Speaker("USER:", " ", " "), Speaker("ASSISTANT:", " ", "</s>"))
_PLAIN = Template("", Speaker("", "", ""), Speaker("", "", "\n"), caption_only=True)

TEMPLATES = {
    "v1": _V1,
    "vicuna_v1": _V1,
    "llava_v1": dataclasses.replace(_V1, system=_SYSTEM.format("human")),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
}


def get_template(name: str) -> Template:
    """The template of that name; raises DataError listing the known ones."""
    if name not in TEMPLATES:
        raise DataError(f"data.template={name!r} is not known; choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def tokenize(
    turns: Sequence[tuple[str, str]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    num_images: int,
    image_markers: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Writes a conversation as tokens, with labels on what the assistant said and on its end.

    turns: (role, text) with roles human, gpt, human, ... A placeholder `<image>` becomes one IMAGE_TOKEN;
    in a chat without images it is ordinary text, as in the original. `image_markers` puts `<im_start>` and
    `<im_end>` around every placeholder.

    -> tokens int32[T], labels int32[T]; labels are the tokens, IGNORE where nothing is learnt and at images.
    Raises DataError for a conversation that does not fit the template or has nothing to learn.
    """
    segments = render(turns, template, num_images=num_images, image_markers=image_markers)
    tokens, begins, ends = _encode(
        "".join(text for text, _ in segments), tokenizer, split_images=num_images > 0 or template.caption_only
    )
    labels = np.full_like(tokens, IGNORE)
    position = 0
    for text, learnt in segments:
        begin, position = position, position + tokenizer.num_bytes(text)
        if learnt:
            # A space that the tokenizer adds has no width and belongs to the text behind it.
            spoken = (begins < position) & (np.maximum(ends, begins + 1) > begin) & (tokens != IMAGE_TOKEN)
            labels[spoken] = tokens[spoken]
    if (labels == IGNORE).all():
        raise DataError("there is nothing to learn: the assistant says nothing.")
    return tokens, labels


def render(
    turns: Sequence[tuple[str, str]], template: Template, *, num_images: int, image_markers: bool = False
) -> list[tuple[str, bool]]:
    """Writes a conversation as pieces of text, each with whether it is to be learnt."""
    if num_images == 1:
        turns = [(role, _image_first(text)) for role, text in turns]
    if image_markers and num_images:
        marked = f"<im_start>{PLACEHOLDER}<im_end>"
        turns = [(role, text.replace(PLACEHOLDER, marked)) for role, text in turns]
    if template.caption_only:
        return _render_caption(turns, template, num_images)
    segments = [(template.system, False)]
    for role, text in turns:
        speaker = template.assistant if role == "gpt" else template.human
        segments.append((speaker.name, False))
        if text:
            segments.append((speaker.before + text + speaker.after, role == "gpt"))
    return segments


def render_prompt(question: str, template: Template, tokenizer: Tokenizer, *, num_images: int) -> np.ndarray:
    """Writes a question so that the assistant's answer comes next -> tokens int32[T].

    Placeholders are placed as in training. A question without any gets each on a line of its own in front.
    Raises DataError if their number is not `num_images`.
    """
    if num_images and PLACEHOLDER not in question:
        question = f"{PLACEHOLDER}\n" * num_images + question
    if num_images == 1:
        question = _image_first(question)
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise DataError("the question holds half of a surrogate pair, which is no character.")
    found = question.count(PLACEHOLDER)
    if found != num_images:
        raise DataError(f"the question has {found} {PLACEHOLDER} for {num_images} images: {question[:60]!r}.")
    human = template.human
    asked = human.name + human.before + question + human.after
    if template.caption_only:
        asked = PLACEHOLDER * num_images
    text = template.system + asked + template.assistant.name
    return _encode(text, tokenizer, split_images=num_images > 0)[0]


def expand_images(
    tokens: np.ndarray, labels: np.ndarray, num_image_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Repeats every placeholder `num_image_tokens` times: tokens, labels int32[T] -> int32[T'] each."""
    copies = np.where(tokens == IMAGE_TOKEN, num_image_tokens, 1)
    return tokens.repeat(copies), labels.repeat(copies)


def truncate(
    tokens: np.ndarray, labels: np.ndarray, max_length: int, num_image_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts expanded tokens and labels int32[T] to `max_length`.

    Raises DataError where that would cut or drop an image.
    """
    num_kept = np.count_nonzero(tokens[:max_length] == IMAGE_TOKEN)
    if num_kept != np.count_nonzero(tokens == IMAGE_TOKEN):
        raise DataError(
            f"of its {len(tokens)} tokens an image ends behind data.max_length={max_length}; raise that (an "
            f"image takes {num_image_tokens} tokens) or shorten the conversation."
        )
    return tokens[:max_length], labels[:max_length]


def _image_first(text: str) -> str:
    """Moves a turn's placeholder to its front, as the original does; several become one."""
    if PLACEHOLDER not in text:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def _render_caption(
    turns: Sequence[tuple[str, str]], template: Template, num_images: int
) -> list[tuple[str, bool]]:
    if len(turns) != 2 or PLACEHOLDER not in turns[0][1]:
        raise DataError(
            f"a caption template takes two turns, a question with {PLACEHOLDER} and its caption; for other "
            "conversations choose a chat template such as data.template='v1'."
        )
    caption = template.assistant.before + turns[1][1] + template.assistant.after
    return [(PLACEHOLDER * max(num_images, 1), False), (caption, True)]


def _encode(
    text: str, tokenizer: Tokenizer, *, split_images: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text -> tokens, begins and ends int32[T]: the bytes of text that each token spells, from and to.

    The original tokenizes what lies between placeholders separately, so each part is a text of its own.
    """
    tokens, begins, ends = [tokenizer.bos_id], [-1], [-1]
    position = 0
    for index, part in enumerate(text.split(PLACEHOLDER) if split_images else [text]):
        if index:
            tokens.append(IMAGE_TOKEN)
            begins.append(position)
            position += len(PLACEHOLDER)
            ends.append(position)
        part_tokens, part_ends = tokenizer.encode_with_ends(part)
        part_ends = [position + end for end in part_ends]
        tokens += part_tokens
        begins += [position, *part_ends[:-1]] if part_ends else []
        ends += part_ends
        position += tokenizer.num_bytes(part)
    return np.array(tokens, np.int32), np.array(begins, np.int32), np.array(ends, np.int32)
