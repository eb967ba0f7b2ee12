"""Which samples share a row, and in which order an epoch takes the rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data.packing import Packing, default_max_images, epoch_rows, pack
from llava_jax.errors import DataError


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing.row(number).tolist() for number in range(packing.num_rows)]


def mixed_samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and images int32[count]: nine of ten samples have an image of 576 tokens, some two."""
    random = np.random.default_rng(seed)
    num_images = random.choice([0, 1, 2], count, p=[0.1, 0.85, 0.05]).astype(np.int32)
    text = random.gamma(2.0, np.where(num_images == 0, 500, 120)).astype(np.int32)
    return np.minimum(36 + text + 576 * num_images, 2048), num_images


def test_rows_are_known():
    # Pinned: a change would give resumed runs other rows.
    lengths = np.array([6, 5, 5, 4, 3, 3, 2, 2, 1, 1])
    num_images = np.array([1, 1, 0, 1, 0, 1, 0, 1, 0, 0])
    packing = pack(lengths, num_images, row_length=8, max_images=2, seed=7)
    assert rows_of(packing) == [[7, 9, 6, 4], [1, 5], [0, 8], [2], [3]]
    assert packing.totals(lengths).tolist() == [8, 8, 7, 5, 4]
    assert packing.totals(num_images).tolist() == [1, 2, 1, 0, 1]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=80),
    row_length=st.integers(30, 70),
    max_images=st.integers(3, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_is_in_one_row_and_no_row_exceeds_a_limit(sizes, row_length, max_images, seed):
    lengths, num_images = np.array(sizes, np.int32).reshape(-1, 2).T
    packing = pack(lengths, num_images, row_length=row_length, max_images=max_images, seed=seed)
    rows = rows_of(packing)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(sizes)))
    assert all(rows)
    assert all(lengths[row].sum() <= row_length and num_images[row].sum() <= max_images for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(8, 20), st.integers(0, 2)), min_size=1, max_size=9),
    max_images=st.integers(2, 5),
)
def test_a_few_samples_fill_a_row_as_well_as_any_choice_of_them(sizes, max_images):
    """All subsets are tried; rows this short give up no token for an even number of images."""
    lengths, num_images = np.array(sizes).T
    packing = pack(lengths, num_images, row_length=40, max_images=max_images, seed=0)
    first = packing.row(0)
    oldest = first[0]  # which every row starts with
    others = [id for id in range(len(sizes)) if id != oldest]
    totals = [
        int(lengths[ids].sum())
        for n in range(len(sizes))
        for rest in itertools.combinations(others, n)
        if num_images[ids := [oldest, *rest]].sum() <= max_images and lengths[ids].sum() <= 40
    ]
    assert lengths[first].sum() == max(totals)


def test_nearly_no_token_of_a_realistic_mix_is_wasted():
    lengths, num_images = mixed_samples(6000)
    max_images = default_max_images(lengths, num_images, row_length=8192)
    packing = pack(lengths, num_images, row_length=8192, max_images=max_images, seed=0)
    assert lengths.sum() / (packing.num_rows * 8192) > 0.99
    assert num_images.sum() / (packing.num_rows * max_images) > 0.85


def test_the_seed_decides():
    lengths, num_images = mixed_samples(200)
    packings = [
        rows_of(pack(lengths, num_images, row_length=4096, max_images=6, seed=seed)) for seed in (0, 0, 1)
    ]
    assert packings[0] == packings[1] != packings[2]


@pytest.mark.parametrize(("row_length", "max_images"), [(8, 3), (9, 1)])
def test_a_sample_that_does_not_fit_is_named(row_length, max_images):
    with pytest.raises(DataError) as error:
        pack(np.array([3, 9]), np.array([0, 2]), row_length=row_length, max_images=max_images, seed=0)
    assert str(error.value).startswith(
        f"sample 1 with 9 tokens and 2 images does not fit into a packed row of {row_length} tokens and "
        f"{max_images} images"
    )


@pytest.mark.parametrize(
    ("lengths", "num_images", "slots"),
    [
        ([100] * 50, [0] * 50, 0),
        ([100] * 50, [1] * 50, 10),  # ten samples fill a row of 1000
        ([100] * 40 + [500] * 8, [1] * 40 + [0] * 8, 5),  # half the tokens have images
        ([100] * 50, [0] * 49 + [7], 7),  # the sample with most images must fit
    ],
)
def test_rows_have_the_image_slots_that_the_data_need(lengths, num_images, slots):
    assert default_max_images(np.array(lengths), np.array(num_images), row_length=1000) == slots


@settings(max_examples=60, deadline=None)
@given(
    row_images=st.lists(st.integers(0, 12), min_size=1, max_size=300),
    rows_per_step=st.integers(1, 24),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_every_row_once_and_fills_its_last_step(row_images, rows_per_step, epoch):
    order = epoch_rows(np.array(row_images), epoch, seed=5, rows_per_step=rows_per_step)
    num_steps = -(-len(row_images) // rows_per_step)
    assert len(order) == num_steps * rows_per_step
    assert sorted(order[order >= 0]) == list(range(len(row_images)))
    last = (num_steps - 1) * rows_per_step
    assert order[:last].min(initial=0) >= 0


def test_epochs_take_rows_in_different_orders():
    orders = [
        epoch_rows(np.full(50, 3), epoch, seed=seed, rows_per_step=4).tolist()
        for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("rows_per_step", [32, 128])
def test_ranks_have_nearly_the_same_number_of_images(rows_per_step):
    """Rows as uneven as can be: as many with 0 images as with 1, 2, ... and 12."""
    row_images = np.arange(13 * 500) % 13
    order = epoch_rows(row_images, 0, seed=0, rows_per_step=rows_per_step)
    num_steps = len(row_images) // rows_per_step
    steps = row_images[order[: num_steps * rows_per_step]].reshape(num_steps, rows_per_step)
    neighbours = steps.sum(axis=1)[: num_steps // 16 * 16].reshape(-1, 16)
    assert (np.ptp(neighbours, axis=1) <= 12).all()
    for ranks in (2, 4, 8):
        of_ranks = steps.reshape(num_steps, ranks, -1).sum(axis=2)
        assert np.ptp(of_ranks, axis=1).mean() <= 3
        in_ten_steps = of_ranks[: num_steps // 10 * 10].reshape(-1, 10, ranks).sum(axis=1)
        assert (np.ptp(in_ten_steps, axis=1) <= 0.05 * in_ten_steps.mean(axis=1)).all()


def test_the_empty_rows_of_the_last_step_are_spread_over_the_ranks():
    order = epoch_rows(np.full(12, 9), 0, seed=0, rows_per_step=8)
    assert (order[8:].reshape(2, 2, 2) >= 0).sum(axis=2).tolist() == [[1, 1], [1, 1]]
