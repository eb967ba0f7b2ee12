"""The quickstart's dataset. What is true of a picture is read back from its pixels."""

import json
import random
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from llava_jax.config import ConfigError
from llava_jax.quickstart.conversations import caption, conversation, map_text, notes
from llava_jax.quickstart.dataset import prepare
from llava_jax.quickstart.scenes import Scene, Thing

SMALL = {"num_train": 60, "num_dev": 10, "num_test": 20, "num_mosaics": 30}
SHADES = {
    "red": (210, 30, 40),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "orange": (235, 120, 10),
    "purple": (140, 40, 170),
    "gray": (85, 85, 85),
}
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = ("northwest", "northeast", "southwest", "southeast")
WORDS = (
    "colors",
    "shapes",
    "Where",
    "What",
    "color",
    "shape",
    "object",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quickstart") / "data"
    prepare(str(root), seed=3, **SMALL)
    return root


def read_list(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def find_things(path: Path) -> list[dict]:
    """The connected regions of a picture that differ from its background, described in words."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    background = np.median(pixels.reshape(-1, 3), axis=0)
    drawn = np.abs(pixels - background).max(axis=-1) > 80
    left = set(zip(*np.nonzero(drawn), strict=True))
    things = []
    while left:
        region, border = [], [left.pop()]
        while border:
            y, x = border.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border += near
        if len(region) > 20:
            things.append(describe(pixels, drawn, np.array(region), width, height))
    return things


def describe(pixels, drawn, region, width: int, height: int) -> dict:
    (top, start), (bottom, end) = region.min(axis=0), region.max(axis=0)
    y, x = (top + bottom) / 2, (start + end) / 2

    def filled(vertical: float, horizontal: float) -> bool:
        return bool(
            drawn[round(y + vertical * (bottom - top) / 2), round(x + horizontal * (end - start) / 2)]
        )

    corners = (filled(-0.8, -0.8), filled(0.8, 0.8))
    shape = {(True, True): "square", (False, True): "triangle", (False, False): "cross"}[corners]
    if not filled(0, 0):
        shape = "ring"
    mean = np.median(pixels[region[:, 0], region[:, 1]], axis=0)
    color = min(SHADES, key=lambda name: np.abs(mean - SHADES[name]).sum())
    place = f"{'north' if y < height / 2 else 'south'}{'west' if x < width / 2 else 'east'}"
    return {"color": color, "shape": shape, "where": place}


def answers(question: str, things: list[dict]) -> list[str]:
    """Every answer the picture allows."""
    if question == "How many objects are there?":
        return [str(len(things))]
    asked = {"What color": "color", "What shape": "shape", "Where is": "where"}[
        " ".join(question.split()[:2])
    ]
    named = re.fullmatch(r"(?:What \w+|Where) is the (.*?)(?: object)?\?", question).group(1)
    return [thing[asked] for thing in things if named in thing.values()]


def test_only_the_promised_files_are_written(dataset):
    names = sorted(path.name for path in dataset.iterdir())
    assert names == [
        "dataset.json",
        "finetune.json",
        "images",
        "pretrain.json",
        "questions_dev.jsonl",
        "questions_test.jsonl",
        "tokenizer.model",
        "towers.json",
    ]
    assert [path.name for path in dataset.parent.iterdir()] == ["data"]
    assert len(list((dataset / "images").iterdir())) == 120


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(dataset, tmp_path):
    prepare(str(tmp_path / "again"), seed=3, **SMALL)
    prepare(str(tmp_path / "other"), seed=4, **SMALL)
    files = sorted(path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file())
    again = sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert files == again
    assert all((dataset / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    for name in ("finetune.json", "questions_test.jsonl"):
        assert (dataset / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_a_complete_dataset_is_left_alone(dataset):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    prepare(str(dataset), seed=3, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_other_arguments_for_the_same_directory_are_an_error(dataset):
    with pytest.raises(ConfigError, match="seed=3 instead of 5"):
        prepare(str(dataset), seed=5, **SMALL)


def test_a_directory_that_holds_something_else_is_an_error(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a quickstart dataset"):
        prepare(str(tmp_path), **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_no_mosaics_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="num_mosaics=0"):
        prepare(str(tmp_path / "data"), **SMALL | {"num_mosaics": 0})


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_jax.quickstart.dataset.train_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "data"), **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["towers.json", "pretrain.json", "finetune.json"])
def test_records_are_llava_json(dataset, name):
    records = read_list(dataset / name)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(turn["value"].strip() == turn["value"] != "" for turn in turns)
        placeholders = [turn["value"].count("<image>") for turn in turns]
        if "image" in record:
            assert record.keys() == {"id", "image", "conversations"}
            assert turns[0]["value"].startswith("<image>\n") and sum(placeholders) == 1
            assert (dataset / "images" / record["image"]).is_file()
        else:
            assert record.keys() == {"id", "conversations"}
            assert sum(placeholders) == 0
    if name != "finetune.json":
        assert all("image" in record and len(record["conversations"]) == 2 for record in records)


def test_the_number_of_records_follows_the_arguments(dataset):
    towers = [record["id"].split("_")[0] for record in read_list(dataset / "towers.json")]
    finetune = [record["id"].split("_")[0] for record in read_list(dataset / "finetune.json")]
    assert [towers.count(kind) for kind in ("map", "notes1", "notes2", "caption")] == [30, 60, 60, 20]
    assert len(read_list(dataset / "pretrain.json")) == 60
    assert [finetune.count(kind) for kind in ("conversation", "description", "text")] == [60, 10, 4]


def test_questions_have_every_kind_equally_often_and_no_placeholder(dataset):
    for split, number in (("dev", 10), ("test", 20)):
        questions = read_lines(dataset / f"questions_{split}.jsonl")
        kinds = [question["kind"] for question in questions]
        assert [kinds.count(kind) for kind in ("color", "shape", "where", "count")] == [number] * 4
        assert len({question["question_id"] for question in questions}) == 4 * number
        for question in questions:
            assert question.keys() == {"question_id", "image", "text", "answer", "kind"}
            assert "<image>" not in question["text"]


def test_splits_share_no_picture(dataset):
    used = {
        "train": {record["image"] for record in read_list(dataset / "finetune.json") if "image" in record},
        "dev": {question["image"] for question in read_lines(dataset / "questions_dev.jsonl")},
        "test": {question["image"] for question in read_lines(dataset / "questions_test.jsonl")},
    }
    pixels = {
        split: {Image.open(dataset / "images" / name).convert("RGB").tobytes() for name in names}
        for split, names in used.items()
    }
    assert {split: len(pictures) for split, pictures in pixels.items()} == {
        "train": 60,
        "dev": 10,
        "test": 20,
    }
    assert len(pixels["train"] | pixels["dev"] | pixels["test"]) == 90


def test_pictures_are_jpeg_and_png_of_many_sizes(dataset):
    images = [Image.open(path) for path in (dataset / "images").iterdir()]
    formats = [image.format for image in images]
    assert 80 < formats.count("JPEG") < 110 and formats.count("PNG") == 120 - formats.count("JPEG")
    assert all(min(image.size) >= 64 and max(image.size) <= 160 for image in images)
    assert all(min(image.size) / max(image.size) >= 0.8 for image in images)
    assert len({image.size for image in images}) > 100


def test_every_answer_is_the_only_one_the_picture_allows(dataset):
    asked = []
    for split in ("dev", "test"):
        asked += [
            (question["image"], question["text"], question["answer"])
            for question in read_lines(dataset / f"questions_{split}.jsonl")
        ]
    for record in read_list(dataset / "finetune.json"):
        values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        if record["id"].startswith("conversation"):
            asked += [(record["image"], *pair) for pair in zip(values[::2], values[1::2], strict=True)]
    seen = {name: find_things(dataset / "images" / name) for name, _, _ in asked}
    assert {len(things) for things in seen.values()} == {1, 2}
    for name, question, answer in asked:
        assert answers(question, seen[name]) == [answer], (name, question)


def test_captions_tell_all_that_is_drawn_in_any_order(dataset):
    orders = set()
    for record in read_list(dataset / "pretrain.json"):
        things = find_things(dataset / "images" / record["image"])
        said = [
            set(text.split()) - {"a", "in", "the"}
            for text in record["conversations"][1]["value"].split(" and ")
        ]
        told = [set(thing.values()) for thing in things]
        assert said in (told, told[::-1])
        orders.add(record["conversations"][1]["value"].split()[0])
    assert orders == {"a", "in"}


def test_maps_name_what_each_quarter_shows(dataset):
    maps = [record for record in read_list(dataset / "towers.json") if record["id"].startswith("map")]
    repeated = 0
    for record in maps:
        words = record["conversations"][1]["value"].split()
        assert (words[0], words[5], len(words)) == ("colors", "shapes", 10)
        seen = {thing["where"]: thing for thing in find_things(dataset / "images" / record["image"])}
        assert [seen[place]["color"] for place in PLACES] == words[1:5]
        assert [seen[place]["shape"] for place in PLACES] == words[6:]
        repeated += len(set(words[6:])) < 4
    assert repeated > 15


def test_notes_are_the_properties_of_each_thing_in_any_order(dataset):
    found = [record for record in read_list(dataset / "towers.json") if record["id"].startswith("notes")]
    beginnings = set()
    for record in found:
        things = find_things(dataset / "images" / record["image"])
        text = record["conversations"][1]["value"]
        beginnings.add(text.split()[0])
        told = [" ".join(order) for thing in things for order in permutations(thing.values())]
        assert sum(text.startswith(one) for one in told) == sum(text.endswith(one) for one in told) == 1
        assert len(text.split()) == 3 * len(things)
    assert beginnings >= {"red", "ring", "northwest"}


def test_a_scene_is_told_in_words():
    scene = Scene(
        width=80,
        height=64,
        background=(250, 250, 250),
        things=(
            Thing("red", "square", "northwest", (210, 40, 40), x=20, y=20, diameter=32),
            Thing("blue", "cross", "southeast", (40, 70, 210), x=60, y=44, diameter=32),
        ),
    )
    captions = {caption(scene, random.Random(seed)) for seed in range(500)}
    assert len(captions) == 32
    assert captions >= {
        "a red square in the northwest and a blue cross in the southeast",
        "in the southeast a cross in blue and a square in red in the northwest",
    }
    assert "northwest red square southeast cross blue" in {notes(scene, random.Random(i)) for i in range(500)}
    assert map_text(scene) == "colors red blue shapes square cross"


def test_no_turn_gives_away_a_later_answer(dataset):
    for record in read_list(dataset / "finetune.json"):
        if not record["id"].startswith("conversation"):
            continue
        said = ""
        for human, gpt in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            said += human["value"]
            assert gpt["value"] not in said.replace("<image>", ""), record["id"]
            said += f" {gpt['value']} "


def test_all_kinds_open_a_conversation():
    scene = Scene(64, 64, (250, 250, 250), (Thing("red", "ring", "northwest", (210, 40, 40), 20, 20, 30),))
    opened = {conversation(scene, random.Random(seed))[0].kind for seed in range(50)}
    assert opened == {"color", "shape", "where", "count"}


@pytest.fixture(scope="module")
def tokenizer(dataset) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))


def test_the_tokenizer_has_llamas_special_tokens_and_bytes(tokenizer):
    assert tokenizer.vocab_size() == 512
    assert [tokenizer.id_to_piece(token) for token in (0, 1, 2, 3, 258)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
    ]
    assert tokenizer.pad_id() == -1
    assert tokenizer.encode("\n", out_type=str) == ["\u2581", "<0x0A>"]
    for text in ("  two  spaces ", "caf\u00e9 \u732b", "a\tb\nc"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_content_word_is_one_token(tokenizer):
    for word in (*SHADES, *SHAPES, *PLACES, *WORDS):
        assert len(tokenizer.encode(word)) == 1, word


def test_digits_are_split(tokenizer):
    assert tokenizer.encode("1234567890", out_type=str) == ["\u2581", *"1234567890"]


def test_the_question_after_an_image_begins_with_one_token(tokenizer):
    pieces = tokenizer.encode("\nWhat color is the ring?", out_type=str)
    assert pieces[:3] == ["\u2581", "<0x0A>", "What"]


def test_the_system_prompt_takes_few_tokens(tokenizer):
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: "
    )
    assert len(tokenizer.encode(prompt)) <= 32
