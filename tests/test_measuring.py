"""Lengths of samples: measured in processes or here, kept, and measured again when they must be."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import DataConfig, ModelConfig, VisionConfig
from llava_jax.data import measuring
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.measuring import COLUMNS, measure
from llava_jax.data.processes import map_in_processes
from llava_jax.data.samples import SampleReader
from llava_jax.data.soundness import find_problems, require_sound
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import ConfigError, DataError
from llava_jax.metrics import Counter
from tests.tiny_tokenizer import write_tiny_tokenizer

MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4), image_grid_pinpoints=((16, 8), (8, 16)), select_layer=-2
)


@pytest.fixture
def folder(tmp_path):
    write_tiny_tokenizer(tmp_path / "tokenizer.model")
    for value in range(3):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / f"{value}.png")
    return tmp_path


def record(number, *images, answer="dog", question="cat"):
    turns = [
        {"from": "human", "value": "<image>" * len(images) + question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": number, "conversations": turns} | ({"image": list(images)} if images else {})


def some_records():
    """One with two images, one without, a broken one, a cut one."""
    return [
        record(0, "0.png", "1.png", answer="cat dog"),
        record(1, answer="cat cat dog cat dog"),
        record(2, answer=""),
        record(3, "2.png"),
        record(4, question="cat " * 300, answer="dog " * 9),
    ]


def make_reader(folder, records=None, model=MODEL, **settings):
    path = folder / f"{settings.pop('file', 'records')}.json"
    if records is not None:
        path.write_text(json.dumps(records))
    defaults = {"path": str(path), "image_folder": str(folder), "max_length": 300, "cache_dir": ""}
    config = DataConfig(**defaults | settings)
    dataset, _ = open_datasets(config, seed=0)
    tokenizer = load_tokenizer(str(folder))
    return SampleReader(dataset, config, tokenizer, ImageProcessor.from_config(config, model))


def assert_same(first, second):
    for column in (*COLUMNS, "image_owners"):
        assert getattr(first, column).dtype == getattr(second, column).dtype == np.int32
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column), err_msg=column)
    assert first.problems == second.problems
    assert first.image_paths == second.image_paths


@pytest.fixture
def measured_ids(monkeypatch):
    """The ids that are measured in this process, in order."""
    ids, outline = [], SampleReader.outline

    def noting(self, id):
        ids.append(id)
        return outline(self, id)

    monkeypatch.setattr(SampleReader, "outline", noting)
    return ids


def test_measurements_of_a_few_records(folder):
    measured = measure(make_reader(folder, some_records()), cache_dir="")
    assert measured.num_supervised.tolist() == [3, 6, 0, 2, 0]
    assert measured.num_images.tolist() == measured.num_tiles.tolist() == [2, 0, 0, 1, 0]
    assert measured.problems == {2: "record 2 (id 2): there is nothing to learn: the assistant says nothing."}
    assert measured.image_owners.tolist() == [0, 0, 3]
    assert measured.image_paths == ["0.png", "1.png", "2.png"]


def test_lengths_are_those_of_the_tokens_that_are_trained_on(folder):
    reader = make_reader(folder, some_records(), template="plain", mask="everything", max_length=7)
    measured = measure(reader, cache_dir="")
    assert sorted(measured.problems) == [1, 2, 4]  # not captions
    for id in (0, 3):
        sample = reader.read(id)
        assert measured.lengths[id] == len(sample.tokens) <= 7 == reader.config.max_length
        assert measured.num_images[id] == len(sample.images)
    # <s>, two images of four tokens, then _cat _dog \n; the second image would be cut through.
    assert (measured.full_lengths[0], measured.lengths[0], measured.num_images[0]) == (12, 5, 1)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_processes_measure_what_this_one_does_and_tell_how_far_they_are(folder, monkeypatch, num_processes):
    records = some_records() * 3
    expected = measure(make_reader(folder, records), cache_dir="", num_processes=0)
    monkeypatch.setattr(measuring, "_CHUNK", 4)
    told = []
    found = measure(
        make_reader(folder, records),
        cache_dir="",
        num_processes=num_processes,
        progress=lambda *counts: told.append(counts),
    )
    assert_same(found, expected)
    assert told == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_what_a_process_cannot_do_is_raised_here(folder, monkeypatch):
    monkeypatch.setattr(measuring, "_CHUNK", 2)
    reader = make_reader(
        folder, some_records(), template="llama_3"
    )  # the tokenizer lacks its special strings
    with pytest.raises(ConfigError, match="no special token") as here:
        measure(reader, cache_dir="", num_processes=0)
    with pytest.raises(ConfigError) as there:
        measure(reader, cache_dir="", num_processes=2)
    assert str(there.value) == str(here.value)
    reader = make_reader(folder, some_records())
    (folder / "records.json").write_text("[]")  # processes open it themselves
    with pytest.raises(DataError, match="was changed while it is in use"):
        measure(reader, cache_dir="", num_processes=2)


def test_a_process_that_dies_is_reported():
    with (
        pytest.raises(RuntimeError, match="ended early with status 3"),
        map_in_processes(os._exit, [3, 3, 3], 2) as results,
    ):
        list(results)


def test_what_a_function_prints_does_not_come_between_answers():
    with map_in_processes(print, ["noise"] * 3, 2) as results:
        assert list(results) == [None] * 3


def test_processes_end_when_the_caller_stops_early():
    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        map_in_processes(time.sleep, [0.0, *[5.0] * 100], 2) as results,
    ):
        next(results)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 4


def test_processes_end_when_the_caller_is_killed():
    script = (
        "import time\n"
        "from llava_jax.data.processes import map_in_processes\n"
        "with map_in_processes(time.sleep, [0.1] * 1000, 2) as results:\n"
        "    for _ in results: print('one', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "one\n"
    process.kill()
    # Processes have the caller's stderr; it ends when the last of them does.
    assert process.communicate(timeout=20)[1] == ""


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
print("script runs")
from llava_jax.data.processes import map_in_processes
with map_in_processes(abs, [-1, 2, -3], 2) as results:
    print(*results)
""")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    assert (result.stdout, result.stderr) == ("script runs\n1 2 3\n", "")


