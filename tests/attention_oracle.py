"""Attention and its gradients in float64 numpy, written from the definition: what every implementation must give."""

import numpy as np


def attention_and_gradients(q, k, v, grad, *, causal, segment_ids=None, kv_segment_ids=None, sm_scale=None):
    """q, grad [B, T, N, H], k and v [B, S, K, H] -> (out, dq, dk, dv), float64. Segment 0 sees nothing."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    scale = H**-0.5 if sm_scale is None else sm_scale
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    repeated_k, repeated_v = (x.repeat(N // K, axis=2) for x in (k, v))
    seen = np.tril(np.ones((T, S), bool))[None] if causal else np.ones((1, T, S), bool)
    if segment_ids is not None:
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        seen = seen & (segment_ids[:, :, None] == kv_segment_ids[:, None]) & (kv_segment_ids != 0)[:, None]
    scores = np.einsum("BTNH,BSNH->BNTS", q, repeated_k) * scale
    weights = np.where(seen[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("BNTS,BSNH->BTNH", weights, repeated_v)
    slopes = np.einsum("BTNH,BSNH->BNTS", grad, repeated_v)
    slopes = weights * (slopes - (slopes * weights).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("BNTS,BSNH->BTNH", slopes, repeated_k)
    dk = np.einsum("BNTS,BTNH->BSNH", slopes, q)
    dv = np.einsum("BNTS,BTNH->BSNH", weights, grad)
    return out, dq, *(x.reshape(B, S, K, N // K, H).sum(axis=3) for x in (dk, dv))


def random_inputs(B=2, T=7, S=None, N=6, K=3, H=5, dtype=np.float32):
    """q, k, v and the gradient of the output, standard normal."""
    rng = np.random.default_rng(B + T + N + K + H)
    S = T if S is None else S
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def packed_row(length: int, *lengths: int) -> np.ndarray:
    """Segments 1, 2, ... of the given lengths, then padding: int32[length]."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, length - len(ids))).astype(np.int32)


def assert_close(found, expected, *, atol):
    """Compares (out, dq, dk, dv) one by one, naming which differs."""
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol, err_msg=name)
