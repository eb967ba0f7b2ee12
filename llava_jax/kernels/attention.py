"""The one door to attention. Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width."""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "reference")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sm_scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention with grouped queries.

    q float[B, T, N, H], k and v float[B, S, K, H] with K dividing N -> float[B, T, N, H] in q's dtype.
    causal: query t sees keys 0..t. segment_ids int[B, T] and kv_segment_ids int[B, S] (None: the
    former): a query sees the keys of its own segment only. sm_scale: None means 1 / sqrt(H).

    Raises ValueError on an unknown implementation; one that cannot honour an argument raises
    NotImplementedError rather than ignoring it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads.")
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    return _reference(
        q, k, v, causal=causal, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, sm_scale=scale
    )


def _reference(q, k, v, *, causal, segment_ids, kv_segment_ids, sm_scale):
    """Einsums with scores and softmax in float32: the oracle for every other implementation."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * sm_scale
    mask = jnp.ones((1, T, S), bool)
    if causal:
        mask &= jnp.arange(S)[None, None, :] <= jnp.arange(T)[None, :, None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)
