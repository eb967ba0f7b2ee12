"""The quickstart's dataset. What is true of a picture is read back from its pixels."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from llava_jax.config import ConfigError
from llava_jax.quickstart.conversations import caption, conversation, map_caption
from llava_jax.quickstart.dataset import prepare
from llava_jax.quickstart.scenes import Scene, Thing

SMALL = {"num_train": 60, "num_dev": 10, "num_test": 20}
SHADES = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (235, 200, 30),
    "purple": (140, 40, 170),
    "black": (30, 30, 30),
}
SHAPES = ("ring", "square", "triangle", "cross")
WORDS = (
    "top",
    "bottom",
    "left",
    "right",
    "none",
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
    place = f"{'top' if y < height / 2 else 'bottom'} {'left' if x < width / 2 else 'right'}"
    return {"color": color, "shape": shape, "where": place}


def answers(question: str, things: list[dict]) -> list[str]:
    """Every answer the picture allows."""
    if question == "How many objects are there?":
        return [str(len(things))]
    asked = {"What color": "color", "What shape": "shape", "Where is": "where"}[
        " ".join(question.split()[:2])
    ]
    named = re.fullmatch(r"(?:What \w+|Where) is the (.*?)(?: object)?\?", question).group(1)
    named = named.removeprefix("object at the ")
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
    assert len(list((dataset / "images").iterdir())) == 90


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


def test_more_maps_than_pictures_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="num_maps=61"):
        prepare(str(tmp_path / "data"), num_maps=61, **SMALL)


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
    assert (towers.count("map"), towers.count("caption")) == (60, 30)
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
    assert 50 < formats.count("JPEG") < 85 and formats.count("PNG") == 90 - formats.count("JPEG")
    assert all(min(image.size) >= 64 and max(image.size) <= 160 for image in images)
    assert all(min(image.size) / max(image.size) >= 0.62 for image in images)
    assert len({image.size for image in images}) > 80


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


def test_captions_tell_all_that_is_drawn_in_reading_order(dataset):
    for record in read_list(dataset / "pretrain.json"):
        things = find_things(dataset / "images" / record["image"])
        things.sort(key=lambda thing: (thing["where"].startswith("bottom"), thing["where"].endswith("right")))
        told = " and ".join(
            f"a {thing['color']} {thing['shape']} at the {thing['where']}" for thing in things
        )
        assert record["conversations"][1]["value"] == told


def test_maps_name_what_each_cell_of_the_padded_picture_shows(dataset):
    cells = 0
    for record in read_list(dataset / "towers.json")[:60]:
        words = record["conversations"][1]["value"].split()
        assert (words[0], words[17], len(words)) == ("colors", "shapes", 34)
        picture = Image.open(dataset / "images" / record["image"]).convert("RGB")
        side = max(picture.size)
        padded = Image.new("RGB", (side, side), picture.getpixel((0, 0)))
        padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        shape_of = {
            thing["color"]: thing["shape"] for thing in find_things(dataset / "images" / record["image"])
        }
        blocks = np.asarray(padded.resize((64, 64), Image.Resampling.NEAREST)).astype(int)
        blocks = blocks.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 256, 3)
        for block, color, shape in zip(blocks, words[1:17], words[18:], strict=True):
            assert shape == shape_of.get(color, "none")
            inked = block[block.min(axis=-1) < 150]
            if len(inked) < 20:
                assert color == "none"
            elif len(inked) > 60 and color != "none":
                assert np.mean(np.abs(inked - SHADES[color]).max(axis=-1) < 90) > 0.3
                cells += 1
            elif len(inked) > 60:
                raise AssertionError(f"{record['id']}: a covered cell is called none")
    assert cells > 100


def test_a_scene_is_told_in_words():
    scene = Scene(
        width=80,
        height=64,
        background=(250, 250, 250),
        things=(
            Thing("red", "square", "top left", (210, 40, 40), x=20, y=20, diameter=32),
            Thing("blue", "cross", "bottom right", (40, 70, 210), x=60, y=44, diameter=32),
        ),
    )
    assert caption(scene) == "a red square at the top left and a blue cross at the bottom right"
    assert map_caption(scene, 2) == "colors red none none blue shapes square none none cross"


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
    scene = Scene(64, 64, (250, 250, 250), (Thing("red", "ring", "top left", (210, 40, 40), 20, 20, 30),))
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
    for word in (*SHADES, *SHAPES, *WORDS):
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
