"""Which blocks of a score matrix a flash-attention kernel visits, in which order, and which of them need a mask.

Letters: B rows (1 without segments, for then all rows are alike), T tokens, n blocks per sequence, W visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What a kernel does on a visit.
FIRST = 1  # of a kept block: clear the accumulators
LAST = 2  # of a kept block: write the result
DENSE = 4  # every query of the block sees every key
MASKED = 8  # some do not


class Visits(NamedTuple):
    """A kernel's work, B * W visits: for every kept block, in order, all blocks streamed past it.

    A kept block without any partner has one visit that is FIRST and LAST and computes nothing. Rows with less work
    than others end in visits that do nothing and stay where they are.
    """

    kept: jax.Array  # int32[B * W]
    streamed: jax.Array  # int32[B * W]
    flags: jax.Array  # int32[B * W]
    width: int  # W

    @property
    def stride(self) -> int:
        """From a row's visits to the next row's; 0 where all rows share theirs."""
        return self.width if self.flags.size > self.width else 0


def visible_blocks(
    segment_ids: jax.Array | None, *, num_blocks: int, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """(visible, dense) bool[B, n, n], queries by keys: blocks with anything to compute, and those without a mask.

    segment_ids int32[B, n * block], 0 is padding. Blocks are compared by their smallest and largest id, so a block
    may be called visible in vain when a row's ids are not in ascending runs, but never the other way round.
    """
    below = np.tril(np.ones((1, num_blocks, num_blocks), bool), k=0 if causal else num_blocks)
    wholly_below = np.tril(np.ones_like(below), k=-1 if causal else num_blocks)
    if segment_ids is None:
        return jnp.asarray(below), jnp.asarray(wholly_below)
    ids = segment_ids.reshape(len(segment_ids), num_blocks, -1)
    limits = jnp.iinfo(jnp.int32)
    least = jnp.where(ids == 0, limits.max, ids).min(axis=-1)
    most = jnp.where(ids == 0, limits.min, ids).max(axis=-1)
    overlap = (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])
    same = (least == most) & (ids != 0).all(axis=-1)
    same = same[:, :, None] & same[:, None, :] & (least[:, :, None] == least[:, None, :])
    return overlap & below, same & wholly_below


def list_visits(visible: jax.Array, dense: jax.Array, *, causal: bool) -> Visits:
    """The visits of a kernel that keeps blocks of the second dimension and streams those of the third."""
    B, n, _ = visible.shape
    width = n * (n + 1) // 2 if causal else n * n
    alone = ~visible.any(axis=2, keepdims=True) & jnp.eye(n, dtype=bool)
    listed = (visible | alone).reshape(B, n * n)
    count = listed.sum(axis=1, keepdims=True)
    order = jnp.argsort(~listed, axis=1, stable=True)[:, :width]
    steps = jnp.arange(width)
    order = jnp.take_along_axis(order, jnp.minimum(steps, count - 1), axis=1)
    kept, streamed = order // n, order % n
    works = steps < count
    edge = jnp.full((B, 1), -1)
    first = works & (kept != jnp.concatenate([edge, kept[:, :-1]], axis=1))
    last = works & ((steps == count - 1) | (kept != jnp.concatenate([kept[:, 1:], edge], axis=1)))
    seen = works & jnp.take_along_axis(visible.reshape(B, -1), order, axis=1)
    whole = seen & jnp.take_along_axis(dense.reshape(B, -1), order, axis=1)
    flags = FIRST * first + LAST * last + DENSE * whole + MASKED * (seen & ~whole)
    return Visits(*(x.reshape(-1).astype(jnp.int32) for x in (kept, streamed, flags)), width)
