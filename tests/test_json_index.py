"""Random access to JSON files: equal to parsing the whole, and broken files are named with line and column."""

import hashlib
import json
import pickle
import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data import json_index
from llava_jax.data.json_index import JsonIndex
from llava_jax.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.json"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def values_of(path):
    index = JsonIndex(path)
    return [index[number] for number in range(len(index))]


def deep(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        "[]",
        " [ \r\n ] \n",
        "[1]",
        '[1, "two", null, true, -3.5e2, [], {}, [[1, 2], [3]], {"a": {"b": [4]}}]',
        r'["\"", "\\", "\\\"", "\\\\", "a\\\\\"]}", "\\u005d", "\ud800"]',
        '["}{][", ",", "[,]", {"]": "{,"}]',
        '[{"a": 1}\r\n,\r\n{"a": 2}]',
        '["\u4e2d\u6587, \U0001f600", "\u00e9"]',
        f"[{10**400}, NaN, Infinity]",
        f"[{deep(200)}, {deep(200)}]",
        '["' + "\\\\" * 50 + '", "' + '\\"' * 50 + '"]',
    ],
)
def test_a_list_reads_as_json_does(write, monkeypatch, text, chunk):
    monkeypatch.setattr(json_index, "_CHUNK", chunk)
    assert repr(values_of(write(text))) == repr(json.loads(text))
    assert repr(values_of(write(b"\xef\xbb\xbf" + text.encode()))) == repr(json.loads(text))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        (" \n\t\r\n", []),
        ('{"a": 1}', [{"a": 1}]),
        ('{"a": 1}\n', [{"a": 1}]),
        ('\ufeff{"a": "[\\n]"}\r\n\r\n \t\n  {"a": 2}\n\n', [{"a": "[\n]"}, {"a": 2}]),
        ('"\u2028"\n5', ["\u2028", 5]),
    ],
)
def test_lines_read_each_as_json_does(write, monkeypatch, text, values, chunk):
    monkeypatch.setattr(json_index, "_CHUNK", chunk)
    assert values_of(write(text)) == values


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write_spaced(value, random):
    """JSON with random white space wherever it may be."""

    def space():
        return "".join(random.choices(" \t\r\n", k=random.choice((0, 0, 1, 3))))

    def joined(parts):
        return ",".join(space() + part + space() for part in parts) or space()

    if isinstance(value, list):
        return f"[{joined(write_spaced(part, random) for part in value)}]"
    if isinstance(value, dict):
        members = value.items()
        return (
            "{"
            + joined(f"{json.dumps(k)}{space()}:{space()}{write_spaced(v, random)}" for k, v in members)
            + "}"
        )
    return json.dumps(value, ensure_ascii=random.random() < 0.5)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=4), st.randoms(), st.integers(1, 9))
def test_any_list_however_spaced_reads_as_json_does(tmp_path_factory, values, random, chunk):
    path = tmp_path_factory.getbasetemp() / "spaced.json"
    path.write_bytes(write_spaced(values, random).encode())
    with mock.patch.object(json_index, "_CHUNK", chunk):
        assert values_of(str(path)) == json.loads(path.read_bytes())


@settings(max_examples=300, deadline=None)
@given(st.lists(json_values, min_size=1, max_size=3), st.randoms(), st.data())
def test_a_damaged_list_is_refused_where_json_refuses_it(tmp_path_factory, values, random, data):
    text = write_spaced(values, random)
    at = data.draw(st.integers(1, len(text) - 1))
    cut = data.draw(st.integers(0, 2))
    text = text[:at] + data.draw(st.sampled_from(["", *'[]{},:"\\ 0\n\0'])) + text[at + cut :]
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(text.encode())
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as raised:
            values_of(str(path))
        assert f"{path}:{error.lineno}:{error.colno}: broken JSON ({error.msg});" in str(raised.value)
    else:
        assert values_of(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[1, 2", "1:6: broken JSON (Expecting ',' delimiter)"),
        ('[1, "2', "1:5: broken JSON (Unterminated string starting at)"),
        ('[{"a": 1}', "1:10: broken JSON (Expecting ',' delimiter)"),
        ("[1]\n[2]", "2:1: broken JSON (Extra data)"),
        ("[1]]", "1:4: broken JSON (Extra data)"),
        ("[1] \0", "1:5: broken JSON (Extra data)"),
        ("[}", "1:2: broken JSON (Expecting value)"),
        ("[" + deep(100_000) + "}", "1: JSON nested too deeply to be read."),
    ],
)
def test_a_list_that_does_not_close_is_refused_when_opened(write, text, place):
    path = write(text)
    with pytest.raises(DataError) as error:
        JsonIndex(path)
    assert str(error.value).startswith(f"{path}:{place}")


