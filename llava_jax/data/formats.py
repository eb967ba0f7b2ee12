"""How a record is written: the chats of LLaVA, ShareGPT and OpenAI, the tasks of Alpaca, and plain documents."""

import dataclasses
from collections.abc import Mapping

from llava_jax.errors import DataError

ROLES = ("human", "gpt")
DOCUMENT = "document"  # the role of a text that is learnt as a whole


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """What one record says, before its media are looked for."""

    turns: tuple[tuple[str, str], ...]  # (role, text) with roles human, gpt, human, ...; or one DOCUMENT
    images: tuple[str, ...] = ()
    videos: tuple[str | tuple[str, ...], ...] = ()  # each a directory of frames, or its frames
    system: str | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    """Records of plain text, all of which is learnt: what LLaMA-Factory's pretraining stage reads."""

    text: str = "text"

    @property
    def main_key(self) -> str:
        return self.text

    def read(self, record: Mapping, name: str) -> Conversation:
        """Raises DataError beginning with `name` where the record is not written so."""
        for key in ("image", "images", "video", "videos"):
            if record.get(key):
                raise DataError(
                    f"{name}: has {self.text!r} and {key!r}, but a document is text alone; write it as 'conversations', or "
                    f"remove {key!r}."
                )
        text = require_text(record.get(self.text), self.text, name)
        if not text.strip():
            raise DataError(f"{name}: {self.text!r} is empty; remove this record.")
        return Conversation(((DOCUMENT, text),))


@dataclasses.dataclass(frozen=True)
class Chat:
    """Records that list their turns; ShareGPT's by default. One that has a 'text' in their place is a `Document`.

    An opening turn of the assistant is dropped, as in the original: there is no question that it answers.
    """

    messages: str = "conversations"
    system: str = "system"
    images: str = ""  # "": 'image' or 'images', one path or a list of them
    videos: str = ""  # "": 'video', which is one, or 'videos', a list of them
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"  # may speak first; "": nobody
    observation_tag: str = "observation"
    function_tag: str = "function_call"

    @property
    def main_key(self) -> str:
        return self.messages

    def read(self, record: Mapping, name: str) -> Conversation:
        """Raises DataError beginning with `name` where the record is not written so."""
        messages = record.get(self.messages)
        if messages is None and "text" in record:
            return Document().read(record, name)
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"{name}: {self.messages!r} should be a list of turns, not {json_type(messages)}."
            )
        turns = [self._turn(turn, f"{name}, turn {index}") for index, turn in enumerate(messages)]
        system = _optional_text(record, self.system, name)
        first = 0
        if turns[0][0] == "system":
            if system:
                raise DataError(f"{name}: has a system text under {self.system!r} and in turn 0; keep one.")
            system, first = turns[0][1] or None, 1
        if turns[first:] and turns[first][0] == "gpt":
            first += 1
        self._require_alternation(turns, first, name)
        return Conversation(tuple(turns[first:]), *_media(record, self.images, self.videos, name), system)

    def _turn(self, turn: object, name: str) -> tuple[str, str]:
        if not isinstance(turn, dict):
            raise DataError(
                f"{name}: should be an object with {self.role_tag!r} and {self.content_tag!r}, not {json_type(turn)}."
            )
        tag, text = turn.get(self.role_tag), turn.get(self.content_tag)
        if tag in (self.observation_tag, self.function_tag):
            raise DataError(
                f"{name}: {tag!r} turns (the use of tools) are not supported; remove this record."
            )
        roles = {self.user_tag: "human", self.assistant_tag: "gpt", self.system_tag: "system"}
        if not isinstance(tag, str) or not tag or tag not in roles:
            hint = ""
            if tag == "system":
                hint = f"; its text belongs under the record's {self.system!r}"
            elif isinstance(tag, str) and tag:
                hint = (
                    "; other names of roles are told by 'tags' of a dataset_info.json entry ('formatting': 'sharegpt'), "
                    "which data.dataset reads (docs/data.md)"
                )
            raise DataError(
                f"{name}: {self.role_tag!r} should be {self.user_tag!r} or {self.assistant_tag!r}, not {tag!r}{hint}."
            )
        return roles[tag], require_text(text, self.content_tag, name)

    def _require_alternation(self, turns: list[tuple[str, str]], first: int, name: str) -> None:
        tags = {"human": self.user_tag, "gpt": self.assistant_tag, "system": self.system_tag}
        for index, (role, _) in enumerate(turns[first:]):
            if role != ROLES[index % 2]:
                raise DataError(
                    f"{name}, turn {first + index}: comes from {tags[role]!r} where {tags[ROLES[index % 2]]!r} "
                    f"should speak; turns alternate between {self.user_tag!r} and {self.assistant_tag!r}."
                )