def test_what_was_measured_is_kept(folder, measured_ids):
    cache = folder / "a/cache"
    expected = measure(make_reader(folder, some_records()[:2]), cache_dir=str(cache))
    assert measured_ids == [0, 1]
    told = []
    found = measure(make_reader(folder), cache_dir=str(cache), progress=lambda *counts: told.append(counts))
    assert_same(found, expected)
    assert (measured_ids, told) == ([0, 1], [])
    measure(make_reader(folder), cache_dir=str(cache), overwrite_cache=True)
    assert measured_ids == [0, 1, 0, 1]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"records": [record(0, "0.png"), record(1, answer="cat")]},
        {"template": "llama_2"},
        {"max_length": 299},
        {"mask": "last_answer"},
        {"too_long": "error"},
        {"max_samples": 1},
        {"image_aspect_ratio": "anyres"},
        {"image_max_pixels": 16},
        {"model": dataclasses.replace(MODEL, select_feature="cls_patch")},
        {"model": dataclasses.replace(MODEL, vision=VisionConfig(image_size=16, patch_size=4))},
        {"video_frames": 3},
        {"image_folder": "."},
        {"tokenizer_config": {"legacy": True}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_was_measured_otherwise_is_not_used(folder, measured_ids, settings):
    cache = str(folder / "cache")
    records = [record(0, "0.png"), record(1)]
    measure(make_reader(folder, records), cache_dir=cache)
    measured_ids.clear()
    if "tokenizer_config" in settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings.pop("tokenizer_config")))
    measure(make_reader(folder, **settings), cache_dir=cache)
    assert measured_ids == list(range(settings.get("max_samples", 2)))


def test_what_samples_do_not_depend_on_leaves_the_cache_valid(folder, measured_ids):
    cache = str(folder / "cache")
    measure(make_reader(folder, some_records()[:2]), cache_dir=cache)
    measured_ids.clear()
    measure(make_reader(folder, batch_size=3, shuffle=False, num_threads=1), cache_dir=cache)
    assert measured_ids == []


def test_problems_are_looked_at_again(folder, measured_ids):
    cache = str(folder / "cache")
    records = [record(0, "0.png"), record(1, "late.png"), record(2, answer=""), record(3)]
    reader = functools.partial(make_reader, folder, records, image_aspect_ratio="anyres")
    before = measure(reader(), cache_dir=cache)
    assert sorted(before.problems) == [1, 2] and before.image_paths == ["0.png"]
    measured_ids.clear()
    Image.new("RGB", (16, 8)).save(folder / "late.png")
    after = measure(reader(), cache_dir=cache)
    assert (measured_ids, sorted(after.problems)) == ([1, 2], [2])
    assert (after.image_owners.tolist(), after.image_paths) == ([0, 1], ["0.png", "late.png"])
    assert_same(after, measure(reader(), cache_dir=""))
    measured_ids.clear()
    assert_same(after, measure(reader(), cache_dir=cache))
    assert measured_ids == [2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_cache_is_replaced(folder, measured_ids, capsys, damage):
    cache = folder / "cache"
    reader = make_reader(folder, some_records()[:2])
    expected = measure(reader, cache_dir=str(cache))
    (file,) = cache.iterdir()
    good = file.read_bytes()
    positions = range(0, len(good), 97)
    damaged = {
        "cut": [good[:position] for position in positions],
        "flipped": [
            good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :] for position in positions
        ],
        "empty": [b""],
    }
    for data in damaged[damage]:
        file.write_bytes(data)
        measured_ids.clear()
        assert_same(measure(reader, cache_dir=str(cache)), expected)
        assert measured_ids == [0, 1] and "is damaged; it is made anew." in capsys.readouterr().out
        assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(folder, capsys):
    (folder / "file").write_text("")
    reader = make_reader(folder, some_records())
    for cache in (folder / "file", folder / "file/below", Path("/proc/cache")):
        assert_same(measure(reader, cache_dir=str(cache)), measure(reader, cache_dir=""))
        told = capsys.readouterr().out
        assert f"cannot be kept in {cache} (" in told and "set data.cache_dir to another directory" in told