def test_a_comma_before_the_closing_bracket_is_refused_when_opened(write):
    with pytest.raises(DataError, match=r"data\.json:2:\d: broken JSON"):
        JsonIndex(write("[1,\n 2, ]"))


@pytest.mark.parametrize(
    ("text", "bad", "place"),
    [
        ('[{"id": 1},\n {"id" 2}]', 1, "2:8: broken JSON (Expecting ':' delimiter)"),
        ('["\u4e2d", "\u4e2d" 5]', 1, "1:11: broken JSON (Expecting ',' delimiter)"),
        ("[1,,2]", 1, "1:4: broken JSON (Expecting value)"),
        ("[1, nul, 2]", 1, "1:5: broken JSON (Expecting value)"),
        ('["a\nb"]', 0, "1:4: broken JSON (Invalid control character at)"),
        ('{"id": 1}\n\n{"id": }\n', 1, "3:8: broken JSON (Expecting value)"),
        ('{"id": 1} {"id": 2}', 0, "1:11: broken JSON (Extra data)"),
        ('{\n "data": []\n}', 0, "1:2: broken JSON (Expecting property name enclosed in double quotes)"),
        ("[1,\n" + deep(100_000) + "]", 1, "2: JSON nested too deeply to be read."),
        ("[1,\n" + "7" * 5000 + "]", 1, "2: JSON that cannot be read (Exceeds the limit"),
        ("\0\n", 0, "1:1: broken JSON (Expecting value)"),
    ],
)
def test_a_broken_value_is_named_when_it_is_read(write, text, bad, place):
    path = write(text)
    index = JsonIndex(path)
    for number in range(bad):
        assert index[number] is not None
    with pytest.raises(DataError) as error:
        index[bad]
    assert str(error.value).startswith(f"{path}:{place}")


def test_the_line_of_an_error_is_right_far_into_a_large_file(write, monkeypatch):
    monkeypatch.setattr(json_index, "_CHUNK", 64)
    path = write("\ufeff[" + "\u00e9,\n".replace("\u00e9", '"\u00e9"') * 100 + '   "\u00e9\u00e9" x]')
    with pytest.raises(DataError, match=r":101:9: broken JSON"):
        JsonIndex(path)[100]


@pytest.mark.parametrize("text", [b'[{"id": "\xff"}]', b'{"id": "\xff"}\n'])
def test_bytes_that_are_not_utf8_are_named(write, text):
    path = write(text)
    with pytest.raises(DataError, match=rf"is not UTF-8 text \(byte {text.index(255)}\); save it as UTF-8"):
        JsonIndex(path)[0]


def test_utf16_is_named(write):
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0\)"):
        values_of(write("[1]".encode("utf-16")))


@pytest.mark.parametrize(
    ("head", "kind"), [(b"PAR1\x15\x04", "Parquet"), (b"PK\x03\x04", "zip"), (b"\x1f\x8b\x08", "gzip")]
)
def test_other_formats_are_named(write, head, kind):
    with pytest.raises(DataError, match=rf"data\.parquet: is a {kind} file; convert it to JSON or JSONL"):
        JsonIndex(write(head + b"\0" * 9, "data.parquet"))


@pytest.mark.parametrize(
    ("name", "reason"), [("none.json", "No such file or directory"), ("", "Is a directory"), ("a\0b", "null")]
)
def test_unreadable_files_are_named_with_the_setting(tmp_path, name, reason):
    with pytest.raises(DataError, match=rf"cannot be read \(.*{reason}.*\); check data\.eval_path"):
        JsonIndex(f"{tmp_path}/{name}", "data.eval_path")


def test_a_device_is_refused():
    with pytest.raises(DataError, match=r"'/dev/null': is no regular file"):
        JsonIndex("/dev/null")


def test_the_digest_is_that_of_the_file(write):
    assert JsonIndex(write("[1]")).digest == hashlib.sha256(b"[1]").hexdigest()


def test_it_travels_to_another_process_unless_the_file_was_changed(write):
    path = write('["a", "b"]')
    sent = pickle.dumps(JsonIndex(path))
    assert pickle.loads(sent)[1] == "b"
    write('["a", "b", "c"]')
    with pytest.raises(DataError, match="was changed while it is in use"):
        pickle.loads(sent)


def test_a_hundred_thousand_records_are_read_in_any_order(write):
    values = [{"id": number, "text": 'x, "y" \\ {[ ' * (number % 7)} for number in range(100_000)]
    index = JsonIndex(write(json.dumps(values)))
    assert len(index) == len(values)
    for number in random.Random(0).sample(range(len(values)), 500):
        assert index[number] == values[number]
