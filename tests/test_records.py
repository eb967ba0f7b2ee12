"""Reading records files: what is accepted, and how what is not is reported."""

import json

import pytest

from llava_jax.data.records import ImageFolder, check_images, parse_record, read_records
from llava_jax.errors import DataError

GOOD = {
    "id": "a",
    "image": "cats/1.jpg",
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat"}],
}
TURNS = (("human", "<image>"), ("gpt", "A cat"))


def turns(*roles):
    return [{"from": role, "value": "x"} for role in roles]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([GOOD, GOOD]),
        "\ufeff\n " + json.dumps([GOOD, GOOD], indent=1),
        json.dumps(GOOD) + "\n" + json.dumps(GOOD),
        json.dumps(GOOD) + "\r\n\n" + json.dumps(GOOD) + "\n",
    ],
)
def test_the_content_decides_between_a_list_and_lines(tmp_path, text):
    path = tmp_path / "data.txt"
    path.write_text(text, encoding="utf-8", newline="")
    first, second = read_records(str(path))
    assert (first.name, first.images, first.turns) == ("record 0 (id 'a')", ("cats/1.jpg",), TURNS)
    assert (second.name, second.turns) == ("record 1 (id 'a')", TURNS)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"id": 1},\n {"id" 2}]', r"data\.json:2:8: broken JSON"),
        ('{"id": 1}\n\n{"id": }\n', r"data\.json:3:8: broken JSON"),
        ('[{"id": 1}', r"data\.json:1:11: broken JSON"),
        ("", r"data\.json: there is no record"),
        ("[]", r"data\.json: there is no record"),
    ],
)
def test_broken_json_is_reported_by_line_and_column(tmp_path, text, place):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=place):
        read_records(str(path))


def test_unreadable_files_are_reported(tmp_path):
    with pytest.raises(
        DataError, match=r"none\.json': cannot be read \(No such file or directory\); check data\.path"
    ):
        read_records(str(tmp_path / "none.json"))
    (tmp_path / "data.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 9\)"):
        read_records(str(tmp_path / "data.json"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "record 3: should be an object with 'conversations', not a number."),
        ({"id": 5}, "record 3 (id 5): 'conversations' should be a list of turns, not nothing."),
        ({"conversations": []}, "record 3: 'conversations' should be a list of turns, not an empty list."),
        (
            {"conversations": ["hi"]},
            "record 3, turn 0: should be an object with 'from' and 'value', not text.",
        ),
        (
            {"conversations": turns("human", "bot")},
            "record 3, turn 1: 'from' should be 'human' or 'gpt', not 'bot'.",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "record 3, turn 0: 'value' should be text, not nothing.",
        ),
        (
            {"conversations": [{"from": "human", "value": "a\ud800"}]},
            "record 3, turn 0: 'value' has half a surrogate pair at character 1; remove it.",
        ),
        (
            {"conversations": turns("human", "gpt", "gpt")},
            "record 3, turn 2: comes from 'gpt' where 'human' should speak; "
            "turns alternate between 'human' and 'gpt'.",
        ),
        (
            {"conversations": turns("gpt", "gpt")},
            "record 3, turn 1: comes from 'gpt' where 'human' should speak; "
            "turns alternate between 'human' and 'gpt'.",
        ),
        (GOOD | {"image": 3}, "record 3 (id 'a'): 'image' should be a path or a list of paths, not 3."),
        (GOOD | {"image": ""}, "record 3 (id 'a'): 'image' should be a path or a list of paths, not ''."),
        (
            GOOD | {"image": ["x", 1]},
            "record 3 (id 'a'): 'image' should be a path or a list of paths, not ['x', 1].",
        ),
    ],
)
def test_a_bad_record_is_named_with_its_fault(value, message):
    with pytest.raises(DataError) as error:
        parse_record(value, 3)
    assert str(error.value) == message


def test_images_may_be_absent_one_or_several():
    images = [
        parse_record(GOOD | {"image": value}, 0).images for value in (None, "a.jpg", ["a.jpg", "b.jpg"], [])
    ]
    assert images == [(), ("a.jpg",), ("a.jpg", "b.jpg"), ()]
    assert parse_record({"conversations": GOOD["conversations"]}, 0).images == ()


def test_an_opening_turn_of_the_assistant_is_dropped():
    record = parse_record({"conversations": turns("gpt", "human", "gpt")}, 0)
    assert [role for role, _ in record.turns] == ["human", "gpt"]


def test_other_keys_are_ignored():
    assert parse_record(GOOD | {"model": "x", "weight": 1}, 0).turns == TURNS


def test_the_first_problems_are_shown_and_all_are_counted(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, *[{"id": number} for number in range(7)]]))
    with pytest.raises(DataError) as error:
        read_records(str(path))
    lines = str(error.value).split("\n")
    assert lines[0] == f"{path}: 7 problems; correct or remove these records:"
    assert lines[1] == "  record 1 (id 0): 'conversations' should be a list of turns, not nothing."
    assert lines[6] == "  ... and 2 more"
    assert len(lines) == 7


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "outside.jpg").touch()
    images = tmp_path / "images"
    (images / "cats").mkdir(parents=True)
    (images / "cats" / "1.jpg").touch()
    (images / "cats" / "link.jpg").symlink_to(images / "cats" / "1.jpg")
    (images / "leak.jpg").symlink_to(tmp_path / "outside.jpg")
    (images / "up").symlink_to(tmp_path)
    return images


@pytest.mark.parametrize("image", ["cats/1.jpg", "cats/link.jpg", "cats/../cats/1.jpg"])
def test_images_are_found_inside_the_folder(folder, image):
    assert ImageFolder(str(folder)).locate(image) == str(folder / image)


@pytest.mark.parametrize("image", ["cats/2.jpg", "dogs/1.jpg", "cats", "cats/1.jpg/x"])
def test_absent_images_are_refused(folder, image):
    with pytest.raises(DataError, match="is not in image_folder"):
        ImageFolder(str(folder)).locate(image)


@pytest.mark.parametrize("image", ["../outside.jpg", "leak.jpg", "up/outside.jpg", "/etc/passwd"])
def test_images_outside_the_folder_are_refused(folder, image):
    with pytest.raises(DataError, match="lies outside image_folder"):
        ImageFolder(str(folder)).locate(image)


def test_a_neighbour_with_the_same_beginning_is_outside(folder):
    neighbour = folder.parent / "images2"
    neighbour.mkdir()
    (neighbour / "1.jpg").touch()
    with pytest.raises(DataError, match="lies outside image_folder"):
        ImageFolder(str(folder)).locate("../images2/1.jpg")


def test_every_missing_image_is_a_problem_of_its_record(folder):
    records = [
        parse_record(GOOD | {"image": image}, 4)
        for image in ("cats/1.jpg", "no.jpg", ["cats/1.jpg", "no.jpg"])
    ]
    problems = check_images(records, ImageFolder(str(folder)))
    assert problems == [f"record 4 (id 'a'): image 'no.jpg' is not in image_folder '{folder}'."] * 2
