"""What an evaluation asks: a conversation up to its last answer, which is kept to compare with."""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_jax.data.conversation import IGNORE, PLACEHOLDER, render, tokenize
from llava_jax.data.dataset import Dataset
from llava_jax.data.image_processor import ImageLayout, ImageProcessor
from llava_jax.data.records import Record
from llava_jax.data.templates import Template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt that awaits an answer. tokens int32[T], one IMAGE_TOKEN per image."""

    name: str  # for people: which record it is
    prompt: str  # as it is written, `<image>` where images are
    asked: str  # what is asked last
    reference: str  # the answer that the data gives
    tokens: np.ndarray
    images: tuple[str, ...]  # files
    is_frame: tuple[bool, ...]
    layouts: tuple[ImageLayout, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt, image placeholders included."""
        return len(self.tokens) + sum(len(layout.feature_ids) - 1 for layout in self.layouts)

    @property
    def num_tiles(self) -> int:
        return sum(layout.num_tiles for layout in self.layouts)

    def read(self, processor: ImageProcessor) -> list[np.ndarray]:
        """The pixels of each image, uint8[tiles, H, W, 3]. Raises DataError naming the record."""
        try:
            return [
                processor.read(path, is_frame=is_frame)
                for path, is_frame in zip(self.images, self.is_frame, strict=True)
            ]
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error


def make_questions(
    dataset: Dataset,
    ids: Iterable[int],
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    max_length: int,
) -> tuple[list[Question], list[str]]:
    """Asks for the last answer of each sample whose prompt takes at most `max_length` tokens.

    -> questions, and for each sample that cannot be asked what is wrong with it.
    """
    questions, problems = [], []
    for id in ids:
        try:
            questions.append(_ask(dataset, id, template, tokenizer, processor, max_length))
        except DataError as error:
            problems.append(str(error))
    return questions, problems


def readable(questions: Sequence[Question], processor: ImageProcessor) -> tuple[list[Question], list[str]]:
    """Reads all images -> the questions whose images can be read, and what is wrong with the others."""

    def problem(question: Question) -> str | None:
        try:
            question.read(processor)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(problem, questions))
    kept = [question for question, wrong in zip(questions, found, strict=True) if wrong is None]
    return kept, [wrong for wrong in found if wrong is not None]


def _ask(
    dataset: Dataset,
    id: int,
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    max_length: int,
) -> Question:
    record, folder = dataset[id], dataset.folder(id)
    answers = [n for n, (role, text) in enumerate(record.turns) if role == "gpt" and text]
    try:
        files = tuple(map(folder.locate, record.images))
        for answer in reversed(answers):
            question = _question(record, record.turns[: answer + 1], files, template, tokenizer, processor)
            if question.length <= max_length:
                return question
        raise DataError(
            f"its first question takes {question.length} tokens, of which {max_length} leave room for an answer."
            if answers
            else "the assistant says nothing, so there is no answer to compare with."
        )
    except DataError as error:
        raise DataError(f"{record.name}: {error}") from error


def _question(
    record: Record,
    turns: Sequence[tuple[str, str]],
    files: tuple[str, ...],
    template: Template,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
) -> Question:
    """Asks for the answer in the last of `turns`, with the tokens that training has in front of it."""
    num_images = sum(text.count(PLACEHOLDER) for _, text in turns)
    num_images = min(num_images, len(files))  # of a single image a turn may have several placeholders
    markers = processor.model.use_im_start_end
    how = dict(num_images=num_images, image_markers=markers, system=record.system)
    encoded = tokenize(turns, template, tokenizer, mask="last_answer", **how)
    spans = render(turns, template, **how)
    last = max(number for number, span in enumerate(spans) if span.is_answer)
    shown = list(zip(files, record.is_frame, strict=True))[:num_images]
    return Question(
        record.name,
        "".join(span.text for span in spans[:last]),
        next((text for role, text in reversed(turns) if role != "gpt"), "").replace(PLACEHOLDER, "").strip(),
        turns[-1][1].strip(),
        encoded.tokens[: int(np.argmax(encoded.labels != IGNORE))],
        tuple(path for path, _ in shown),
        tuple(is_frame for _, is_frame in shown),
        tuple(processor.layout(path, is_frame=is_frame) for path, is_frame in shown),
    )
