"""Question files of the original's benchmarks, with answers and without."""

import json

import pytest
from PIL import Image

from llava_jax.data.question_file import read_questions, require_answers, require_pictures
from llava_jax.errors import DataError


def written(folder, *lines) -> str:
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "q.jsonl")


def test_lines_of_the_originals_benchmarks_stay_as_they_are(tmp_path):
    lines = (
        {"question_id": 262144000, "image": "COCO_1.jpg", "text": "Is it?\nAnswer", "category": "default"},
        {"question_id": "artwork/1.jpg", "image": "artwork/1.jpg", "text": "Is it? ", "category": 3},
        {"question_id": 2, "text": "How can I sleep?", "category": "generic"},
        {"question_id": "a", "image": "b.png", "text": "What?", "answer": " red", "kind": "color", "x": [1]},
    )
    assert read_questions(written(tmp_path, *lines)) == [*lines]


def test_of_scienceqa_the_first_turn_is_asked_and_no_answer_is_taken(tmp_path):
    turns = [
        {"from": "human", "value": "Context: N/A\n<image>\n"},
        {"from": "gpt", "value": "The answer is A."},
    ]
    records = [
        {"id": "4", "image": "4/image.png", "conversations": turns},
        {"id": "5", "conversations": [{"from": "human", "value": "What?\nOptions: (A) x"}]},
    ]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(records, indent=2))
    assert read_questions(str(tmp_path / "llava_test_CQM-A.json")) == [
        {"question_id": "4", "image": "4/image.png", "text": "<image>\nContext: N/A"},
        {"question_id": "5", "text": "What?\nOptions: (A) x"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": "1"', r"q.jsonl:1:20: broken JSON"),
        (
            '{"question_id": 1, "text": "?"}\n\n[1]',
            "q.jsonl:3: a question is an object with question_id and text",
        ),
        ('[\n{"question_id": 1, "text": "?"},\n7]', "q.jsonl:3: a question is an object"),
        ('{"text": "?"}', "q.jsonl:1: a question needs text or a whole number under question_id"),
        ('{"question_id": true, "text": "?"}', "a whole number under question_id"),
        ('{"question_id": 1.5, "text": "?"}', "a whole number under question_id"),
        ('{"question_id": 1, "image": "a.png"}', "a question needs text under text"),
        (
            '{"question_id": 1, "text": "?", "image": null, "answer": ["a"]}',
            "of a question image and answer should be text, or be left out",
        ),
        ('{"id": 1, "conversations": []}', "q.jsonl:1: the first of its conversations should have text"),
        ('{"conversations": [{"value": "?"}]}', "a whole number under question_id"),
        ("", "there is no question"),
        ("[]", "there is no question"),
    ],
)
def test_broken_questions_are_named(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))


def test_what_a_run_is_asked_has_answers():
    questions = [{"question_id": 1, "text": "?", "answer": ""}, {"question_id": 7, "text": "?"}]
    require_answers("q.jsonl", questions[:1])
    with pytest.raises(
        DataError, match=r"q\.jsonl: 1 of 2 questions have no `answer`, the first 7; .*--questions=q"
    ):
        require_answers("q.jsonl", questions)


def test_all_missing_pictures_are_named_and_blind_questions_need_two(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    questions = [{"question_id": name, "image": f"{name}.png", "text": "?"} for name in "abc"]
    text_only = {"question_id": 0, "text": "?"}
    folder = str(tmp_path)
    with pytest.raises(
        DataError, match=r"2 problems.*\n  question 'b': image 'b\.png' is not.*\n  question 'c'"
    ):
        require_pictures("q.jsonl", [text_only, *questions], folder, blind=False)
    require_pictures("q.jsonl", [text_only, questions[0]], folder, blind=False)
    with pytest.raises(DataError, match="asks about fewer than two pictures"):
        require_pictures("q.jsonl", [text_only, questions[0]], folder, blind=True)
