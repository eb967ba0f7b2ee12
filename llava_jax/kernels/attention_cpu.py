"""Attention of tokens to themselves, with its backward pass, in products that XLA's CPU compiler is fast at.

It hands products to its fast library where they give float32, also of bfloat16 factors, and where the left factor is
contracted along its last dimension; transposed factors count only when a reshape follows. Weights are kept in the
inputs' dtype, once.

Letters: B batch, T tokens, K key/value heads, G query heads for each of them, H head width; C = B * K, R = G * T.
"""

from functools import partial

import jax
import jax.numpy as jnp


def attention_cpu(q, k, v, segment_ids=None, *, causal: bool, sm_scale: float) -> jax.Array:
    """Arguments as for the door, but keys are the queries' own tokens."""
    return _attend(q, k, v, segment_ids, causal, sm_scale)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, segment_ids, causal, sm_scale):
    return _forward(q, k, v, segment_ids, causal, sm_scale)[0]


def _forward(q, k, v, segment_ids, causal, sm_scale):
    K = k.shape[2]
    scores = _einsum("CRH,CSH->CRS", _rows(q, K), _rows(k, K)) * sm_scale
    mask = _mask(q, K, segment_ids, causal)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    share = 1 / weights.sum(axis=-1, keepdims=True)
    if segment_ids is not None:  # only then a query may see nothing
        share = jnp.where(mask.any(axis=-1, keepdims=True), share, 0.0)
    weights = (weights * share).astype(v.dtype)
    out = _unrows(_einsum("CRS,CSH->CRH", weights, _rows(v, K)), q)
    return out, (q, k, v, out, weights)


def _backward(causal, sm_scale, saved, grad):
    del causal  # what is not seen has weight 0
    q, k, v, out, weights = saved
    K = k.shape[2]
    dot = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    grad_scores = _einsum("CRH,CSH->CRS", _rows(grad, K), _rows(v, K)) - _rows(dot, K)
    grad_scores = (weights.astype(jnp.float32) * grad_scores * sm_scale).astype(q.dtype)
    grad_q = _unrows(_einsum("CRS,CSH->CRH", grad_scores, _rows(k, K)), q)
    grad_k = _uncolumns(_einsum("CHR,CRS->CHS", _columns(q, K), grad_scores), k)
    grad_v = _uncolumns(_einsum("CHR,CRS->CHS", _columns(grad, K), weights), v)
    return grad_q, grad_k, grad_v, None


_attend.defvjp(_forward, _backward)


def _mask(q, K: int, segment_ids, causal: bool) -> jax.Array | None:
    """Which keys a query sees, bool[C or 1, R, S]; None: all."""
    _, T, N, _ = q.shape
    mask = jnp.tril(jnp.ones((1, T, T), bool)) if causal else None
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        same &= (segment_ids != 0)[:, None, :]
        mask = (same if mask is None else mask & same).repeat(K, axis=0)
    return mask if mask is None else jnp.tile(mask, (1, N // K, 1))


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _rows(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, H] -> [C, R, H]."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)


def _columns(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, H] -> [C, H, R]."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 4, 3, 1).reshape(B * K, H, N // K * T)


def _unrows(x: jax.Array, like: jax.Array) -> jax.Array:
    """float32[C, R, H] -> [B, T, N, H] as `like`."""
    B, T, _, H = like.shape
    x = x.astype(like.dtype).reshape(B, len(x) // B, -1, T, H)
    return x.transpose(0, 3, 1, 2, 4).reshape(like.shape)


def _uncolumns(x: jax.Array, like: jax.Array) -> jax.Array:
    """float32[C, H, S] -> [B, S, K, H] as `like`."""
    B, S, K, H = like.shape
    return x.astype(like.dtype).reshape(B, K, H, S).transpose(0, 3, 1, 2)
