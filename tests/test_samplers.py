"""Orders of the original's samplers and of TinyLLaVA's, recorded by running them with known permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data.samplers import (
    VARIANTS,
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava_jax.errors import DataError


@pytest.mark.parametrize(
    ("lengths", "num_chunks", "chunks"),
    [
        ([10, 9, 8, 3, 2, 1], 3, [[0, 5], [1, 4], [2, 3]]),
        ([10, 9, 8, 3, 2], 3, [[0, 3], [1, 4], [2]]),
        ([8, 7, 6, 5, 4, 3, 2, 1], 4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
        ([5], 3, [[0], [], []]),
        ([], 2, [[], []]),
    ],
)
def test_chunks_are_of_equal_size_and_length(lengths, num_chunks, chunks):
    assert split_to_even_chunks(list(range(len(lengths))), lengths, num_chunks) == chunks


def test_megabatches_are_sorted_and_split():
    lengths = [5, 9, 4, 7, 8, 3, 2, 6, 1, 10]
    assert get_length_grouped_indices(lengths, 2, 2, generator=range) == [1, 2, 3, 0, 4, 6, 7, 5, 9, 8]


@pytest.mark.parametrize(
    ("lengths", "batch_size", "llava", "tinyllava"),
    [
        ([5, 9, -4, 7, -8, 3, -2, 6], 1, [1, 0, 3, 5, 4, 2, 6, 7], [7, 6, 1, 0, 3, 5, 4, 2]),
        (
            [5, 9, -4, 7, -8, 3, -2, 6, 1, -3],
            2,
            [1, 5, 3, 0, 2, 4, 6, 7, 8, 9],
            [7, 8, 4, 6, 1, 5, 3, 0, 2, 9],
        ),
        # TinyLLaVA's own code raises where there is one kind only.
        ([5, 9, 7, 3, 6], 1, [1, 0, 2, 3, 4], [1, 0, 2, 3, 4]),
    ],
)
def test_modalities_are_kept_apart_as_in_both_originals(lengths, batch_size, llava, tinyllava):
    def order(variant):
        return get_modality_length_grouped_indices(lengths, batch_size, 2, generator=range, variant=variant)

    assert [order(variant) for variant in VARIANTS] == [llava, tinyllava]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_without_length_is_named(variant):
    with pytest.raises(DataError, match="sample 2 has length 0"):
        get_modality_length_grouped_indices([3, -4, 0, 1], 2, 2, variant=variant)


def test_an_unknown_variant_is_refused():
    with pytest.raises(DataError, match="'tiny' is not known; choose one of llava, tinyllava"):
        get_modality_length_grouped_indices([3, -4], 2, 2, variant="tiny")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=80),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 4),
    variant=st.sampled_from(VARIANTS),
)
def test_every_sample_comes_once_and_only_leftovers_mix_modalities(lengths, batch_size, world_size, variant):
    order = get_modality_length_grouped_indices(lengths, batch_size, world_size, variant=variant)
    assert sorted(order) == list(range(len(lengths)))
    size = batch_size * world_size
    signs = [{lengths[id] > 0 for id in order[start : start + size]} for start in range(0, len(order), size)]
    assert sum(len(kinds) == 2 for kinds in signs) <= 2


def test_iterations_differ_and_a_sampler_made_anew_repeats_them():
    def orders(**arguments):
        sampler = LengthGroupedSampler(2, 2, lengths=[1, -2, 3, 4, -5, 6, -7, 8, 9, -1], **arguments)
        assert len(sampler) == 10
        return [list(sampler) for _ in range(3)]

    for arguments in ({}, {"group_by_modality": True}, {"group_by_modality": True, "variant": "tinyllava"}):
        first = orders(**arguments)
        assert first == orders(**arguments)
        assert first[0] != first[1] != first[2]
        assert all(sorted(order) == list(range(10)) for order in first)


def test_a_numpy_generator_draws_the_permutations():
    lengths = list(range(1, 21))
    permutation = np.random.default_rng(3).permutation(20)
    expected = get_length_grouped_indices(lengths, 2, 2, generator=lambda size: permutation)
    assert get_length_grouped_indices(lengths, 2, 2, generator=np.random.default_rng(3)) == expected


def test_a_sampler_needs_lengths():
    with pytest.raises(DataError, match="pass lengths="):
        LengthGroupedSampler(2, 2)
