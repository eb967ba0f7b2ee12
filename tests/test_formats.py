"""Records of other frameworks, and the list of files in dataset_info.json."""

import json

import pytest

from llava_jax.data.formats import FORMATS, LLAVA, Alpaca, Chat, read_dataset_info
from llava_jax.errors import ConfigError, DataError

TURNS = (("human", "Hi"), ("gpt", "Hello"))


def chat(*turns, role="from", content="value"):
    return [{role: tag, content: text} for tag, text in turns]


def read_alpaca(**record):
    return FORMATS["alpaca"].read(record, "record 0")


def test_sharegpt_may_open_with_a_system_turn():
    said = FORMATS["sharegpt"].read(
        {"conversations": chat(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"))}, "record 0"
    )
    assert (said.system, said.turns) == ("Be brief.", TURNS)


def test_a_system_turn_later_or_twice_is_refused():
    late = {"conversations": chat(("human", "Hi"), ("system", "Be brief."))}
    with pytest.raises(DataError, match="record 0, turn 1: comes from 'system' where 'gpt' should speak"):
        FORMATS["sharegpt"].read(late, "record 0")
    twice = {"system": "A", "conversations": chat(("system", "B"), ("human", "Hi"), ("gpt", "Hello"))}
    with pytest.raises(DataError, match="has a system text under 'system' and in turn 0; keep one"):
        FORMATS["sharegpt"].read(twice, "record 0")


def test_an_opening_turn_of_the_assistant_behind_the_system_is_dropped():
    record = {"conversations": chat(("system", "S"), ("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello"))}
    assert FORMATS["sharegpt"].read(record, "record 0").turns == TURNS


def test_columns_and_tags_name_where_things_are():
    format = Chat(
        messages="talk",
        images="pictures",
        videos="clips",
        system="rules",
        role_tag="role",
        content_tag="content",
        user_tag="user",
        assistant_tag="assistant",
    )
    talk = chat(("user", "Hi"), ("assistant", "Hello"), role="role", content="content")
    record = {
        "talk": talk,
        "pictures": ["a"],
        "clips": ["d", ["e", "f"]],
        "rules": "Be brief.",
        "image": "ignored",
    }
    said = format.read(record, "record 0")
    assert said.turns == TURNS
    assert (said.images, said.videos, said.system) == (("a",), ("d", ("e", "f")), "Be brief.")
    with pytest.raises(
        DataError, match="record 0, turn 0: 'role' should be 'user' or 'assistant', not 'human'"
    ):
        format.read({"talk": [{"role": "human", "content": "x"}]}, "record 0")


def test_openai_messages():
    talk = chat(("system", "S"), ("user", "Hi"), ("assistant", "Hello"), role="role", content="content")
    said = FORMATS["openai"].read({"messages": talk}, "record 0")
    assert (said.system, said.turns) == ("S", TURNS)


@pytest.mark.parametrize(
    ("format", "tag"), [("sharegpt", "observation"), ("sharegpt", "function_call"), ("openai", "tool")]
)
def test_turns_of_tools_are_refused(format, tag):
    format = FORMATS[format]
    record = {format.messages: chat((tag, "x"), role=format.role_tag, content=format.content_tag)}
    with pytest.raises(DataError, match=f"record 0, turn 0: '{tag}' turns .* are not supported"):
        format.read(record, "record 0")


def test_alpaca_puts_the_input_below_the_instruction():
    assert read_alpaca(instruction="Add", input="1 and 2", output="3").turns == (
        ("human", "Add\n1 and 2"),
        ("gpt", "3"),
    )
    for no_input in ({}, {"input": ""}, {"input": None}):
        assert read_alpaca(instruction="Hi", output="Hello", **no_input).turns == TURNS


def test_alpaca_history_comes_first():
    said = read_alpaca(
        instruction="C", output="D", history=[["A", "B"], ["E", "F"]], system="S", images=["i"]
    )
    assert said.turns == (
        ("human", "A"),
        ("gpt", "B"),
        ("human", "E"),
        ("gpt", "F"),
        ("human", "C"),
        ("gpt", "D"),
    )
    assert (said.system, said.images) == ("S", ("i",))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": "x"}, "record 0: 'instruction' should be text, not nothing."),
        ({"instruction": 1, "output": "x"}, "record 0: 'instruction' should be text, not a number."),
        ({"instruction": "x"}, "record 0: 'output' should be text, not nothing."),
        (
            {"instruction": "x", "output": "y", "history": "z"},
            "record 0: 'history' should be a list of pairs, not text.",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["z"]]},
            "record 0: 'history'[0] should be a list of instruction and answer.",
        ),
    ],
)
def test_bad_alpaca_records_are_named(record, message):
    with pytest.raises(DataError) as error:
        read_alpaca(**record)
    assert str(error.value) == message


