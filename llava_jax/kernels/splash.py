"""JAX's own TPU kernel, splash attention, with the arguments of the door."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
BLOCK = 512


def splash_attention(
    q, k, v, segment_ids=None, *, causal: bool, sm_scale: float, interpret=False
) -> jax.Array:
    """As `flash_tpu.flash_attention`; the sequence is padded to a multiple of 128 and q scaled in its own dtype.

    segment_ids are compared one by one; blocks that only they make empty are computed all the same.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    padding = -T % LANES
    if segment_ids is None and padding and not causal:
        segment_ids = jnp.ones((B, T), jnp.int32)
    ids = None if segment_ids is None else jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padding)))
    q = (q.astype(jnp.float32) * sm_scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    kernel = _kernel(T + padding, N // K, causal, interpret)
    over_rows = jax.vmap(
        jax.vmap(kernel, in_axes=(0, 0, 0, None)), in_axes=(0, 0, 0, None if ids is None else 0)
    )
    segments = None if ids is None else splash.SegmentIds(ids, ids)
    out = over_rows(q.reshape(B, K, N // K, T + padding, H), k, v, segments)
    out = out.reshape(B, N, T + padding, H).transpose(0, 2, 1, 3)[:, :T]
    if segment_ids is None:
        return out
    # To splash 0 is a segment like any other; to the door it is padding.
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


def _kernel(length: int, group: int, causal: bool, interpret):
    """Splash for the query heads of one key/value head."""
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    block = max(size for size in range(LANES, BLOCK + 1, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * group),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
