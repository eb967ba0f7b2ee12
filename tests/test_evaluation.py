"""What is asked of question files, what of it is scored, and in which form the answers are written."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from llava_jax.config import EvaluateConfig
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from llava_jax.evaluation import draw_samples, evaluate, model_name

ORIGINAL = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


@pytest.fixture
def pictures(tmp_path) -> str:
    for color in ("red", "green", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    return str(tmp_path)


@pytest.fixture
def color_teller(tiny_config):
    """Stands in for a generator: says the color of a picture, and without one what is asked."""
    tokenizer = load_tokenizer(tiny_config.init.tokenizer)

    def say(prompt, images) -> str:
        if not images:
            return tokenizer.decode(prompt).rpartition("USER: ")[2]
        red, green, blue = images[0].reshape(-1, 3).mean(axis=0)
        return "Red" if red > max(green, blue) else "Green" if green > blue else "Blue"

    return SimpleNamespace(
        template=get_template("v1"),
        tokenizer=tokenizer,
        config=tiny_config.model,
        image_processor=ImageProcessor(tiny_config.model, aspect_ratio="square"),
        complete=lambda prompts, images, **how: [
            say(prompt, own) for prompt, own in zip(prompts, images, strict=True)
        ],
    )


def test_answers_have_the_originals_keys_and_ids_of_their_own_type(color_teller, pictures):
    questions = [
        {"question_id": 7, "image": "red.png", "text": "Which color?", "category": "random"},
        {"question_id": "b", "text": "How are you?"},
        {"question_id": "4", "image": "blue.png", "text": "<image>\nWhich?", "answer": "red", "metadata": 1},
    ]
    config = EvaluateConfig(path="q.jsonl", image_folder=pictures, max_new_tokens=4)
    _, answered = evaluate(color_teller, questions, config, model_id="llava")
    assert [list(row)[:6] for row in answered] == [ORIGINAL] * 3
    ids = [row.pop("answer_id") for row in answered]
    known = {"model_id": "llava", "metadata": {}}
    assert answered == [
        {"question_id": 7, "prompt": "Which color?", "text": "Red", "prediction": "Red"}
        | {"image": "red.png", "category": "random"}
        | known,
        {"question_id": "b", "prompt": "How are you?", "text": "How are you? ASSISTANT:"}
        | {"prediction": "How are you? ASSISTANT:"}
        | known,
        {"question_id": "4", "prompt": "<image>\nWhich?", "text": "Blue", "prediction": "Blue"}
        | {"image": "blue.png", "answer": "red"}
        | known,
    ]
    assert len(set(ids)) == 3 and all(len(identity) == 22 for identity in ids)
    again = evaluate(color_teller, questions, config, model_id="llava")[1]
    assert [row["answer_id"] for row in again] == ids
    other = evaluate(color_teller, questions, config, model_id="other")[1]
    assert not {row["answer_id"] for row in other} & set(ids)
    json.dumps(answered)


def test_only_questions_with_an_answer_are_scored_and_only_those_with_a_picture_asked_blind(
    color_teller, pictures
):
    questions = [
        {"question_id": 1, "image": "red.png", "text": "?", "answer": "red", "category": "color"},
        {
            "question_id": 2,
            "image": "red.png",
            "text": "?",
            "answer": "one",
            "kind": "count",
            "category": "x",
        },
        {"question_id": 3, "image": "green.png", "text": "?", "category": "color"},
        {"question_id": 4, "image": "blue.png", "text": "?", "answer": " BLUE "},
        {"question_id": 5, "text": "Hi", "answer": "no"},
    ]
    config = EvaluateConfig(path="q.jsonl", image_folder=pictures, max_new_tokens=4, blind=True)
    results, answered = evaluate(color_teller, questions, config, model_id="m")
    assert results == {
        "eval_samples": 5,
        "eval_scored": 4,
        "eval_accuracy": 2 / 4,
        "eval_accuracy_color": 1.0,
        "eval_accuracy_count": 0.0,
        "eval_accuracy_blind": 0.0,
        "eval_accuracy_blind_color": 0.0,
        "eval_accuracy_blind_count": 0.0,
    }
    assert [row.get("blind_prediction") for row in answered] == ["Green", "Green", "Blue", "Red", None]
    unscored, _ = evaluate(color_teller, [questions[2]], EvaluateConfig(image_folder=pictures), model_id="m")
    assert unscored == {"eval_samples": 1, "eval_scored": 0}


def test_questions_that_cannot_be_asked_are_all_named_before_one_is_asked(color_teller, pictures):
    color_teller.complete = None
    questions = [
        {"question_id": 1, "image": "red.png", "text": "?"},
        {"question_id": 2, "image": "red.png", "text": "What? " * 200},
        {"question_id": 3, "text": "<image>\nWhat?"},
    ]
    config = EvaluateConfig(path="q.jsonl", image_folder=pictures)
    message = r"q\.jsonl: 2 problems.*\n  question 2: .* the model has 256 positions\.\n  question 3: .* 1 <image> for 0"
    with pytest.raises(DataError, match=message):
        evaluate(color_teller, questions, config, model_id="m")


def test_a_question_that_leaves_room_for_a_short_answer_is_asked(color_teller, pictures):
    questions = [{"question_id": 1, "image": "red.png", "text": "What?"}]
    config = EvaluateConfig(image_folder=pictures, max_new_tokens=250)  # of 256 positions
    _, answered = evaluate(color_teller, questions, config, model_id="m")
    assert answered[0]["text"] == "Red"


def test_samples_are_drawn_of_questions_with_pictures(color_teller, pictures, tmp_path):
    questions = [
        {"question_id": 1, "text": "Hi", "answer": "no"},
        {"question_id": 2, "image": "red.png", "text": "?", "answer": "red"},
    ]
    _, answered = evaluate(color_teller, questions, EvaluateConfig(image_folder=pictures), model_id="m")
    draw_samples(answered[:1], pictures, tmp_path / "none.png")
    draw_samples(answered, pictures, tmp_path / "one.png")
    assert not (tmp_path / "none.png").exists() and (tmp_path / "one.png").exists()


def test_models_are_named_as_the_original_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name("runs/llava15-7b/") == "llava15-7b"
    assert model_name("out/checkpoint-500") == "out_checkpoint-500"
    assert model_name(".") == tmp_path.name
