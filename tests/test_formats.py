"""Records as other frameworks write them."""

import pytest

from llava_jax.data.formats import FORMATS, LLAVA, Chat
from llava_jax.errors import DataError

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
        (
            {"instruction": "x"},
            "record 0: 'output' should be text, not nothing; documents that are learnt as a whole have 'formatting': "
            "'text' and 'columns': {'text': 'instruction'} in dataset_info.json.",
        ),
        ({"instruction": "x", "output": 2}, "record 0: 'output' should be text, not a number."),
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


def test_llavas_own_format_has_no_system_turn():
    with pytest.raises(DataError, match="not 'system'; its text belongs under the record's 'system'"):
        LLAVA.read({"conversations": chat(("system", "S"), ("human", "Hi"))}, "record 0")
