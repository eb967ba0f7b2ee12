"""The attention door against plain float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.kernels.attention import attention


def oracle(q, k, v, *, causal, segment_ids=None, kv_segment_ids=None, sm_scale=None):
    """One query at a time, one head at a time, in float64."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.ones(S, bool)
        if causal:
            seen &= np.arange(S) <= t
        if segment_ids is not None:
            seen &= kv_segment_ids[b] == segment_ids[b, t]
        scores = k[b, seen, n // (N // K)] @ q[b, t, n] * (H**-0.5 if sm_scale is None else sm_scale)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    return out


def inputs(B=2, T=7, S=7, N=6, K=3, H=5):
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_queries_and_causality(causal, num_kv_heads):
    q, k, v = inputs(K=num_kv_heads)
    np.testing.assert_allclose(attention(q, k, v, causal=causal), oracle(q, k, v, causal=causal), atol=1e-6)


def test_segments_do_not_see_each_other():
    q, k, v = inputs()
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
    found = attention(q, k, v, causal=True, segment_ids=segment_ids)
    np.testing.assert_allclose(found, oracle(q, k, v, causal=True, segment_ids=segment_ids), atol=1e-6)


def test_keys_may_have_segments_of_their_own():
    q, k, v = inputs(T=2, S=7)
    how = dict(
        causal=False,
        segment_ids=np.array([[1, 1], [1, 2]]),
        kv_segment_ids=np.array([[0, 1, 1, 1, 0, 0, 0], [1, 2, 2, 0, 0, 0, 0]]),
    )
    np.testing.assert_allclose(attention(q, k, v, **how), oracle(q, k, v, **how), atol=1e-6)


def test_scores_are_scaled_as_asked():
    q, k, v = inputs()
    np.testing.assert_allclose(
        attention(q, k, v, causal=False, sm_scale=0.3), oracle(q, k, v, causal=False, sm_scale=0.3), atol=1e-6
    )


def test_bfloat16_keeps_its_dtype_and_scores_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(T=64, S=64))
    found = attention(q, k, v, causal=True)
    assert found.dtype == jnp.bfloat16
    expected = oracle(*(np.asarray(x, np.float32) for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.02)


def test_unknown_implementations_and_uneven_heads_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="'fast' is not one of"):
        attention(q, k, v, causal=True, implementation="fast")
    with pytest.raises(ValueError, match="4 key/value heads do not divide 6"):
        attention(q, *inputs(K=4)[1:], causal=True)