def info(tmp_path, **entries):
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return str(tmp_path)


def test_dataset_info_as_llama_factory_writes_it(tmp_path):
    folder = info(
        tmp_path,
        mllm_demo={
            "file_name": "mllm_demo.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        task={"file_name": "/abs/task.json", "num_samples": 7, "media_dir": "pictures", "ranking": False},
        not_asked_for={"hf_hub_url": "x/y"},
    )
    task, demo = read_dataset_info(folder, ["task", "mllm_demo"])
    assert (task.name, task.path, task.num_samples) == ("task", "/abs/task.json", 7)
    assert (task.format, task.image_folder) == (Alpaca(), str(tmp_path / "pictures"))
    assert (demo.path, demo.num_samples, demo.image_folder) == (str(tmp_path / "mllm_demo.json"), None, None)
    said = demo.format.read(
        {"messages": chat(("user", "Hi"), ("assistant", "Hello"), role="role", content="content")}, "record 0"
    )
    assert said.turns == TURNS


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "'hf_hub_url' asks for download from a hub, which is not supported"),
        ({"script_url": "a"}, "'script_url' asks for loading scripts"),
        ({"cloud_file_name": "s3://a"}, "'cloud_file_name' asks for cloud storage"),
        ({"file_name": "a.json", "ranking": True}, "'ranking' asks for preference data"),
        (
            {"file_name": "a.json", "columns": {"tools": "tools"}},
            "columns: 'tools' asks for the use of tools",
        ),
        (
            {"file_name": "a.json", "columns": {"promt": "q"}},
            "columns: unknown key 'promt'. Did you mean 'prompt'?",
        ),
        ({"file_name": "a.json", "tags": {"role_tag": "r"}}, "tags: unknown key 'role_tag'. Known: none."),
        ({"file_name": "a.json", "columns": ["a"]}, "'columns' should be an object of names"),
        ({"file_nam": "a.json"}, "unknown key 'file_nam'. Did you mean 'file_name'?"),
        ({"formatting": "alpaca"}, "'file_name' should be the path of a JSON file, not None"),
        (
            {"file_name": "a", "formatting": "parquet"},
            "formatting 'parquet' is not one of 'alpaca', 'sharegpt', 'openai'",
        ),
        ({"file_name": "a", "num_samples": 0}, "'num_samples' should be a positive whole number, not 0"),
        (
            {"file_name": "a", "image_folder": "b", "media_dir": "c"},
            "'image_folder' and 'media_dir' mean the same",
        ),
        ({"file_name": "a", "image_folder": 3}, "'image_folder' should be a path, not 3"),
        ("a.json", "should be an object with 'file_name', not text"),
    ],
)
def test_entries_that_ask_for_what_is_not_there_are_refused(tmp_path, entry, message):
    with pytest.raises(ConfigError) as error:
        read_dataset_info(info(tmp_path, mine=entry), ["mine"])
    assert str(error.value).startswith(f"{tmp_path}/dataset_info.json: 'mine'")
    assert message in str(error.value)


def test_unknown_names_suggest_the_nearest(tmp_path):
    folder = info(tmp_path, coco_caps={"file_name": "a.json"}, vqa={"file_name": "b.json"})
    with pytest.raises(ConfigError, match=r"data\.dataset='coco_cap' is not in .*Did you mean 'coco_caps'\?"):
        read_dataset_info(folder, ["coco_cap"])
    with pytest.raises(ConfigError, match=r"Known: coco_caps, vqa\."):
        read_dataset_info(folder, ["zzz"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read \(No such file.*check data\.dataset_dir"),
        ("{", "broken JSON"),
        ("[]", "should be an object"),
    ],
)
def test_a_dataset_info_that_cannot_be_read_is_named(tmp_path, text, message):
    if text:
        (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_dataset_info(str(tmp_path), ["mine"])


def test_llavas_own_format_has_no_system_turn():
    with pytest.raises(DataError, match="not 'system'; its text belongs under the record's 'system'"):
        LLAVA.read({"conversations": chat(("system", "S"), ("human", "Hi"))}, "record 0")
