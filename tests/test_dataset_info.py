"""The list of data sets in dataset_info.json."""

import json

import pytest

from llava_jax.data.dataset_info import read_dataset_info
from llava_jax.data.formats import Alpaca
from llava_jax.errors import ConfigError


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
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    said = demo.format.read({"messages": messages}, "record 0")
    assert said.turns == (("human", "Hi"), ("gpt", "Hello"))


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
            "formatting 'parquet' is not one of 'llava', 'alpaca', 'sharegpt', 'openai', 'text'",
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
