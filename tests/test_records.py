"""Records: what is accepted as one sample, and how what is not is reported."""

import pytest

from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.records import parse_record, raise_problems
from llava_jax.errors import DataError

GOOD = {
    "id": "a",
    "image": "cats/1.jpg",
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat"}],
}
TURNS = (("human", "<image>"), ("gpt", "A cat"))


def turns(*roles):
    return [{"from": role, "value": "x"} for role in roles]


def asked(question, answer="yes", **media):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | media


def parse(value, index=0, *, folder=".", video_frames=8, **more):
    return parse_record(value, index, folder=ImageFolder(str(folder)), video_frames=video_frames, **more)


def fault(value, index=3, **more):
    with pytest.raises(DataError) as error:
        parse(value, index, **more)
    return str(error.value)


def test_a_record_of_llava():
    record = parse(GOOD, 7, folder="/data")
    assert (record.name, record.images, record.turns) == ("record 7 (id 'a')", ("cats/1.jpg",), TURNS)
    assert (record.system, record.is_frame) == (None, (False,))


def test_the_placeholder_within_a_text_without_images_is_text():
    record = parse(asked("What is <image> in SVG?", "<svg><image></svg>"))
    assert record.turns == (("human", "What is <image> in SVG?"), ("gpt", "<svg><image></svg>"))
    assert record.images == ()


def test_the_name_begins_with_the_source():
    assert parse(GOOD, 7, source="vqa.json").name == "vqa.json: record 7 (id 'a')"
    assert fault(5, source="vqa.json").startswith("vqa.json: record 3: ")


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
            "record 3, turn 1: 'from' should be 'human' or 'gpt', not 'bot'; other names of roles are told by 'tags' "
            "of a dataset_info.json entry ('formatting': 'sharegpt'), which data.dataset reads (docs/data.md).",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "x"}]},
            "record 3, turn 0: 'from' should be 'human' or 'gpt', not ['human'].",
        ),
        (
            {"conversations": turns("system", "human", "gpt")},
            "record 3, turn 0: 'from' should be 'human' or 'gpt', not 'system'; "
            "its text belongs under the record's 'system'.",
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
        (
            GOOD | {"image": {"bytes": "abc"}},
            "record 3 (id 'a'): 'image' should be a path or a list of paths, not {'bytes': 'abc'}.",
        ),
        (GOOD | {"images": ["x"]}, "record 3 (id 'a'): has both 'image' and 'images'; keep one."),
        (
            GOOD | {"video": "x", "videos": ["x"]},
            "record 3 (id 'a'): has both 'video' and 'videos'; keep one.",
        ),
        (GOOD | {"system": 1}, "record 3 (id 'a'): 'system' should be text, not a number."),
        (
            GOOD | {"system": "See <image>"},
            "record 3 (id 'a'): its system text has <image>, which belongs into a turn; take it out.",
        ),
        (
            asked("<video>", videos=[[]]),
            "record 3: 'videos' should be a directory of frames or a list of their paths, not [].",
        ),
    ],
)
def test_a_bad_record_is_named_with_its_fault(value, message):
    assert fault(value) == message


