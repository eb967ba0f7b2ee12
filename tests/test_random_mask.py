"""Dropout's random masks: their share, that nothing is correlated, that devices do not matter."""

import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.models.random_mask import random_mask


def test_masks_of_several_keys_are_as_uncorrelated_as_numpys():
    """At every lag, with themselves and each other. Of 2^16 lags of independent masks one in 10^7 times exceeds 7."""
    n, share = 2**16, 0.95
    masks = [random_mask(key, share, (8, n // 64, 8)) for key in jax.random.split(jax.random.key(0), 4)]
    standard = [(np.ravel(mask) - share) / np.sqrt(share * (1 - share)) for mask in masks]
    assert all(abs(each.mean()) < 5 / np.sqrt(n) for each in standard)
    spectra = [np.fft.fft(each) for each in standard]
    for (i, first), (j, second) in itertools.combinations_with_replacement(enumerate(spectra), 2):
        correlation = np.fft.ifft(first * second.conj()).real / np.sqrt(n)
        assert np.abs(correlation[i == j :]).max() < 7, (i, j)


def test_a_share_of_one_keeps_all_and_none_nothing():
    key = jax.random.key(1)
    assert not random_mask(key, 0.0, (1000, 100)).any()
    assert np.mean(random_mask(key, 1.0, (1000, 100))) == 1.0


def test_a_mask_is_the_same_on_one_device_and_on_many():
    key, shape = jax.random.key(2), (8, 16, 32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", None, "b"))
    spread = jax.jit(lambda key: random_mask(key, 0.5, shape), out_shardings=sharding)(key)
    assert spread.sharding.shard_shape(shape) == (2, 16, 16)
    np.testing.assert_array_equal(spread, random_mask(key, 0.5, shape))
