"""Benchmark scores: figures that the original's eval_pope.py and eval_science_qa.py give for the same files."""

import json

import pytest

from llava_jax.benchmark_scores import chosen_letter, read_answers, says_yes, score_pope, score_science_qa
from llava_jax.errors import DataError


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No, there is none", False),
        ("There is not a dog", False),
        ("NO", True),  # the original knows three spellings
        ("Nope", True),
        ("Yes. no", True),  # the first sentence decides
        ("no\nyes", True),  # words are what spaces part
        ("I say no, no", False),
        ("", True),
    ],
)
def test_pope_takes_for_no_what_the_original_takes_for_no(text, yes):
    assert says_yes(text) is yes


def pope_answers(*texts, category="random") -> list[dict]:
    return [{"question_id": i, "prompt": "?", "text": t, "category": category} for i, t in enumerate(texts)]


def write_labels(folder, *labels, category="random") -> None:
    text = "".join(json.dumps({"question_id": 1, "label": label}) + "\n" for label in labels)
    (folder / f"coco_pope_{category}.json").write_text(text)


def test_pope_is_scored_per_category_in_order(tmp_path):
    write_labels(tmp_path, *["yes"] * 5, *["no"] * 5)
    write_labels(tmp_path, "yes", "no", category="popular")
    answers = pope_answers("Yes", "no", "yes", "Yes", "No", "No", "no", "Yes", "no", "no")
    answers[3:3] = pope_answers("no", "no", category="popular")
    scores = score_pope(answers, str(tmp_path))
    assert scores["random"] == {
        "accuracy": 7 / 10,
        "precision": 3 / 4,
        "recall": 3 / 5,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 4 / 10,
        "samples": 10,
    }
    # Nobody said yes: the original divides by zero.
    nothing = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    assert scores["popular"] == {"accuracy": 0.5, "samples": 2} | nothing


def test_labels_of_other_answers_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no coco_pope_\*\.json"):
        score_pope(pope_answers("Yes"), str(tmp_path))
    write_labels(tmp_path, "yes", "yes")
    with pytest.raises(DataError, match="2 labels for 1 answers of category 'random'"):
        score_pope(pope_answers("Yes"), str(tmp_path))
    (tmp_path / "coco_pope_random.json").write_text('{"text": "?"}\n')
    with pytest.raises(DataError, match="is no file of POPE's"):
        score_pope(pope_answers("Yes"), str(tmp_path))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("C. because", "C"),
        ("The answer is D.", "D"),
        ("B. x The answer is A.", "B"),
        ("I think: The answer is A, surely", "A"),
        ("The answer is A. The answer is A.", "-"),  # the original wants it once
        ("The answer is A", "-"),  # and something behind
        ("A.", "-"),
        ("F", "-"),
        ("a", "-"),
        ("", "-"),
    ],
)
def test_letters_are_found_where_the_original_finds_them(text, letter):
    assert chosen_letter(text) == letter


@pytest.fixture
def science_qa(tmp_path) -> str:
    problems = {
        "3": {"choices": ["x", "y"], "answer": 1},
        "5": {"choices": ["x", "y"], "answer": 0},
        "8": {"choices": ["x", "y", "z"], "answer": 2},
        "9": {"choices": ["x", "y"], "answer": 0},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["3", "5", "8"], "val": ["9"]}))
    return str(tmp_path)


def test_science_qa_counts_what_is_unanswered_as_wrong(science_qa):
    answers = [
        {"question_id": "3", "prompt": "<image>\nWhich?", "text": "B"},
        {"question_id": "5", "prompt": "<image>\nWhich?", "text": "C"},  # which is no choice
        {"question_id": "9", "prompt": "Which?", "text": "A"},
    ]
    assert score_science_qa(answers, science_qa, "test") == {
        "accuracy": 1 / 3,
        "samples": 3,
        "unanswered": 1,
        "image_accuracy": 1 / 2,
        "image_samples": 2,
    }
    assert score_science_qa(answers, science_qa, "val") == {"accuracy": 1.0, "samples": 1, "unanswered": 0}


def test_science_qa_of_something_else_is_refused(science_qa, tmp_path):
    with pytest.raises(DataError, match="has none of the 3 problems"):
        score_science_qa([{"question_id": 3, "prompt": "?", "text": "B"}], science_qa, "test")
    with pytest.raises(DataError, match=r"--split=tes: .* has test, val\."):
        score_science_qa([], science_qa, "tes")
    with pytest.raises(DataError, match=r"pid_splits\.json: cannot be read .*--science_qa names"):
        score_science_qa([], str(tmp_path / "nowhere"), "test")


def test_science_qa_with_broken_files_is_refused(science_qa, tmp_path):
    answers = [{"question_id": "3", "prompt": "?", "text": "B"}]
    for problems in ({"3": {"answer": 7}}, {"3": {}}, {"3": 1}, {}):
        (tmp_path / "problems.json").write_text(json.dumps(problems))
        with pytest.raises(DataError, match="has no answer from 0 to 4 to '3'"):
            score_science_qa(answers, science_qa, "test")
    (tmp_path / "pid_splits.json").write_text("[]")
    with pytest.raises(DataError, match=r"pid_splits\.json: cannot be read \(it holds no object\)"):
        score_science_qa(answers, science_qa, "test")


@pytest.mark.parametrize("change", [{"text": None}, {"prompt": 3}, {"question_id": ["2"]}])
def test_answers_of_other_types_are_named(tmp_path, change):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"question_id": 1, "prompt": "?", "text": ""} | change))
    with pytest.raises(DataError, match=r"answers\.jsonl:1: an answer has question_id, prompt and text"):
        read_answers(str(path))


def test_answers_that_are_none_are_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "prompt": "?", "text": ""}\n\n{"question_id": 1, "text": "?"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:3: an answer has question_id, prompt and text"):
        read_answers(str(path))
