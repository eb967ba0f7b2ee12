"""Flash attention for Hopper GPUs, as Pallas Mosaic GPU kernels. It has been compiled for them but not yet run on one."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu

from llava_jax.kernels.flash_gpu_backward import Saved, gradient_of_queries, gradients_of_keys_and_values
from llava_jax.kernels.flash_gpu_forward import flash_forward
from llava_jax.kernels.flash_gpu_ranges import key_ranges
from llava_jax.kernels.flash_gpu_tiles import Tiles

HEAD_WIDTHS = (64, 128)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    sm_scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention that never holds the scores; differentiable in q, k and v.

    q bfloat16[B, T, N, H], k and v bfloat16[B, S, K, H] with K dividing N and H 64 or 128, T and S of any
    length -> bfloat16[B, T, N, H]. Scores, softmax and sums are float32, weights are rounded to bfloat16.

    segment_ids int[B, T] (T = S): packed examples as runs of equal ids; a query sees its own run only. 0 is
    padding, which sees nothing: its output and its gradients are 0.

    interpret: run Pallas's interpreter on the CPU, with its detection of races (jax 0.11 or newer; slow).

    The output and what the backward pass needs of the softmax carry the checkpoint name "attention".
    Tile sizes are chosen by what compiles well: no card has confirmed results or speed yet.
    """
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        raise NotImplementedError(f"flash_attention takes bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if H not in HEAD_WIDTHS:
        raise NotImplementedError(f"flash_attention takes heads of width 64 or 128, not {H}.")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != H or N % K:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together.")
    if sm_scale <= 0:
        raise ValueError(f"sm_scale={sm_scale} is not positive.")
    if segment_ids is not None and (T != S or segment_ids.shape != q.shape[:2]):
        raise ValueError(f"segment_ids {segment_ids.shape} are for T = S; q is {q.shape}, k is {k.shape}.")
    how = dict(causal=causal, sm_scale=float(sm_scale), tiles=tiles or Tiles(), interpret=_interpreter(interpret))
    return _flash(q, k, v, segment_ids, tuple(how.items()))


def _interpreter(wanted: bool):
    if not wanted:
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"interpret=True needs jax 0.11 or newer, this is {jax.__version__}.")
    return plgpu.InterpretGPUParams(detect_races=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segment_ids, how):
    return _forward(q, k, v, segment_ids, how)[0]


def _ranges(q, k, segment_ids, *, causal, tiles, **_):
    T = q.shape[1]
    padded = -(-T // tiles.row_multiple) * tiles.row_multiple
    return key_ranges(segment_ids, q.shape[0], T, k.shape[1], padded, causal=causal)


def _forward(q, k, v, segment_ids, how):
    out, lse = flash_forward(q, k, v, *_ranges(q, k, segment_ids, **dict(how)), **dict(how))
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, segment_ids, out, lse)


def _backward(how, residuals, do):
    q, k, v, segment_ids, out, lse = residuals
    how = dict(how)
    first, end = _ranges(q, k, segment_ids, **how)
    delta = jnp.einsum("BTNH,BTNH->BNT", out, do, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, first.shape[1] - q.shape[1])))
    saved = Saved(q, k, v, do, lse, delta, first, end)
    dq = gradient_of_queries(saved, **how)
    del how["causal"]
    return dq, *gradients_of_keys_and_values(saved, **how), None


_flash.defvjp(_forward, _backward)
