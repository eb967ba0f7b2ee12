"""Which keys each query sees, as one range per row, and which steps of a tiled kernel that leaves."""

import jax
import jax.numpy as jnp
from jax import lax


def key_ranges(
    segment_ids: jax.Array | None, batch: int, num_queries: int, num_keys: int, padded: int, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """First key and end of the keys that each query sees: two int32[B, padded], empty (0, 0) beyond num_queries.

    segment_ids int32[B, num_queries]: packed examples as runs of equal ids, 0 is padding and sees nothing.
    An id that comes back after another one begins a new example.
    """
    positions = jnp.arange(padded, dtype=jnp.int32)
    rows = jnp.broadcast_to(positions, (batch, padded))
    if segment_ids is None:
        real = rows < num_queries
        first, end = jnp.zeros_like(rows), jnp.full_like(rows, num_keys)
    else:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padded - num_queries)))
        real = ids > 0
        begins = ids != jnp.pad(ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        first = lax.cummax(jnp.where(begins, rows, 0), axis=1)
        next_begin = jnp.where(begins, rows, num_queries)[:, 1:]
        next_begin = jnp.pad(next_begin, ((0, 0), (0, 1)), constant_values=num_queries)
        end = lax.cummin(next_begin, axis=1, reverse=True)
    if causal:
        end = jnp.minimum(end, rows + 1)
    return jnp.where(real, first, 0), jnp.where(real, end, 0)


def key_steps(first: jax.Array, end: jax.Array, rows: int, keys: int) -> jax.Array:
    """Steps of `keys` keys that blocks of `rows` queries take: int32[B, T / rows, 4].

    The four are lo, full_lo, full_hi, hi: steps lo..hi may see something; full_lo..full_hi need no mask.
    """
    first, end = (x.reshape(x.shape[0], -1, rows) for x in (first, end))
    sees = end > first
    hi = -(-jnp.where(sees, end, 0).max(axis=2) // keys)
    lo = jnp.minimum(jnp.where(sees, first, jnp.iinfo(jnp.int32).max).min(axis=2) // keys, hi)
    full_lo = jnp.clip(-(-first.max(axis=2) // keys), lo, hi)
    full_hi = jnp.clip(end.min(axis=2) // keys, full_lo, hi)
    return jnp.stack([lo, full_lo, full_hi, hi], axis=-1).astype(jnp.int32)


def query_steps(first: jax.Array, end: jax.Array, rows: int, keys: int, num_keys: int) -> jax.Array:
    """The same seen from the keys: steps of `rows` queries that see blocks of `keys` keys: int32[B, S / keys, 4]."""
    first, end = (x.reshape(x.shape[0], -1, 1, rows) for x in (first, end))
    key = jnp.arange(0, num_keys, keys, dtype=jnp.int32)[:, None]
    some = ((first < key + keys) & (end > key) & (end > first)).any(axis=3)  # [B, steps, blocks]
    full = ((first <= key) & (end >= key + keys)).all(axis=3)
    num_steps = some.shape[1]
    step = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
    hi = jnp.where(some, step + 1, 0).max(axis=1)
    lo = jnp.minimum(jnp.where(some, step, num_steps).min(axis=1), hi)
    full_lo = jnp.clip(jnp.where(full, step, num_steps).min(axis=1), lo, hi)
    partial = ~full & (step >= full_lo[:, None])
    full_hi = jnp.clip(jnp.where(partial, step, num_steps).min(axis=1), full_lo, hi)
    return jnp.stack([lo, full_lo, full_hi, hi], axis=-1).astype(jnp.int32)