@dataclasses.dataclass(frozen=True)
class Alpaca:
    """Records of one task and its answer, perhaps after earlier ones."""

    prompt: str = "instruction"
    query: str = "input"  # goes on a line of its own below the instruction
    response: str = "output"
    history: str = "history"  # earlier pairs of instruction and answer
    system: str = "system"
    images: str = ""
    videos: str = ""

    @property
    def main_key(self) -> str:
        return self.prompt

    def read(self, record: Mapping, name: str) -> Conversation:
        """Raises DataError beginning with `name` where the record is not written so."""
        turns = []
        for index, pair in enumerate(self._history(record, name)):
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(
                    f"{name}: {self.history!r}[{index}] should be a list of instruction and answer."
                )
            turns += [
                (role, require_text(text, self.history, name)) for role, text in zip(ROLES, pair, strict=True)
            ]
        asked = [_optional_text(record, key, name) for key in (self.prompt, self.query)]
        if not any(asked):
            raise DataError(
                f"{name}: {self.prompt!r} should be text, not {json_type(record.get(self.prompt))}."
            )
        turns.append(("human", "\n".join(filter(None, asked))))
        if record.get(self.response) is None and not turns[:-1]:
            raise DataError(
                f"{name}: {self.response!r} should be text, not nothing; documents that are learnt as a whole have "
                f"'formatting': 'text' and 'columns': {{'text': {self.prompt!r}}} in dataset_info.json."
            )
        turns.append(("gpt", require_text(record.get(self.response), self.response, name)))
        system = _optional_text(record, self.system, name)
        return Conversation(tuple(turns), *_media(record, self.images, self.videos, name), system)

    def _history(self, record: Mapping, name: str) -> list:
        history = record.get(self.history)
        if history is not None and not isinstance(history, list):
            raise DataError(f"{name}: {self.history!r} should be a list of pairs, not {json_type(history)}.")
        return history or []


Format = Chat | Alpaca | Document
LLAVA = Chat(system_tag="")  # the original refuses such a turn
FORMATS = {
    "llava": LLAVA,
    "alpaca": Alpaca(),
    "sharegpt": Chat(),
    "openai": Chat(
        messages="messages",
        role_tag="role",
        content_tag="content",
        user_tag="user",
        assistant_tag="assistant",
        observation_tag="tool",
    ),
    "text": Document(),
}


def require_text(value: object, key: str, name: str) -> str:
    """The value if it is text that can be written out; raises DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{name}: {key!r} should be text, not {json_type(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: {key!r} has half a surrogate pair at character {error.start}; remove it."
        ) from error
    return value


def _optional_text(record: Mapping, key: str, name: str) -> str | None:
    value = record.get(key)
    return None if value is None else require_text(value, key, name) or None


def _media(record: Mapping, images: str, videos: str, name: str) -> tuple[tuple[str, ...], tuple]:
    image_key = images or _one_key(record, ("image", "images"), name)
    value = record.get(image_key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    paths = tuple(_path(image) for image in listed)
    if not all(paths):
        raise DataError(f"{name}: {image_key!r} should be a path or a list of paths, not {_short(value)}.")
    return paths, _videos(record, videos or _one_key(record, ("video", "videos"), name), name)


def _videos(record: Mapping, key: str, name: str) -> tuple[str | tuple[str, ...], ...]:
    value = record.get(key)
    if value is None:
        return ()
    listed = [value] if key == "video" or not isinstance(value, list) else value
    found = []
    for video in listed:
        frames = tuple(map(_path, video)) if isinstance(video, list) else _path(video)
        if not frames or not all(frames):
            raise DataError(
                f"{name}: {key!r} should be a directory of frames or a list of their paths, not {_short(video)}."
            )
        found.append(frames)
    return tuple(found)


def _one_key(record: Mapping, keys: tuple[str, str], name: str) -> str:
    given = [key for key in keys if record.get(key) is not None]
    if len(given) > 1:
        raise DataError(f"{name}: has both {keys[0]!r} and {keys[1]!r}; keep one.")
    return given[0] if given else keys[0]


def _path(value: object) -> str:
    """A path written alone or as {"path": ...}; "" for anything else."""
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def json_type(value: object) -> str:
    """Names the type of a JSON value for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
