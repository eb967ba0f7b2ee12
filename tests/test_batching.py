"""Which samples a step takes, and the arrays they become."""

import numpy as np
import pytest

from llava_jax.data.batching import (
    Sample,
    bucket_images,
    bucket_length,
    collate,
    epoch_order,
    rows_of_step,
)


def test_orders_are_known_permutations():
    # Pinned: a change would give resumed runs other samples.
    assert epoch_order(0, num_samples=8, seed=42, shuffle=True).tolist() == [7, 3, 4, 2, 5, 6, 0, 1]
    assert epoch_order(1, num_samples=8, seed=42, shuffle=True).tolist() == [5, 6, 4, 1, 0, 7, 2, 3]
    assert epoch_order(0, num_samples=8, seed=43, shuffle=True).tolist() == [0, 2, 1, 7, 6, 4, 5, 3]


def test_every_epoch_takes_every_sample_once():
    for epoch in range(3):
        assert sorted(epoch_order(epoch, num_samples=100, seed=1, shuffle=True)) == list(range(100))


def test_without_shuffling_the_order_is_that_of_the_file():
    assert epoch_order(3, num_samples=4, seed=1, shuffle=False).tolist() == [0, 1, 2, 3]


def test_processes_take_their_rows_of_every_microbatch():
    rows = [
        rows_of_step(np.array(own), batch_size=8, accumulation_steps=2).tolist() for own in ([0, 1], [2, 3])
    ]
    assert rows == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [
        (2048, [32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048]),
        (1000, [32, 64, 128, 256, 384, 512, 640, 768, 896, 1000]),
        (100, [32, 64, 96, 100]),
        (20, [20]),
    ],
)
def test_rows_have_few_lengths(max_length, lengths):
    assert sorted({bucket_length(length, max_length) for length in range(1, max_length + 1)}) == lengths
    assert all(bucket_length(length, max_length) >= length for length in range(1, max_length + 1))


def test_image_slots_are_powers_of_two():
    assert [bucket_images(count) for count in range(7)] == [0, 1, 2, 4, 4, 8, 8]


def test_samples_are_padded_on_the_right():
    image = np.full((1, 2, 2, 3), 7, np.uint8)
    samples = [
        Sample(np.array([1, -200, 5]), np.array([-100, -100, 5]), image),
        None,
        Sample(np.array([1, 6]), np.array([-100, 6]), image[:0]),
    ]
    batch = collate(samples, length=4, num_images=2, image_size=2)
    assert batch["tokens"].tolist() == [[1, -200, 5, 0], [0, 0, 0, 0], [1, 6, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100], [-100] * 4, [-100, 6, -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["images"].shape == (3, 2, 2, 2, 3)
    assert batch["images"].reshape(3, 2, -1).max(axis=-1).tolist() == [[7, 0], [0, 0], [0, 0]]
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": np.int32,
        "labels": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "images": np.uint8,
    }


def sample(*tokens, images=0, feature_ids=None):
    """Everything is labelled; the pixels of image i are the sample's first token plus i."""
    pixels = np.zeros((images, 2, 2, 3), int) + max(tokens[0], 0) + np.arange(images)[:, None, None, None]
    ids = None if feature_ids is None else np.array(feature_ids, np.int32)
    return Sample(np.array(tokens, np.int32), np.array(tokens, np.int32), pixels.astype(np.uint8), ids)


def test_samples_of_a_row_follow_each_other_as_segments():
    rows = [
        [sample(10, 11, 12, images=1), sample(20, 21), sample(30, 31, images=2)],
        None,
        [sample(40, 41)],
        [],
    ]
    batch = collate(rows, length=8, num_images=3, image_size=2)
    empty = [0] * 8
    assert batch["tokens"].tolist() == [
        [10, 11, 12, 20, 21, 30, 31, 0],
        empty,
        [40, 41, 0, 0, 0, 0, 0, 0],
        empty,
    ]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 0, 1, 0, 1, 0]
    assert batch["segment_ids"].tolist()[0] == [1, 1, 1, 2, 2, 3, 3, 0]
    assert batch["images"][:, :, 0, 0, 0].tolist() == [[10, 30, 31], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert "feature_ids" not in batch


def test_no_token_is_learnt_from_another_sample():
    batch = collate([[sample(10, 11), sample(20, 21, 22)]], length=6, num_images=0, image_size=2)
    assert batch["labels"].tolist() == [[-100, 11, -100, 21, 22, -100]]


def test_feature_ids_count_over_the_images_of_the_row():
    rows = [
        [
            sample(5, -200, -200, images=2, feature_ids=[0, 7, -1]),
            sample(6, 6),
            sample(-200, -200, 8, images=1, feature_ids=[3, -1, 0]),
        ],
        None,
    ]
    batch = collate(rows, length=9, num_images=3, image_size=2, features_per_image=4)
    assert batch["feature_ids"].dtype == np.int32
    at_images = batch["tokens"] == -200
    assert batch["feature_ids"][at_images].tolist() == [7, -1, 2 * 4 + 3, -1]


def test_rows_that_disagree_about_feature_ids_are_refused():
    with pytest.raises(AssertionError, match="lacks feature_ids"):
        collate([[sample(5, images=1)]], length=4, num_images=1, image_size=2, features_per_image=4)
    with pytest.raises(AssertionError, match="need features_per_image"):
        collate([[sample(5, images=1, feature_ids=[0])]], length=4, num_images=1, image_size=2)
