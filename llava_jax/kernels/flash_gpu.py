"""Flash attention for Hopper GPUs, as Pallas Mosaic GPU kernels. It has been compiled for them but not yet run on one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu

from llava_jax.kernels.flash_gpu_backward import Saved, gradient_of_queries, gradients_of_keys_and_values
from llava_jax.kernels.flash_gpu_forward import flash_forward
from llava_jax.kernels.flash_gpu_ranges import key_ranges
from llava_jax.kernels.flash_gpu_tiles import Tiles

HEAD_WIDTHS = (64, 128)
TILE_ROWS = 8  # TMA into swizzled tiles needs whole ones in global memory; a length of 577 is copied to 584


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

    Inside jax.shard_map it needs check_vma=False.

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
    how = _How((T, S), causal, float(sm_scale), tiles or Tiles(), _interpreter(interpret))
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE_ROWS), (0, 0), (0, 0))) for x in (q, k, v))
    return _flash(q, k, v, segment_ids, how)[:, :T]


def _interpreter(wanted: bool):
    if not wanted:
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"interpret=True needs jax 0.11 or newer, this is {jax.__version__}.")
    return plgpu.InterpretGPUParams(detect_races=True)


@dataclasses.dataclass(frozen=True)
class _How:
    lengths: tuple[int, int]  # T and S before padding
    causal: bool
    sm_scale: float
    tiles: Tiles
    interpret: Any

    def ranges(self, segment_ids: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
        padded = -(-self.lengths[0] // self.tiles.row_multiple) * self.tiles.row_multiple
        return key_ranges(segment_ids, batch, *self.lengths, padded, causal=self.causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segment_ids, how: _How):
    return _forward(q, k, v, segment_ids, how)[0]


def _forward(q, k, v, segment_ids, how: _How):
    ranges = how.ranges(segment_ids, q.shape[0])
    out, lse = flash_forward(
        q, k, v, *ranges, causal=how.causal, sm_scale=how.sm_scale, tiles=how.tiles, interpret=how.interpret
    )
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, segment_ids, out, lse)


def _backward(how: _How, residuals, do):
    q, k, v, segment_ids, out, lse = residuals
    first, end = how.ranges(segment_ids, q.shape[0])
    delta = jnp.einsum("BTNH,BTNH->BNT", out, do, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, first.shape[1] - q.shape[1])))
    saved = Saved(q, k, v, do, lse, delta, first, end)
    options = dict(sm_scale=how.sm_scale, tiles=how.tiles, interpret=how.interpret)
    dk, dv = gradients_of_keys_and_values(saved, **options)
    return gradient_of_queries(saved, causal=how.causal, **options), dk, dv, None


_flash.defvjp(_forward, _backward)
