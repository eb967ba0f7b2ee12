"""One training sample: a conversation whose placeholders fit its images."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from llava_jax.data.conversation import PLACEHOLDER, stands_for_an_image
from llava_jax.data.formats import DOCUMENT, LLAVA, Conversation, Format, json_type
from llava_jax.data.image_folder import ImageFolder
from llava_jax.errors import DataError

MAX_PROBLEMS_SHOWN = 5
VIDEO_PLACEHOLDER = "<video>"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One training sample.

    `turns` are (role, text) with roles human, gpt, human, ..., or one of the role DOCUMENT. With several images every
    `<image>` in them is the place of one, in the order of `images`; with a single image one turn has it, perhaps
    repeated.
    """

    name: str  # for messages: "record 7 (id 'abc')", behind the name of its file if there are several
    images: tuple[str, ...]  # paths below the image folder
    turns: tuple[tuple[str, str], ...]
    system: str | None = None  # in place of the template's
    is_frame: tuple[bool, ...] = ()  # for each image, whether it is from a video

    @property
    def document(self) -> str | None:
        """The text of a record that is no conversation."""
        return _document(self.turns)


def parse_record(
    value: object,
    index: int,
    *,
    format: Format = LLAVA,
    folder: ImageFolder,
    video_frames: int,
    source: str = "",
) -> Record:
    """Makes a record of a decoded JSON value; raises DataError naming the record.

    `index` and `source` say where it comes from. Videos become at most `video_frames` images, evenly spread.
    Only directories of frames are looked at, no image.
    """
    name = f"{source}: record {index}" if source else f"record {index}"
    if not isinstance(value, dict):
        raise DataError(f"{name}: should be an object with {format.main_key!r}, not {json_type(value)}.")
    if "id" in value:
        name = f"{name} (id {value['id']!r})"
    said = format.read(value, name)
    try:
        videos = [_sample_frames(video, folder, video_frames) for video in said.videos]
        turns, images, is_frame = _arrange(said, videos)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return Record(name, images, turns, said.system, is_frame)


def raise_problems(path: str, problems: Sequence[str]) -> None:
    """Raises one DataError that shows the first problems and counts them all; does nothing without any."""
    if not problems:
        return
    noun = "problem" if len(problems) == 1 else "problems"
    shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    more = f"\n  ... and {rest:,} more" if rest > 0 else ""
    raise DataError(f"{path}: {len(problems):,} {noun}; correct or remove these records:\n  {shown}{more}")


def _sample_frames(video: str | tuple[str, ...], folder: ImageFolder, count: int) -> tuple[str, ...]:
    frames = folder.frames(video) if isinstance(video, str) else video
    # Evenly spread, with the first and the last, as LLaMA-Factory's mm_plugin does.
    positions = np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)
    return tuple(frames[position] for position in positions)


def _document(turns: Sequence[tuple[str, str]]) -> str | None:
    return turns[0][1] if turns and turns[0][0] == DOCUMENT else None


def _arrange(
    said: Conversation, videos: list[tuple[str, ...]]
) -> tuple[tuple, tuple[str, ...], tuple[bool, ...]]:
    """-> turns in which frames have image placeholders, and images and frames in the order of these."""
    if _document(said.turns) is not None:  # where "<image>" is text, too
        return said.turns, (), ()
    _require_places(said)
    if not videos:  # then "<video>" is text, an element of HTML for example
        return said.turns, said.images, (False,) * len(said.images)
    images, is_frame, turns = [], [], []
    next_image, next_video = iter(said.images), iter(videos)

    def place(match: re.Match) -> str:
        frames = next(next_video) if match[0] == VIDEO_PLACEHOLDER else (next(next_image),)
        images.extend(frames)
        is_frame.extend([match[0] == VIDEO_PLACEHOLDER] * len(frames))
        return PLACEHOLDER * len(frames)

    for role, text in said.turns:
        turns.append((role, re.sub(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}", place, text)))
    return tuple(turns), tuple(images), tuple(is_frame)


def _require_places(said: Conversation) -> None:
    texts = [text for _, text in said.turns]
    if said.system and PLACEHOLDER in said.system:
        raise DataError(f"its system text has {PLACEHOLDER}, which belongs into a turn; take it out.")
    found = sum(text.count(PLACEHOLDER) for text in texts)
    if found and not said.images:
        if any(map(stands_for_an_image, texts)):
            raise DataError(
                f"its text has {PLACEHOLDER}, but it names no image; add 'image' or take that out."
            )
        if not said.videos:
            return  # ordinary text, as in the original
    if len(said.images) == 1 and not said.videos:
        # The original makes one of all placeholders in a turn; so does the template here.
        found = sum(PLACEHOLDER in text for text in texts)
    if found != len(said.images):
        raise DataError(
            f"its text has {found} {PLACEHOLDER} for {len(said.images)} images; write one for each."
        )
    found = sum(text.count(VIDEO_PLACEHOLDER) for text in texts)
    if said.videos and found != len(said.videos):
        raise DataError(
            f"its text has {found} {VIDEO_PLACEHOLDER} for {len(said.videos)} videos; write one for each."
        )
