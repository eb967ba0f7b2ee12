"""Attention as einsums, which XLA compiles for any device and partitions by itself.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK = 512  # queries whose scores exist at one time in `chunked`


def reference(
    q, k, v, segment_ids=None, kv_segment_ids=None, *, causal: bool, sm_scale: float, first_query: int = 0
) -> jax.Array:
    """Scores and softmax in float32, all at once: the oracle for every other implementation.

    Arguments as for the door. Query t is at the place of key t + first_query.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * sm_scale
    mask = jnp.ones((1, T, S), bool)
    if causal:
        mask &= jnp.arange(S)[None, None, :] <= first_query + jnp.arange(T)[None, :, None]
    if segment_ids is not None:
        mask &= (segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (kv_segment_ids != 0)[:, None, :]
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if segment_ids is not None:  # only then a query may see nothing
        weights = jnp.where(mask.any(axis=-1)[:, None, None, :, None], weights, 0.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)
    return checkpoint_name(out, "attention")


def chunked(
    q,
    k,
    v,
    segment_ids=None,
    kv_segment_ids=None,
    *,
    causal: bool,
    sm_scale: float,
    longest_segment: int | None = None,
) -> jax.Array:
    """The same, CHUNK queries at a time, in the backward pass too.

    Of causal keys only those up to the last query, and with a longest_segment those that the first one's can reach.
    """
    outs = []
    for first in range(0, q.shape[1], CHUNK):
        first_key = 0
        if causal and segment_ids is not None and longest_segment is not None:
            first_key = max(
                0, (first + 1 - longest_segment) // CHUNK * CHUNK
            )  # whole chunks: aligned, few shapes
        queries = slice(first, first + CHUNK)
        keys = slice(first_key, first + CHUNK) if causal else slice(None)
        part = partial(reference, causal=causal, sm_scale=sm_scale, first_query=first - first_key)
        if segment_ids is not None:
            part = partial(part, segment_ids=segment_ids[:, queries], kv_segment_ids=kv_segment_ids[:, keys])
        outs.append(jax.checkpoint(part)(q[:, queries], k[:, keys], v[:, keys]))
    return checkpoint_name(
        jnp.concatenate(outs, axis=1), "attention"
    )  # of names within, none is seen from here