@pytest.mark.parametrize(
    ("media", "images"),
    [
        ({}, ()),
        ({"image": None}, ()),
        ({"image": []}, ()),
        ({"image": "a.jpg"}, ("a.jpg",)),
        ({"image": ["a.jpg", "b.jpg"]}, ("a.jpg", "b.jpg")),
        ({"images": ["a.jpg", "b.jpg"]}, ("a.jpg", "b.jpg")),
        ({"images": "a.jpg", "image": None}, ("a.jpg",)),
        ({"image": {"path": "a.jpg"}}, ("a.jpg",)),
        ({"images": [{"path": "a.jpg", "bytes": None}, "b.jpg"]}, ("a.jpg", "b.jpg")),
    ],
)
def test_images_may_be_absent_one_or_several(media, images):
    record = parse(asked("<image>" * len(images), **media))
    assert (record.images, record.is_frame) == (images, (False,) * len(images))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (asked("hi", image="a"), "its text has 0 <image> for 1 images; write one for each."),
        (
            asked("<image><image>", image=list("abc")),
            "its text has 2 <image> for 3 images; write one for each.",
        ),
        (asked("<image>", "<image>", image="a"), "its text has 2 <image> for 1 images; write one for each."),
        (
            asked("yes", answer=" <image>\n"),
            "its text has <image>, but it names no image; add 'image' or take that out.",
        ),
        (asked("a <image>"), "its text has <image>, but it names no image; add 'image' or take that out."),
        (
            asked("<video>", image="a", video=["f"]),
            "its text has 0 <image> for 1 images; write one for each.",
        ),
        (
            asked("<video><image>", video=["f"]),
            "its text has <image>, but it names no image; add 'image' or take that out.",
        ),
        (asked("hi", video=["f"]), "its text has 0 <video> for 1 videos; write one for each."),
        (asked("<video>", videos=[["f"], ["g"]]), "its text has 1 <video> for 2 videos; write one for each."),
    ],
)
def test_placeholders_that_do_not_fit_the_media_are_refused(value, message):
    assert fault(value) == f"record 3: {message}"


def test_several_placeholders_of_one_image_in_one_turn_are_as_one():
    assert parse(asked("<image> or <image>?", image="a")).turns[0] == ("human", "<image> or <image>?")


def test_video_in_text_without_videos_is_text():
    html = "Write a page with <video>."
    assert parse(asked(html)).turns[0] == ("human", html)
    assert parse(asked("<image>" + html, image="a")).images == ("a",)


def test_frames_stand_where_their_video_stood():
    value = asked("<image>A<video>B<image>", "<video>", images=["a", "b"], videos=[["f", "g", "h"], ["i"]])
    record = parse(value, video_frames=2)
    assert record.turns == (("human", "<image>A<image><image>B<image>"), ("gpt", "<image>"))
    assert record.images == ("a", "f", "h", "b", "i")
    assert record.is_frame == (False, True, True, False, True)


@pytest.mark.parametrize(
    ("count", "frames"),
    [(1, "0"), (2, "06"), (3, "036"), (4, "0246"), (5, "01346"), (7, "0123456"), (9, "0123456")],
)
def test_frames_are_spread_evenly(count, frames):
    record = parse(asked("<video>", video=list("0123456")), video_frames=count)
    assert record.images == tuple(frames)


def test_a_video_may_be_a_directory(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(11):
        (tmp_path / "clip" / f"{number}.jpg").touch()
    for media in ({"video": "clip"}, {"videos": ["clip"]}, {"videos": "clip"}, {"video": {"path": "clip"}}):
        record = parse(asked("<video>", **media), folder=tmp_path, video_frames=3)
        assert record.images == ("clip/0.jpg", "clip/5.jpg", "clip/10.jpg")
    assert "record 3: video 'film.mp4' is no directory with frames" in fault(
        asked("<video>", video="film.mp4")
    )


def test_a_system_text_belongs_to_its_record():
    assert parse(GOOD | {"system": "Be brief."}).system == "Be brief."
    assert parse(GOOD | {"system": ""}).system is None


def test_an_opening_turn_of_the_assistant_is_dropped():
    record = parse({"conversations": turns("gpt", "human", "gpt")})
    assert [role for role, _ in record.turns] == ["human", "gpt"]


def test_other_keys_are_ignored():
    assert parse(GOOD | {"model": "x", "weight": 1}).turns == TURNS


def test_the_first_problems_are_shown_and_all_are_counted():
    with pytest.raises(DataError) as error:
        raise_problems("data.json", [f"record {number}: is bad." for number in range(7)])
    lines = str(error.value).split("\n")
    assert lines[:2] == ["data.json: 7 problems; correct or remove these records:", "  record 0: is bad."]
    assert lines[5:] == ["  record 4: is bad.", "  ... and 2 more"]
    raise_problems("data.json", [])