def test_several_can_write_the_same_cache_at_once(folder):
    cache = folder / "cache"
    readers = [make_reader(folder, some_records()), *(make_reader(folder) for _ in range(7))]
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda reader: measure(reader, cache_dir=str(cache)), readers))
    for measured in [*found, measure(readers[0], cache_dir=str(cache))]:
        assert_same(measured, found[0])
    assert len(list(cache.iterdir())) == 1


def test_images_are_looked_for_at_every_start(folder):
    cache = str(folder / "cache")
    records = [record(0, "0.png"), record("a: b", "0.png", "1.png"), record(2)]
    reader = make_reader(folder, records)
    assert find_problems(reader.dataset, measure(reader, cache_dir=cache)) == {}
    (folder / "1.png").unlink()
    reader = make_reader(folder)
    assert find_problems(reader.dataset, measure(reader, cache_dir=cache)) == {
        1: f"record 1 (id 'a: b'): image '1.png' is not in image_folder {str(folder)!r}."
    }


def test_of_many_missing_images_the_first_are_named_by_id_and_all_by_number(folder, monkeypatch):
    monkeypatch.setattr("llava_jax.data.soundness._MOST_NAMED_BY_ID", 2)
    reader = make_reader(folder, [record(10 + number, f"no{number}.png") for number in range(4)])
    problems = find_problems(reader.dataset, measure(reader, cache_dir=""))
    assert [problem.partition(":")[0] for problem in problems.values()] == [
        "record 0 (id 10)",
        "record 1 (id 11)",
        "record 2",
        "record 3",
    ]


def test_an_image_folder_that_is_none_is_one_problem_not_many(folder):
    reader = make_reader(folder, [record(0, "0.png"), record(1, "0.png", "1.png")], image_folder="/nowhere")
    measured = measure(reader, cache_dir="")
    with pytest.raises(
        DataError, match=r"records\.json: image_folder='/nowhere' is no directory; it should hold the 3 "
    ):
        find_problems(reader.dataset, measured)
    reader = make_reader(folder, [record(0)], image_folder="/nowhere")
    assert find_problems(reader.dataset, measure(reader, cache_dir="")) == {}


def test_samples_whose_images_are_missing_do_not_hide_others_that_teach_nothing(folder):
    records = [record(id) for id in range(8)] + [record(8, question="cat " * 300), record(9, "none.png")]
    reader = make_reader(folder, records, on_bad_sample="skip", max_bad_share=0.5)
    measured = measure(reader, cache_dir="")
    with pytest.raises(DataError, match="1 of 9 samples teach nothing"):
        require_sound(reader.config, measured, find_problems(reader.dataset, measured))


def test_a_sample_with_more_images_than_a_packed_row_takes_is_refused(folder):
    records = [record(0), record(1, "0.png", "1.png"), record(2, "0.png", "1.png", "2.png")]
    for limit in (3, 2):
        reader = make_reader(folder, records, packing=True, max_images_per_row=limit)
        measured = measure(reader, cache_dir="")
        if limit == 3:
            require_sound(reader.config, measured, {})
    with pytest.raises(
        DataError, match=r"1 samples have more images.* than data\.max_images_per_row=2; raise it to 3"
    ):
        require_sound(reader.config, measured, {})


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("llava_jax.metrics.time.monotonic", lambda: self.now)


def test_a_counter_tells_every_ten_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    counter = Counter("measuring:")
    for seconds, done in ((1, 100), (9, 1000), (10, 2000), (15, 2500), (20, 3000), (24, 4000)):
        clock.now = 100.0 + seconds
        counter(done, 4000)
    assert capsys.readouterr().out.splitlines() == [
        "measuring: 2,000 of 4,000  ETA 0:00:10",
        "measuring: 3,000 of 4,000  ETA 0:00:07",
        "measuring: 4,000 of 4,000  took 0:00:24",
    ]


def test_a_short_count_is_not_told_and_a_second_one_starts_anew(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    counter = Counter("measuring:")
    for seconds, done in ((1, 5), (2, 10), (100, 1), (105, 10)):
        clock.now = 100.0 + seconds
        counter(done, 10)
    assert capsys.readouterr().out == ""
