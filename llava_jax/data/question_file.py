"""Files of questions: lines as LLaVA's benchmarks have them, and conversations as its ScienceQA has them."""

from collections.abc import Sequence

from llava_jax.data.conversation import PLACEHOLDER
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.json_index import JsonIndex
from llava_jax.data.records import raise_problems
from llava_jax.errors import DataError

_SETTING = "evaluate.path (--questions of llava_jax.evaluate)"


def read_questions(path: str) -> list[dict]:
    """Reads JSONL or a JSON list. What is not there of `image`, `answer`, `kind` and `category` is not known.

    {"question_id": 7, "image": "a.png", "text": "What?", ...} stays as it is. Of a conversation, {"id": "7", "image":
    "a.png", "conversations": [...]}, the first turn is asked, written as the original's model_vqa_science.py does, and
    no answer is taken. Raises DataError naming the line.
    """
    index = JsonIndex(path, _SETTING)
    questions = []
    for number in range(len(index)):
        value = index[number]
        try:
            questions.append(_question(value))
        except DataError as error:
            raise DataError(f"{path}:{index.line(number)}: {error}") from error
    if not questions:
        raise DataError(f"{path}: there is no question in this file.")
    return questions


def _question(value: object) -> dict:
    if not isinstance(value, dict):
        raise DataError("a question is an object with question_id and text.")
    question = _first_turn(value) if "conversations" in value else value
    identity = question.get("question_id")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise DataError("a question needs text or a whole number under question_id.")
    if not isinstance(question.get("text"), str):
        raise DataError("a question needs text under text.")
    wrong = [key for key in ("image", "answer", "kind") if not isinstance(question.get(key, ""), str)]
    if wrong:
        raise DataError(f"of a question {' and '.join(wrong)} should be text, or be left out.")
    return question


def _first_turn(record: dict) -> dict:
    try:
        asked = record["conversations"][0]["value"].replace(PLACEHOLDER, "").strip()
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise DataError("the first of its conversations should have text under value.") from error
    if "image" not in record:
        return {"question_id": record.get("id"), "text": asked}
    return {
        "question_id": record.get("id"),
        "image": record["image"],
        "text": f"{PLACEHOLDER}\n{asked}",
    }


def require_answers(path: str, questions: Sequence[dict]) -> None:
    """Raises DataError unless every question has the answer to compare with."""
    without = [question["question_id"] for question in questions if "answer" not in question]
    if without:
        raise DataError(
            f"{path}: {len(without):,} of {len(questions):,} questions have no `answer`, the first {without[0]!r}; what a "
            f"run is asked at its end is scored. Add the answers, or ask afterwards: python -m llava_jax.evaluate "
            f"--questions={path} takes questions without."
        )


def require_pictures(path: str, questions: Sequence[dict], image_folder: str, *, blind: bool) -> None:
    """Raises DataError unless every picture is there and, if `blind`, there is another one to show."""
    shown = [question for question in questions if "image" in question]
    missing = ImageFolder(image_folder).missing(question["image"] for question in shown)
    raise_problems(
        path, [f"question {shown[number]['question_id']!r}: {problem}" for number, problem in missing]
    )
    if blind and len({question["image"] for question in shown}) < 2:
        raise DataError(
            f"{path} asks about fewer than two pictures, so that blind questions could not be shown another; set "
            "evaluate.blind=False (--noblind), or ask about more."
        )
