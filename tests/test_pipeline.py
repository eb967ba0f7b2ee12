"""The whole way from a records file to batches."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import DataConfig, ModelConfig, VisionConfig
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import ConfigError, DataError
from tests.tiny_tokenizer import pieces_of, write_tiny_tokenizer

VISION = VisionConfig(image_size=8, patch_size=4)
MODEL = ModelConfig(vision=VISION)
NUM_IMAGE_TOKENS = MODEL.num_image_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny_tokenizer(folder / "tokenizer.model")
    for value in range(4):
        Image.new("RGB", (8, 8), (value + 1, 0, 0)).save(folder / f"{value}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def record(number, image=None, question="cat", answer="dog"):
    places = "<image>\n" if isinstance(image, str) else "<image>" * len(image or [])
    conversations = [{"from": "human", "value": places + question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": conversations} | ({} if image is None else {"image": image})


def seven_records():
    """Samples of different lengths, told apart by their number of `cat`; two without, one with two images."""
    images = ["0.png", None, "1.png", ["2.png", "3.png"], None, "0.png", "1.png"]
    return [
        record(number, image, answer=" ".join(["cat"] * (number + 1))) for number, image in enumerate(images)
    ]


def make(folder, tokenizer, records, **settings):
    path = Path(tempfile.mkdtemp(dir=folder)) / "records.json"  # read lazily: pipelines may not share it
    path.write_text(json.dumps(records))
    own = {key: settings.pop(key) for key in list(settings) if key not in DataConfig.__dataclass_fields__}
    config = DataConfig(
        **{
            "path": str(path),
            "image_folder": str(folder),
            "batch_size": 4,
            "max_length": 512,
            "num_threads": 2,
            "cache_dir": "",
        }
        | settings
    )
    arguments = {"images": ImageProcessor.from_config(config, MODEL), "seed": 1} | own
    dataset, _ = open_datasets(config, seed=1)
    return Pipeline(config, dataset, tokenizer=tokenizer, **arguments)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert np.array_equal(first[key], second[key]), key


def test_a_batch_holds_the_tokens_and_images_of_its_samples(folder, tokenizer):
    records = [record(0, "2.png", answer="A cat"), record(1, ["3.png", "1.png"], answer="dog")]
    pipeline = make(folder, tokenizer, records, template="plain", shuffle=False, batch_size=2)
    batch = pipeline.batch(0)
    assert {key: value.shape for key, value in batch.items()} == {
        "tokens": (1, 2, 32),
        "labels": (1, 2, 32),
        "positions": (1, 2, 32),
        "segment_ids": (1, 2, 32),
        "images": (1, 2, 2, 8, 8, 3),
    }
    first, second = batch["tokens"][0]
    assert pieces_of(tokenizer, first[:8]) == "<s> IMG IMG IMG IMG _A _cat <0x0A>"
    assert pieces_of(tokenizer, second[:11]) == "<s> IMG IMG IMG IMG IMG IMG IMG IMG _dog <0x0A>"
    assert first[8:].max() == second[11:].max() == 0
    assert np.flatnonzero(batch["labels"][0, 0] != -100).tolist() == [5, 6, 7]
    assert np.flatnonzero(batch["labels"][0, 1] != -100).tolist() == [9, 10]
    assert batch["images"][0, :, :, 0, 0, 0].tolist() == [[3, 0], [4, 2]]


@pytest.mark.parametrize("num_threads", [0, 3])
def test_the_kth_batch_needs_no_batch_before_it(folder, tokenizer, num_threads):
    pipeline = make(folder, tokenizer, seven_records(), num_threads=num_threads)
    last = 2 * pipeline.steps_per_epoch + 1
    batches = list(pipeline.iterate(0, last))
    assert len(batches) == last == 5
    for step, batch in enumerate(batches):
        assert_equal(pipeline.batch(step), batch)
    for step, batch in enumerate(pipeline.iterate(3, last), start=3):
        assert_equal(batch, batches[step])


def test_nothing_is_yielded_when_nothing_is_left(folder, tokenizer):
    assert list(make(folder, tokenizer, seven_records()).iterate(2, 2)) == []


def test_every_epoch_sees_every_sample_once_in_another_order(folder, tokenizer):
    pipeline = make(folder, tokenizer, seven_records())
    assert (pipeline.num_samples, pipeline.steps_per_epoch) == (7, 2)
    epochs = [
        np.concatenate(pipeline.step_rows(2 * epoch) + pipeline.step_rows(2 * epoch + 1)) for epoch in (0, 1)
    ]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    cat = tokenizer.encode("cat")[0]
    for step in range(4):
        cats = np.count_nonzero(pipeline.batch(step)["labels"][0] == cat, axis=1)
        assert cats.tolist() == [sum(id + 1 for id in row) for row in pipeline.step_rows(step)]


def test_empty_rows_fill_the_last_step(folder, tokenizer):
    batch = make(folder, tokenizer, seven_records(), shuffle=False).batch(1)
    assert batch["segment_ids"][0].max(axis=1).tolist() == [1, 1, 1, 0]
    assert batch["labels"][0, 3].max() == -100


ORDERS = ({}, {"group_by_modality_length": True}, {"packing": True, "row_length": 512})


@pytest.mark.parametrize("settings", ORDERS, ids=["shuffled", "grouped", "packed"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_the_rows_of_all_processes_are_the_rows_of_one(folder, tokenizer, settings, process_count):
    def batches(**processes):
        settings_ = {"batch_size": 8, "accumulation_steps": 2} | settings | processes
        return list(make(folder, tokenizer, seven_records() * 3, **settings_).iterate(0, 3))

    one = batches()
    several = [batches(own_rows=rows) for rows in np.split(np.arange(4), process_count)]
    for step, whole in enumerate(one):
        parts = [batches[step] for batches in several]
        assert_equal(whole, {key: np.concatenate([part[key] for part in parts], axis=1) for key in whole})


@pytest.mark.parametrize("settings", ORDERS, ids=["shuffled", "grouped", "packed"])
@pytest.mark.parametrize("num_threads", [0, 1, 2])
def test_batches_do_not_depend_on_threads_or_on_where_loading_starts(
    folder, tokenizer, settings, num_threads
):
    pipeline = make(folder, tokenizer, seven_records() * 3, **settings, num_threads=num_threads)
    for step, batch in enumerate(pipeline.iterate(1, 4), start=1):
        assert_equal(batch, pipeline.batch(step))


def test_a_packed_row_holds_samples_one_after_the_other(folder, tokenizer):
    pipeline = make(folder, tokenizer, seven_records(), packing=True, max_images_per_row=6, batch_size=1)
    assert pipeline.steps_per_epoch == 1
    (ids,) = pipeline.step_rows(0)
    assert sorted(ids) == list(range(7))
    batch = {key: value[0, 0] for key, value in pipeline.batch(0).items()}
    cat = tokenizer.encode("cat")[0]
    begin = 0
    for segment, id in enumerate(ids, start=1):
        length = pipeline.measured.lengths[id]
        place = slice(begin, begin + length)
        assert (batch["segment_ids"][place] == segment).all()
        assert batch["positions"][place].tolist() == list(range(length))
        assert np.count_nonzero(batch["labels"][place] == cat) == id + 1
        begin += length
    assert (batch["segment_ids"][begin:] == 0).all()
    named = [seven_records()[id].get("image", []) for id in ids]
    values = [int(name[0]) + 1 for names in named for name in ([names] if isinstance(names, str) else names)]
    assert batch["images"][: len(values), 0, 0, 0].tolist() == values


def test_processes_agree_on_shapes_when_their_rows_differ(folder, tokenizer):
    records = [record(0), record(1, ["0.png", "1.png"], answer="cat " * 200)]
    shapes = []
    for row in range(2):
        pipeline = make(folder, tokenizer, records, batch_size=2, shuffle=False, own_rows=np.array([row]))
        shapes.append({key: value.shape for key, value in pipeline.batch(0).items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["images"] == (1, 1, 2, 8, 8, 3)


def test_accumulation_only_arranges_rows(folder, tokenizer):
    whole = make(folder, tokenizer, seven_records()).batch(0)
    split = make(folder, tokenizer, seven_records(), accumulation_steps=2).batch(0)
    assert split["images"].shape[:2] == (2, 2)
    assert_equal(whole, {key: value.reshape(1, 4, *value.shape[2:]) for key, value in split.items()})


def test_a_process_may_hold_rows_that_are_not_neighbours(folder, tokenizer):
    pipelines = [
        make(folder, tokenizer, seven_records(), batch_size=8, accumulation_steps=2, own_rows=own_rows)
        for own_rows in (None, np.array([0, 3]))
    ]
    whole, part = (pipeline.batch(0) for pipeline in pipelines)
    assert_equal(part, {key: value[:, [0, 3]] for key, value in whole.items()})


def test_rows_that_cannot_be_dealt_out_evenly_are_refused(folder, tokenizer):
    with pytest.raises(
        ConfigError, match=r"data\.batch_size=4 is not a multiple of train\.accumulation_steps=3"
    ):
        make(folder, tokenizer, seven_records(), accumulation_steps=3)


def test_a_batch_of_text_has_no_image_slots(folder, tokenizer):
    pipeline = make(folder, tokenizer, [record(0), record(1)], batch_size=2)
    assert pipeline.batch(0)["images"].shape == (1, 2, 0, 8, 8, 3)


def test_the_summary_counts(folder, tokenizer):
    records = [record(0, "0.png"), record(1), record(2, ["1.png", "2.png"])]
    lengths = make(folder, tokenizer, records).summary()
    assert {
        key: lengths[key] for key in ("samples", "samples_with_image", "samples_text_only", "images")
    } == {
        "samples": 3,
        "samples_with_image": 2,
        "samples_text_only": 1,
        "images": 3,
    }
    assert lengths["supervised_tokens"] == 3 * len(["_dog", "</s>"])
    assert lengths["samples_truncated"] == lengths["samples_teaching_nothing"] == 0


def test_the_summary_counts_what_truncation_cuts(folder, tokenizer):
    records = [*(record(number) for number in range(20)), record(20, "0.png")]
    longest = make(folder, tokenizer, records).summary()["longest_sample"]
    cut = make(folder, tokenizer, records, max_length=longest - 1).summary()
    assert (cut["samples_truncated"], cut["longest_sample"], cut["supervised_tokens"]) == (1, longest - 1, 41)
    cut = make(folder, tokenizer, records, max_length=longest - 2).summary()
    assert (cut["samples_truncated"], cut["samples_teaching_nothing"]) == (1, 1)


def test_data_in_which_a_tenth_teaches_nothing_is_refused(folder, tokenizer):
    records = [*(record(number) for number in range(9)), record(9, "0.png")]
    longest = make(folder, tokenizer, records).summary()["longest_sample"]
    with pytest.raises(
        DataError, match=r"1 of 10 samples teach nothing, because data\.max_length=\d+ cuts off"
    ):
        make(folder, tokenizer, records, max_length=longest - 2)


def test_long_samples_can_be_an_error(folder, tokenizer):
    records = [record(0), record(1, answer="cat " * 200)]
    with pytest.raises(
        DataError, match=r"1 problem; .*\n  record 1 \(id 1\): its \d+ tokens exceed data\.max_length=300"
    ):
        make(folder, tokenizer, records, max_length=300, too_long="error")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(9, "0.png") | {"image": "none.png"}, "image 'none.png' is not in image_folder"),
        (record(9, answer=""), "there is nothing to learn"),
        (record(9) | {"image": "0.png"}, "its text has 0 <image> for 1 images; write one for each."),
        (record(9, ["0.png"] * 3) | {"image": ["0.png"] * 2}, "its text has 3 <image> for 2 images"),
        (record(9, "0.png", answer="<image>"), "its text has 2 <image> for 1 images"),
        (
            record(9, "0.png", question="cat " * 400) | {"image": ["0.png"] * 2},
            "its text has 1 <image> for 2 images",
        ),
    ],
)
def test_bad_records_are_named_before_training(folder, tokenizer, bad, message):
    with pytest.raises(DataError) as error:
        make(folder, tokenizer, [record(0, "0.png"), bad])
    assert "records.json: 1 problem; correct or remove these records:\n  record 1 (id 9): " in str(
        error.value
    )
    assert message in str(error.value)


def test_a_broken_image_is_named_when_it_is_loaded(folder, tokenizer):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    pipeline = make(folder, tokenizer, [record(7, "broken.png")], batch_size=1)
    for take in (lambda: pipeline.batch(0), lambda: next(pipeline.iterate(0, 1))):
        with pytest.raises(DataError, match=r"record 0 \(id 7\): .*broken\.png: "):
            take()


def test_the_fingerprint_changes_with_what_batches_depend_on(folder, tokenizer):
    records = [record(0, "0.png"), record(1, "1.png")]
    same = make(folder, tokenizer, records).fingerprint
    assert make(folder, tokenizer, records, num_threads=0, accumulation_steps=2).fingerprint == same
    changes = [
        {"template": "plain"},
        {"image_aspect_ratio": "square"},
        {"max_length": 256},
        {"batch_size": 2},
        {"shuffle": False},
        {"mask": "everything"},
        {"packing": True},
        {"packing": True, "row_length": 1024},
        {"group_by_modality_length": True},
        {"images": ImageProcessor(ModelConfig(vision=dataclasses.replace(VISION, image_size=16)))},
        {"images": ImageProcessor(dataclasses.replace(MODEL, select_feature="cls_patch"))},
        {"images": ImageProcessor(MODEL, max_pixels=4)},
        {"seed": 2},
    ]
    others = [make(folder, tokenizer, records, **change).fingerprint for change in changes]
    others.append(make(folder, tokenizer, records[::-1]).fingerprint)
    others.append(make(folder, load_tokenizer(str(folder), extra_tokens=["x"]), records).fingerprint)
    assert len({same, *others}) == 1 + len(others)


def test_data_needs_no_jax():
    import ast
    from pathlib import Path

    import llava_jax.data

    for path in Path(llava_jax.data.__path__[0]).glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"jax", "flax", "torch", "transformers"}


def broken_among(folder, number, count=40):
    """Records of which one has a damaged image, and one after it one that is readable."""
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    records = [record(id, "0.png" if id % 2 else None) for id in range(count)]
    records[number] = record(number, "broken.png", answer="cat cat")
    return records


def test_a_sample_with_a_broken_image_is_replaced_and_reported(folder, tokenizer):
    records = broken_among(folder, 3)
    skipping = make(folder, tokenizer, records, batch_size=8, on_bad_sample="skip", max_bad_share=0.05)
    records[3] = records[4]
    expected = make(folder, tokenizer, records, batch_size=8)
    for step, batch in enumerate(skipping.iterate(0, 5)):
        assert_equal(batch, expected.batch(step))
    (row,) = skipping.bad_samples.report()
    assert row["replaced_by"] == "record 4 (id 4)"
    assert "record 3 (id 3): " in row["problem"] and "broken.png" in row["problem"]


def test_records_that_cannot_be_read_are_left_out_and_reported(folder, tokenizer):
    records = [record(id) for id in range(50)]
    skipping = make(
        folder, tokenizer, [record(9, answer=""), *records], on_bad_sample="skip", max_bad_share=0.02
    )
    assert (skipping.num_samples, skipping.summary()["samples_unusable"]) == (50, 1)
    assert sorted(np.concatenate([id for step in range(13) for id in skipping.step_rows(step)])) == list(
        range(1, 51)
    )
    (row,) = skipping.bad_samples.report()
    assert row == {
        "sample": 0,
        "problem": "record 0 (id 9): there is nothing to learn: the assistant says nothing.",
    }


def test_too_many_bad_samples_end_the_run(folder, tokenizer):
    records = [record(id) for id in range(40)] + [record(99, answer="")] * 3
    with pytest.raises(
        DataError, match=r"3 of 43 samples cannot be used, more than data\.max_bad_share=0\.05 allows"
    ):
        make(folder, tokenizer, records, on_bad_sample="skip", max_bad_share=0.05)
    records = broken_among(folder, 3)
    records[5] = records[7] = records[3]
    pipeline = make(folder, tokenizer, records, on_bad_sample="skip", max_bad_share=0.05, num_threads=0)
    with pytest.raises(DataError, match=r"3 of 40 samples cannot be used"):
        list(pipeline.iterate(0, pipeline.steps_per_epoch))


def test_images_behind_the_cut_are_not_loaded(folder, tokenizer):
    records = [record(id) for id in range(20)]
    turns = record(99, ["1.png"])["conversations"] + record(99, ["2.png"], "cat " * 600)["conversations"]
    records[3] = {"id": 99, "image": ["1.png", "2.png"], "conversations": turns}
    pipeline = make(folder, tokenizer, records, shuffle=False)
    batch = pipeline.batch(0)
    assert batch["images"].shape[2] == 1
    assert np.count_nonzero(batch["tokens"][0, 3] == -200) == NUM_IMAGE_TOKENS


def test_shapes_are_known_before_training(folder, tokenizer):
    pipeline = make(folder, tokenizer, seven_records() * 3)
    shapes = {
        (batch["tokens"].shape[-1], batch["images"].shape[2])
        for batch in pipeline.iterate(0, pipeline.steps_per_epoch)
    }
    assert shapes == set(pipeline.shapes(0, pipeline.steps_per_epoch))


def test_a_bad_sample_that_nothing_can_replace_is_left_out(folder, tokenizer):
    records = [record(id, "0.png", answer="cat cat cat") for id in range(40)]
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    records[3] = record(3, "broken.png", question="", answer="cat")
    pipeline = make(folder, tokenizer, records, shuffle=False, on_bad_sample="skip", max_bad_share=0.05)
    assert pipeline.batch(0)["segment_ids"][0].max(axis=1).tolist() == [1, 1, 1, 0]
    (row,) = pipeline.bad_samples.report()
    assert (row["sample"], row["replaced_by"]) == (3, None)


def test_bad_samples_are_counted_on_after_a_restart(folder, tokenizer, tmp_path):
    records = broken_among(folder, 3)
    records[5] = records[7] = records[3]
    settings = {
        "on_bad_sample": "skip",
        "max_bad_share": 0.05,
        "num_threads": 0,
        "report": tmp_path / "bad.jsonl",
    }
    with pytest.raises(DataError, match=r"3 of 40 samples cannot be used"):
        list(make(folder, tokenizer, records, **settings).iterate(0, 10))
    again = make(folder, tokenizer, records, **settings)
    assert [row["sample"] for row in again.bad_samples.report()] == [3, 5, 7]
    with pytest.raises(DataError, match=r"3 of 40 samples cannot be used"):
        list(again.iterate(0, 10))


def test_frames_that_came_after_measuring_are_noticed(folder, tokenizer, tmp_path):
    (tmp_path / "clip").mkdir()
    for frame in range(2):
        shutil.copy(folder / "0.png", tmp_path / f"clip/{frame}.png")
    video = {
        "video": "clip",
        "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A"}],
    }
    settings = {"image_folder": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "batch_size": 1}
    before = make(folder, tokenizer, [video], **settings)
    shutil.copy(folder / "0.png", tmp_path / "clip/2.png")
    stale = make(folder, tokenizer, [video], **settings)
    with pytest.raises(DataError, match=r"3 images now, not \d+ and 2 as when it was measured"):
        stale.batch(0)
    fresh = make(folder, tokenizer, [video], overwrite_cache=True, **settings)
    assert fresh.batch(0)["images"].shape[2] == 4
    assert before.fingerprint == stale.fingerprint != fresh.fingerprint


def test_a_records_file_that_changes_during_training_is_noticed(folder, tokenizer):
    pipeline = make(folder, tokenizer, seven_records())
    path = Path(pipeline.dataset.sources[0].index.path)
    path.write_text(path.read_text().replace("cat", "dog") + " ")
    with pytest.raises(DataError, match="was changed while it is in use"):
        pipeline.batch(0)
