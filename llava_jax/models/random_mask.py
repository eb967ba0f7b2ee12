"""Random masks by a hash of each element's place: cheap, the same however devices share the array."""

import math

import jax
import jax.numpy as jnp


def random_mask(key: jax.Array, share: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[shape], each element true with probability `share` (in steps of 2^-32), independent of the others.

    jax.random.bernoulli does the same with threefry, which takes a hundred integer operations per element, and adapters see
    every activation of every layer. These are twenty, which compile faster, too. Good enough for dropout, not for
    cryptography: the finalizer of murmur3 twice, with half of the key before each.
    """
    before, between = jax.random.key_data(key).reshape(-1)[:2]
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):  # beyond 2^32 elements the mask repeats
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride) if size > 1 else 0
    word = _mix(_mix(place * jnp.uint32(0x9E3779B9) + before) ^ between)
    return word < jnp.uint32(min(round(share * 2**32), 2**32 - 1))


def _mix(word: jax.Array) -> jax.Array:
    """fmix32 of murmur3 (https://github.com/aappleby/smhasher): every bit of the input moves half of those of the output."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
