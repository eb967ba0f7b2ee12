"""Adam's moments in fewer bytes: bfloat16, or 8 bits with a scale per block.

A second moment changes by a thousandth per step (beta2=0.999), less than such numbers can tell apart: rounded to the
nearest it would never fade. It is rounded up as often as it lies near the upper neighbour, by a sequence that is even
over the steps and a function of the step, so that a continued run rounds alike. First moments change by a tenth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_jax.optimizers.parameters import is_embedding

BLOCK = 256  # numbers of the last axis under one scale, as in bitsandbytes
_SMALLEST = 4096  # smaller parameters keep 32 bits, as in bitsandbytes (min_8bit_size)
_NEAREST = np.uint32(2**31)
# Fractional parts of multiples of these are spread evenly: powers of the inverse of the positive root of
# x^5 = x + 1, times 2^32 (the "R" sequences, https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences).
_STRIDES = tuple(int(2**32 / 1.1673039782614187**i) for i in range(1, 5))


class Blocks(NamedTuple):
    """A moment in 8 bits: codes of the parameter's shape, and float32 scales [..., blocks of the last axis]."""

    codes: jax.Array
    scales: jax.Array


def scale_by_stored_adam(
    beta1: float, beta2: float, epsilon: float, *, bits: int
) -> optax.GradientTransformation:
    """Adam whose moments lie between steps in 16 bits, or (bits=8) all but embeddings and small ones in 8."""
    adam = optax.scale_by_adam(beta1, beta2, epsilon)

    def store(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        def encode(moments: dict, *, signed: bool) -> dict:
            return {n: _encode(n, x, state.count, bits=bits, signed=signed) for n, x in moments.items()}

        return state._replace(mu=encode(state.mu, signed=True), nu=encode(state.nu, signed=False))

    def restore(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        decode = lambda moments: {name: _decode(value) for name, value in moments.items()}
        return state._replace(mu=decode(state.mu), nu=decode(state.nu))

    def update(grads: dict, state: optax.ScaleByAdamState, params=None):
        updates, state = adam.update(grads, restore(state), params)
        return updates, store(state)

    return optax.GradientTransformation(lambda params: store(adam.init(params)), update)


def _encode(name: str, x: jax.Array, count: jax.Array, *, bits: int, signed: bool):
    if bits == 16:
        return x.astype(jnp.bfloat16) if signed else to_bfloat16(x, _thresholds(x.shape, count))
    if is_embedding(name) or x.size < _SMALLEST:
        return x
    return to_blocks(x, _NEAREST if signed else _thresholds(x.shape, count), signed=signed)


def _decode(stored: Blocks | jax.Array) -> jax.Array:
    return from_blocks(stored) if isinstance(stored, Blocks) else stored.astype(jnp.float32)


def to_bfloat16(x: jax.Array, thresholds: jax.Array) -> jax.Array:
    """x float32[...] rounded up where its place between two neighbours exceeds the threshold, uint32[...]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (thresholds >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def to_blocks(x: jax.Array, thresholds: jax.Array, *, signed: bool) -> Blocks:
    """x float32[..., n] in int8 (signed) or uint8 codes; the scale is a block's largest magnitude.

    A number is rounded up where its place between two codes exceeds the threshold, uint32[..., n] or [].
    Codes are even in the square root of first moments and in the fourth root of second ones, which spread over twice
    the orders of magnitude. No second moment becomes 0, for updates are divided by it.
    """
    power, top = (2, 127) if signed else (4, 255)
    num_blocks = x.shape[-1] // BLOCK if x.shape[-1] % BLOCK == 0 else 1
    scales = jnp.abs(x).reshape(*x.shape[:-1], num_blocks, -1).max(-1)
    share = jnp.abs(x) / jnp.maximum(_spread(scales, x.shape), jnp.finfo(jnp.float32).tiny)
    lower = jnp.clip(jnp.floor(top * share ** (1 / power)), 0, top - 1)
    below, above = (lower / top) ** power, ((lower + 1) / top) ** power
    is_up = (share - below) / (above - below) * 2.0**32 > thresholds.astype(jnp.float32)
    codes = lower + is_up
    if signed:
        return Blocks((jnp.sign(x) * codes).astype(jnp.int8), scales)
    return Blocks(jnp.maximum(codes, 1).astype(jnp.uint8), scales)


def from_blocks(blocks: Blocks) -> jax.Array:
    """The float32[..., n] that the codes stand for."""
    codes, scales = blocks.codes, _spread(blocks.scales, blocks.codes.shape)
    if codes.dtype == jnp.uint8:
        return (codes.astype(jnp.float32) / 255) ** 4 * scales
    share = codes.astype(jnp.float32) / 127
    return share * jnp.abs(share) * scales


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each scale beside every number of its block."""
    return jnp.broadcast_to(scales[..., None], (*scales.shape, shape[-1] // scales.shape[-1])).reshape(shape)


def _thresholds(shape: tuple[int, ...], count: jax.Array) -> jax.Array:
    """uint32[shape], spread evenly over all of its values, from element to element and from step to step."""
    values = count.astype(jnp.uint32) * jnp.uint32(_STRIDES[0])
    for axis, stride in zip(range(len(shape)), _STRIDES[1:], strict=False):
        values = values + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return values
