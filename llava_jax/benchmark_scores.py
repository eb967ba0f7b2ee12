"""Scores of answers by the rules of the original's eval_pope.py and eval_science_qa.py (llava/eval)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from llava_jax.data.json_index import JsonIndex
from llava_jax.errors import DataError

_OPTIONS = "ABCDE"


def read_answers(path: str) -> list[dict]:
    """The lines that evaluate --questions=FILE --predictions=FILE wrote. Raises DataError naming what is no such line."""
    index = JsonIndex(path, "--answers")
    answers = [index[number] for number in range(len(index))]
    for number, answer in enumerate(answers):
        fits = isinstance(answer, dict) and isinstance(answer.get("question_id"), str | int)
        if not fits or not all(isinstance(answer.get(key), str) for key in ("prompt", "text")):
            raise DataError(
                f"{path}:{index.line(number)}: an answer has question_id, prompt and text; name a file that "
                "llava_jax.evaluate --questions=FILE --predictions=FILE wrote."
            )
    return answers


def score_pope(answers: Sequence[dict], directory: str) -> dict[str, dict[str, float]]:
    """Per category NAME of the directory's coco_pope_NAME.json: accuracy, precision, recall, f1, yes_ratio, samples.

    Answers and labels are compared in order, as there; what there ends in a division by zero is 0.
    """
    files = sorted(Path(directory).glob("coco_pope_*.json"))
    if not files:
        raise DataError(
            f"--pope={directory} holds no coco_pope_*.json, the labels of POPE; name their directory."
        )
    results = {}
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        said = [says_yes(answer["text"]) for answer in answers if answer.get("category") == category]
        right = [label != "no" for label in _labels(str(file))]
        if not right or len(said) != len(right):
            raise DataError(
                f"{file}: {len(right):,} labels for {len(said):,} answers of category {category!r}. They are compared in "
                "order, so ask all questions of the original's llava_pope_test.jsonl; evaluate --predictions keeps their "
                "category."
            )
        results[category] = _yes_or_no(said, right)
    return results


def _labels(path: str) -> list[str]:
    index = JsonIndex(path, "--pope")
    lines = [index[number] for number in range(len(index))]
    if not all(isinstance(line, dict) and "label" in line for line in lines):
        raise DataError(f"{path}: is no file of POPE's, whose every line has a label.")
    return [line["label"] for line in lines]


def says_yes(text: str) -> bool:
    """Whether the first sentence has no word No, no or not."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _yes_or_no(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    pairs = list(zip(said, right, strict=True))
    true, false = pairs.count((True, True)), pairs.count((True, False))
    missed = pairs.count((False, True))
    precision = true / (true + false) if true + false else 0.0
    recall = true / (true + missed) if true + missed else 0.0
    return {
        "accuracy": sum(a == b for a, b in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true else 0.0,
        "yes_ratio": (true + false) / len(pairs),
        "samples": len(pairs),
    }


def score_science_qa(answers: Sequence[dict], directory: str, split: str) -> dict[str, float]:
    """accuracy over the samples of a split, image_accuracy over the image_samples, whose prompt has a picture.

    directory: holds ScienceQA's pid_splits.json and problems.json. The unanswered count as wrong.
    """
    splits, problems = (_read(Path(directory) / name) for name in ("pid_splits.json", "problems.json"))
    numbers = {name: problem.get("answer") for name, problem in problems.items() if isinstance(problem, dict)}
    if split not in splits:
        raise DataError(f"--split={split}: {directory}/pid_splits.json has {', '.join(splits)}.")
    by_id = {answer["question_id"]: answer for answer in answers}
    right, right_about_images = [], []
    for problem in splits[split]:
        if numbers.get(problem) not in range(len(_OPTIONS)):
            raise DataError(
                f"{directory}/problems.json has no answer from 0 to 4 to {problem!r}, which is in {split}."
            )
        answer = by_id.get(problem, {"prompt": "", "text": ""})
        right.append(chosen_letter(answer["text"]) == _OPTIONS[numbers[problem]])
        if "<image>" in answer["prompt"]:
            right_about_images.append(right[-1])
    unanswered = sum(problem not in by_id for problem in splits[split])
    if unanswered == len(right):
        raise DataError(
            f"--answers has none of the {len(right):,} problems of {directory}, split {split}; ask the original's "
            "llava_test_CQM-A.json, whose ids are theirs."
        )
    scores = {"accuracy": sum(right) / len(right), "samples": len(right), "unanswered": unanswered}
    if right_about_images:
        scores["image_accuracy"] = sum(right_about_images) / len(right_about_images)
        scores["image_samples"] = len(right_about_images)
    return scores


def chosen_letter(text: str) -> str:
    """The letter that an answer is, begins with ("A. ") or names once ("The answer is A."); "-" where there is none."""
    if len(text) == 1 and text in _OPTIONS:
        return text
    if text[1:3] == ". " and text[0] in _OPTIONS:
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)  # with any character behind, as there
    return letters[0] if len(letters) == 1 else "-"


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); --science_qa names ScienceQA's own directory."
        ) from error
    return found
