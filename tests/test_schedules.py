"""Which samples the rows of each step hold, in all three orders."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data.batching import epoch_order, rows_of_step
from llava_jax.data.schedules import PackedSchedule, PaddedSchedule, grouped_order

KINDS = ("shuffled", "grouped", "packed")


def make(kind, lengths, num_images, *, batch_size, accumulation_steps=1, seed=0):
    if kind == "packed":
        return PackedSchedule(
            lengths, num_images, batch_size=batch_size, row_length=128, max_images=4, seed=seed
        )
    orders = {
        "shuffled": partial(epoch_order, num_samples=len(lengths), seed=seed, shuffle=True),
        "grouped": partial(
            grouped_order,
            lengths=lengths,
            num_images=num_images,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            seed=seed,
        ),
    }
    return PaddedSchedule(lengths, num_images, orders[kind], batch_size=batch_size, max_length=64)


def samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(1, 65, count).astype(np.int32), random.integers(0, 3, count).astype(np.int32)


def epoch_of(schedule, epoch: int = 0) -> list[list[list[int]]]:
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    return [[row.tolist() for row in schedule.step_rows(step)] for step in steps]


def flat(nested) -> list[int]:
    return [id for step in nested for row in step for id in row]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 90), accumulation_steps=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_processes_together_load_the_rows_of_a_step_whatever_their_number(
    kind, count, accumulation_steps, seed
):
    lengths, num_images = samples(count, seed)
    arguments = {"batch_size": 32, "accumulation_steps": accumulation_steps, "seed": seed}
    schedule = make(kind, lengths, num_images, **arguments)
    again = make(kind, lengths, num_images, **arguments)
    for epoch in (0, 1):
        steps = epoch_of(schedule, epoch)
        assert sorted(flat(steps)) == list(range(count))
        assert all(len(rows) == 32 for rows in steps)
        for number, rows in enumerate(steps):
            step = epoch * schedule.steps_per_epoch + number
            # No state: asked alone and in any order, a step is the same.
            assert [row.tolist() for row in again.step_rows(step)] == rows
            for process_count in (1, 2, 4, 8):
                parts = [
                    rows_of_step(own_rows, batch_size=32, accumulation_steps=accumulation_steps)
                    for own_rows in np.split(np.arange(32 // accumulation_steps), process_count)
                ]
                places = np.concatenate(parts, axis=1)
                assert places.ravel().tolist() == list(range(32))
                loaded = [rows[place] for place in places.flat]
                assert loaded == rows


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_differ(kind):
    schedule = make(kind, *samples(200), batch_size=8)
    assert epoch_of(schedule, 0) != epoch_of(schedule, 1)
    assert epoch_of(schedule, 2) == epoch_of(make(kind, *samples(200), batch_size=8), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_steps_and_hold_their_samples(kind):
    lengths, num_images = samples(100)
    schedule = make(kind, lengths, num_images, batch_size=8)
    found = set()
    for step, rows in enumerate(epoch_of(schedule)):
        length, slots = schedule.step_shape(step)
        found.add((length, slots))
        assert max(lengths[row].sum() for row in rows) <= length
        assert max(num_images[row].sum() for row in rows) <= slots
    assert schedule.shapes(0) == sorted(found)
    assert {"packed": [(128, 4)]}.get(kind, schedule.shapes(0)) == sorted(found)


def test_shapes_of_padded_steps_are_rounded_up():
    lengths, num_images = np.array([10, 33, 40, 12]), np.array([0, 3, 0, 1])
    order = partial(epoch_order, num_samples=4, seed=0, shuffle=False)
    schedule = PaddedSchedule(lengths, num_images, order, batch_size=3, max_length=2048)
    assert [schedule.step_shape(step) for step in (0, 1, 2)] == [(64, 4), (32, 1), (64, 4)]
    assert schedule.shapes(0) == [(32, 1), (64, 4)]
    assert epoch_of(schedule, 1) == [[[0], [1], [2]], [[3], [], []]]


def test_grouped_steps_have_samples_with_or_without_images_until_the_leftovers():
    lengths, num_images = samples(203)
    steps = epoch_of(make("grouped", lengths, num_images, batch_size=8, accumulation_steps=2))
    kinds = [{bool(num_images[id]) for id in flat([rows])} for rows in steps]
    assert len(steps) == 26
    assert all(len(kind) == 1 for kind in kinds[:-2])


def test_the_samples_of_a_grouped_step_do_not_depend_on_accumulation():
    def sets(accumulation_steps):
        schedule = make("grouped", *samples(203), batch_size=8, accumulation_steps=accumulation_steps)
        return [set(flat([rows])) for rows in epoch_of(schedule)]

    assert sets(1) == sets(2) == sets(4)


def test_the_grouped_order_is_pinned():
    # A change would give resumed runs other samples.
    lengths, num_images = np.array([5, 9, 4, 7, 8, 3, 2, 6]), np.array([1, 2, 0, 1, 0, 1, 0, 1])
    orders = [
        grouped_order(
            epoch, lengths=lengths, num_images=num_images, batch_size=2, accumulation_steps=1, seed=1
        ).tolist()
        for epoch in (0, 1)
    ]
    assert orders == [[2, 6, 7, 0, 1, 5, 3, 4], [4, 2, 1, 7, 0, 5, 3, 6]]
