"""Which records of which files a run trains and evaluates on."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from llava_jax.config import DataConfig
from llava_jax.data.dataset import open_datasets, split_dataset
from llava_jax.errors import ConfigError, DataError


def records(*ids, image=None):
    place, images = ("<image>", {"image": image}) if image else ("", {})
    return [
        {
            "id": id,
            "conversations": [{"from": "human", "value": f"{place}{id}?"}, {"from": "gpt", "value": "Yes"}],
        }
        | images
        for id in ids
    ]


@pytest.fixture
def write(tmp_path):
    def write(name, values):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
        return str(path)

    return write


def open_training(seed=1, **settings):
    return open_datasets(DataConfig(**settings), seed)[0]


def ids(dataset):
    return [record.turns[0][1].rstrip("?") for record in dataset]


def test_one_file_is_taken_in_order(write):
    dataset = open_training(path=write("a.json", records("x", "y")), image_folder="/images")
    assert (len(dataset), ids(dataset)) == (2, ["x", "y"])
    assert (dataset[1].name, dataset.folder(1).path) == ("record 1 (id 'y')", "/images")


def test_several_files_follow_each_other_and_name_their_records(write):
    path = f"{write('a.json', records('x', 'y'))}, {write('b.jsonl', records('z'))}"
    dataset = open_training(path=path)
    assert [record.name for record in dataset] == [
        "a.json: record 0 (id 'x')",
        "a.json: record 1 (id 'y')",
        "b.jsonl: record 0 (id 'z')",
    ]
    assert dataset.describe() == "a.json: 2 samples from 2 records\nb.jsonl: 1 samples from 1 records"


def test_files_of_the_same_name_are_told_apart_by_their_paths(write):
    one, other = write("one/a.json", records("x")), write("other/a.json", records("y"))
    assert [record.name.split(":")[0] for record in open_training(path=f"{one},{other}")] == [one, other]


def test_datasets_by_name_have_their_own_format_and_folder(write, tmp_path):
    write("task.json", [{"instruction": "x", "output": "Yes"}])
    write("chat.json", records("y", image="a.jpg"))
    write("captions.json", records("z", image="a.jpg"))
    write(
        "dataset_info.json",
        {
            "task": {"file_name": "task.json"},
            "chat": {"file_name": "chat.json", "formatting": "sharegpt", "image_folder": "pictures"},
            "captions": {"file_name": "captions.json", "formatting": "sharegpt"},
        },
    )
    settings = {"dataset": "chat,task,captions", "dataset_dir": str(tmp_path)}
    dataset = open_training(**settings)
    assert ids(dataset) == ["<image>y", "x", "<image>z"]
    assert [dataset.folder(id).path for id in range(len(dataset))] == [
        f"{tmp_path}/pictures",
        str(tmp_path),
        str(tmp_path),
    ]
    dataset = open_training(**settings, image_folder="/images")
    assert [dataset.folder(id).path for id in range(len(dataset))] == [
        f"{tmp_path}/pictures",
        "/images",
        "/images",
    ]
    assert dataset[1].name == "task: record 0"


def test_max_samples_takes_the_first_of_each_file(write):
    path = f"{write('a.json', records(*'uvw'))},{write('b.json', records(*'x'))},{write('c.json', records(*'yz'))}"
    assert ids(open_training(path=path, max_samples=2)) == list("uvxyz")


def test_num_samples_is_a_drawn_part_that_the_seed_decides(write, tmp_path):
    write("a.json", [{"instruction": str(number), "output": "Yes"} for number in range(100)])
    write("dataset_info.json", {"a": {"file_name": "a.json", "num_samples": 30}})
    settings = {"dataset": "a", "dataset_dir": str(tmp_path)}
    drawn = [int(id) for id in ids(open_training(**settings))]
    assert len(set(drawn)) == 30 and drawn == sorted(drawn) and drawn != list(range(30))
    assert [int(id) for id in ids(open_training(**settings))] == drawn
    assert [int(id) for id in ids(open_training(seed=2, **settings))] != drawn
    write("dataset_info.json", {"a": {"file_name": "a.json", "num_samples": 101}})
    with pytest.raises(ConfigError, match=r"'num_samples' of 'a' .* is 101, but the file has 100 records"):
        open_training(**settings)


def test_weights_say_how_often_samples_are_taken(write):
    names = [write(f"{name}.json", records(*(f"{name}{number}" for number in range(40)))) for name in "abc"]
    path = ",".join(names)
    taken = ids(open_training(path=path, weights=(1.0, 0.5, 2.5)))
    counts = {name: [taken.count(f"{name}{number}") for number in range(40)] for name in "abc"}
    assert counts["a"] == [1] * 40
    assert sorted(counts["b"]) == [0] * 20 + [1] * 20
    assert sorted(counts["c"]) == [2] * 20 + [3] * 20
    assert counts["b"] != [count - 2 for count in counts["c"]]
    assert ids(open_training(path=path, weights=(1.0, 0.5, 2.5))) == taken
    assert ids(open_training(path=path, weights=(1.0, 0.5, 2.5), seed=2)) != taken


def test_draws_are_the_same_on_every_machine(write):
    path = write("a.json", records(*range(12)))
    assert ids(open_training(path=path, weights=(0.5,), seed=42)) == ["0", "3", "4", "6", "7", "8"]


def test_weights_fit_the_files(write):
    path = write("a.json", records("x"))
    with pytest.raises(ConfigError, match=r"data\.weights has 2 numbers for 1 files; give one for each"):
        open_training(path=path, weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"data\.weights=\(0\.1,\) leave no sample"):
        open_training(path=path, weights=(0.1,))


@pytest.mark.parametrize(("val_size", "count"), [(0.25, 10), (0.001, 1), (1.0, 1), (7.0, 7), (39.0, 39)])
def test_what_is_evaluated_on_is_not_trained_on(write, val_size, count):
    path = f"{write('a.json', records(*range(30)))},{write('b.json', records(*range(30, 40)))}"
    training, evaluations = open_datasets(DataConfig(path=path, val_size=val_size, weights=(1.0, 3.0)), 1)
    trained, evaluated = ids(training), ids(evaluations[""])
    assert len(evaluated) == count
    assert {*trained, *evaluated} == {str(number) for number in range(40)}
    assert not {*trained} & {*evaluated}
    assert evaluated == sorted(evaluated, key=int)


def test_the_split_depends_on_the_seed(write):
    dataset = open_training(path=write("a.json", records(*range(40))))
    first, again, other = (ids(split_dataset(dataset, 0.5, seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("val_size", [2.0, 3.0, 0.9])
def test_a_split_leaves_both_sides_filled(write, val_size):
    with pytest.raises(ConfigError, match=rf"data\.val_size={val_size:g} would keep \d of 2 samples"):
        open_datasets(DataConfig(path=write("a.json", records("x", "y")), val_size=val_size), 1)


def test_evaluation_may_have_files_of_its_own(write):
    config = DataConfig(
        path=write("a.json", records(*"xy")), eval_path=write("b.json", records(*"uvw")), max_samples=2
    )
    training, evaluations = open_datasets(config, 1)
    assert (ids(training), ids(evaluations[""])) == (["x", "y"], ["u", "v"])


def test_evaluation_sets_are_told_apart_by_name(write):
    path, u, v = (write(f"{name}.json", records(*name)) for name in ("xy", "u", "v"))
    _, evaluations = open_datasets(DataConfig(path=path, eval_path=f"seen={u}, unseen={v}"), 1)
    assert {name: ids(data) for name, data in evaluations.items()} == {"seen": ["u"], "unseen": ["v"]}
    for wrong, message in ((f"seen={u},{v}", "for all, or for none"), (f"a={u},a={v}", "two sets one name")):
        with pytest.raises(ConfigError, match=message):
            open_datasets(DataConfig(path=path, eval_path=wrong), 1)


def test_evaluation_sets_may_be_datasets_of_dataset_info(write, tmp_path):
    path = write("a.json", records(*"xy"))
    write("held/u.json", [{"instruction": text, "output": "Yes"} for text in "uvw"])
    write("held/v.json", records("v", image="v.png"))
    entries = {"u": {"file_name": "u.json", "num_samples": 2}}
    entries |= {"v": {"file_name": "v.json", "formatting": "llava", "image_folder": "pictures"}}
    write("held/dataset_info.json", entries)
    held = str(tmp_path / "held")
    both = DataConfig(path=path, eval_dataset="u, v", dataset_dir=held)
    training, evaluations = open_datasets(both, 1)
    assert (ids(training), list(evaluations), len(evaluations[""])) == (["x", "y"], [""], 3)
    apart = DataConfig(dataset="v", eval_dataset="text=u,images=v", dataset_dir=held, max_samples=1)
    _, evaluations = open_datasets(apart, 1)
    assert {name: len(data) for name, data in evaluations.items()} == {"text": 1, "images": 1}
    assert evaluations["images"].folder(0).path == f"{held}/pictures"
    for wrong, message in (
        (
            "x=u,v",
            r"data\.eval_dataset='x=u,v' names some of its sets; write NAME=DATASET for all, or for none",
        ),
        ("uu", r"data\.eval_dataset='uu' is not in .*dataset_info\.json\. Did you mean 'u'\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_datasets(DataConfig(path=path, eval_dataset=wrong, dataset_dir=held), 1)


@pytest.mark.parametrize("others", [{"val_size": 1.0}, {"eval_path": "b.json"}])
def test_one_setting_says_what_is_evaluated_on(others):
    with pytest.raises(ConfigError, match=r"and data\.eval_dataset='u' say what to evaluate on; set one\."):
        DataConfig(path="a.json", eval_dataset="u", **others)


def test_without_evaluation_there_is_none(write):
    assert open_datasets(DataConfig(path=write("a.json", records("x"))), 1)[1] == {}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, r"nothing to train on: set data\.path .* or data\.dataset"),
        (
            {"path": "none.json"},
            DataError,
            r"'none\.json': cannot be read \(No such file or directory\); check data\.path",
        ),
        ({"path": "/"}, DataError, r"cannot be read \(Is a directory\); check data\.path"),
        ({"path": "a.json,,b.json"}, ConfigError, "has an empty name between its commas"),
        ({"path": "a.json, a.json"}, ConfigError, r"names 'a\.json' twice; .*data\.weights"),
    ],
)
def test_what_cannot_be_opened_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        open_training(**settings)


def test_a_named_dataset_without_file_names_its_entry(write, tmp_path):
    write("dataset_info.json", {"a": {"file_name": "none.json"}})
    with pytest.raises(
        DataError, match=r"none\.json': cannot be read .*; check 'file_name' of 'a' in dataset_info"
    ):
        open_training(dataset="a", dataset_dir=str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", " \n"])
def test_a_file_without_records_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: there is no record in this file"):
        open_training(path=str(tmp_path / "a.json"))


def test_a_broken_record_is_named_when_it_is_read(tmp_path, write):
    (tmp_path / "a.json").write_text('{"conversations": 1}\n{"id" 2}')
    dataset = open_training(path=f"{tmp_path / 'a.json'},{write('b.json', records('x'))}")
    with pytest.raises(DataError, match=r"^a\.json: record 0: 'conversations' should be a list"):
        dataset[0]
    with pytest.raises(DataError, match=r"^a\.json: record 1: .*a\.json:2:7: broken JSON"):
        dataset[1]
    assert ids([dataset[2]]) == ["x"]
    for number in (-1, 3):
        with pytest.raises(IndexError):
            dataset[number]


def test_the_fingerprint_tells_contents_and_choice_but_not_places(write):
    values = records(*range(20))
    first = write("a.json", values)
    same = open_training(path=first).fingerprint
    assert open_training(path=write("moved.json", values), image_folder="/images", seed=2).fingerprint == same
    others = [
        open_training(path=first, max_samples=2).fingerprint,
        open_training(path=first, weights=(2.0,)).fingerprint,
        open_training(path=first, val_size=1.0).fingerprint,
        open_training(path=first, val_size=1.0, seed=3).fingerprint,
        open_training(path=first, video_frames=4).fingerprint,
        open_training(path=write("other.json", values[::-1])).fingerprint,
        open_training(path=f"{first},{write('more.json', values)}").fingerprint,
    ]
    assert len({same, *others}) == len(others) + 1


def test_the_fingerprint_tells_how_records_are_read(write, tmp_path):
    write("a.json", records("x"))
    entry = {"file_name": "a.json", "formatting": "sharegpt"}
    write("dataset_info.json", {"a": entry, "b": entry | {"columns": {"system": "rules"}}})
    one, other = (open_training(dataset=name, dataset_dir=str(tmp_path)).fingerprint for name in "ab")
    assert one != other


def test_a_dataset_is_cheap_to_hold_and_to_send(write):
    path = write("a.json", records(*range(20_000)))
    tracemalloc.start()
    try:
        dataset = open_training(path=path, weights=(3.0,))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 16 * (20_000 + 60_000) + 100_000  # offsets and picks
    assert peak < held + (30 << 20)  # the chunk being scanned
    sent = pickle.dumps(dataset)
    assert len(sent) < 16 * (20_000 + 60_000) + 10_000
    received = pickle.loads(sent)
    assert received[59_999] == dataset[59_999]
    assert received.fingerprint == dataset.fingerprint
    assert np.array_equal(received.picks, dataset.picks)
