"""Flash attention for TPUs: three Pallas (Mosaic) kernels that never hold more than a block of scores.

Letters: B rows, T tokens, N query heads, K key/value heads, G query heads per key/value head, H head width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llava_jax.errors import ConfigError
from llava_jax.kernels.flash_blocks import DENSE, FIRST, LAST, MASKED, list_visits, visible_blocks

# A block of 512 x 512 scores keeps the matrix units busy for 0.7 us (v5e, 197 TFLOP/s, heads of 128) while its keys
# and values take 0.3 us to load (0.8 TB/s) and a grid step costs about 0.35 us; half as wide, a step costs more than
# its work, and twice as wide, the causal diagonal and the ends of segments waste twice as much. For it the compiler
# takes 3 to 4 MiB (float32: 6) of the 16 MiB of VMEM that a kernel gets by default. Reasoned, never timed on a TPU.
BLOCK = 512
WHOLE = 640  # up to here one block holds the sequence, whatever its length (CLIP's 577)

LANES = 128
FLOOR = -1e30  # below any score; finite, so that a row that has seen nothing gives exp(-inf - FLOOR) = 0


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool,
    sm_scale: float,
    interpret=False,
) -> jax.Array:
    """Softmax attention with grouped queries, differentiable in q, k and v.

    q [B, T, N, H], k and v [B, T, K, H], all bfloat16 or all float32 -> [B, T, N, H]. segment_ids int32[B, T]: a
    query sees its own segment only; 0 is padding, which sees nothing, gives 0 and has no gradient. The result does
    not depend on the order of the ids, but the work does: blocks of scores are skipped where segments are runs of
    ascending ids, as packed rows have them. interpret: as in `pallas_call`.

    The output and its log-sum-exp are named "attention" for remat policies. Raises ConfigError on other dtypes.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise ConfigError(
            f"Flash attention for TPUs computes in bfloat16 or float32, not {q.dtype}, {k.dtype}, {v.dtype}."
        )
    T = q.shape[1]
    block, num_blocks = block_size(T)
    if segment_ids is None and block * num_blocks > T:
        segment_ids = jnp.ones((1, T), jnp.int32)  # beyond the end is padding
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, block * num_blocks - T)))[:, None]
    call = _Call(T, q.shape[3], block, num_blocks, causal, sm_scale, interpret)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return _flash(q, k, v, segment_ids, call).transpose(0, 2, 1, 3)


def block_size(length: int) -> tuple[int, int]:
    """How long blocks are and how many there are; the last one may reach over the end."""
    if length <= WHOLE:
        return length, 1
    num_blocks = pl.cdiv(length, BLOCK)
    block = pl.cdiv(pl.cdiv(length, num_blocks), LANES) * LANES
    return block, pl.cdiv(length, block)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about a call, and what its kernels have in common."""

    length: int
    head_dim: int
    block: int
    num_blocks: int
    causal: bool
    sm_scale: float
    interpret: object

    @property
    def ragged(self) -> bool:
        return self.length < self.block * self.num_blocks

    def dot(self, a, b, contract: tuple[int, int]) -> jax.Array:
        """A product in float32; float32 operands are not rounded to bfloat16 on the way."""
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def existing(self, x, index) -> jax.Array:
        """Zeros in place of what a block reads beyond the end of the sequence, which may be anything."""
        if not self.ragged:
            return x
        place = index * self.block + jax.lax.broadcasted_iota(jnp.int32, (self.block, 1), 0)
        return jnp.where(place < self.length, x, jnp.zeros_like(x))

    def mask(self, scores, ids, queries, keys, *, query_axis: int) -> jax.Array:
        """-inf in place of the scores that a query (block `queries`) must not see (keys of block `keys`)."""
        seen = True
        if self.causal:
            query, key = (
                jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
                for axis in (query_axis, 1 - query_axis)
            )
            seen = query + (queries - keys) * self.block >= key
        if ids:
            query_ids, key_ids = (ref[...] for ref in ids)  # [1, block]
            rows, columns = (query_ids, key_ids) if query_axis == 0 else (key_ids, query_ids)
            seen &= (_column(rows)[:, :1] == columns) & (columns != 0)
        return jnp.where(seen, scores, -jnp.inf)

    def on_visit(self, flags, work) -> None:
        """Runs work(masked) as the flags ask."""
        pl.when(flags & DENSE != 0)(partial(work, masked=False))
        pl.when(flags & MASKED != 0)(partial(work, masked=True))


def _column(row: jax.Array) -> jax.Array:
    """[1, block] -> [block, LANES], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _fill(column: jax.Array, width: int) -> jax.Array:
    """[block, LANES], the same in every lane -> [block, width] or what broadcasts to it."""
    return column if width == LANES else column[:, :1]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segment_ids, call: _Call):
    """q [B, N, T, H], k and v [B, K, T, H], segment_ids int32[B or 1, 1, n * block] or None -> [B, N, T, H]."""
    return _forward(q, k, v, segment_ids, call)[0]


def _save(q, k, v, segment_ids, call: _Call):
    out, lse = (checkpoint_name(x, "attention") for x in _forward(q, k, v, segment_ids, call))
    return out, (q, k, v, segment_ids, out, lse)


def _gradients(call: _Call, saved, grad):
    q, k, v, segment_ids, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)[:, :, None]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, 0), (0, lse.shape[-1] - call.length)))
    inputs = (q, k, v, grad, lse, delta)
    return _query_gradient(inputs, segment_ids, call), *_key_value_gradients(inputs, segment_ids, call), None


_flash.defvjp(_save, _gradients)


def _forward_kernel(kept, streamed, flags, q_ref, k_ref, v_ref, *refs, call: _Call, stride: int):
    """One block of keys and values past one block of queries: online softmax, accumulated in float32."""
    *ids, out_ref, lse_ref, acc_ref, max_ref, sum_ref = refs
    at = pl.program_id(0) * stride + pl.program_id(2)
    flag = flags[at]

    @pl.when(flag & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        max_ref[...] = jnp.full_like(max_ref, FLOOR)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def work(masked: bool):
        scores = call.dot(q_ref[...], k_ref[...], (1, 1)) * call.sm_scale  # [queries, keys]
        v = v_ref[...]
        if masked:
            scores = call.mask(scores, ids, kept[at], streamed[at], query_axis=0)
            v = call.existing(v, streamed[at])
        before = max_ref[...]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - now[:, :1])
        shrink = jnp.exp(before - now)
        max_ref[...] = now
        sum_ref[...] = sum_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
        shrink = _fill(shrink, acc_ref.shape[1])
        acc_ref[...] = acc_ref[...] * shrink + call.dot(weights.astype(v.dtype), v, (1, 0))

    call.on_visit(flag, work)

    @pl.when(flag & LAST != 0)
    def _():
        total = jnp.where(sum_ref[...] == 0, 1.0, sum_ref[...])  # rows that see nothing give 0
        out_ref[...] = (acc_ref[...] / _fill(total, acc_ref.shape[1])).astype(out_ref.dtype)
        lse_ref[...] = (max_ref[...] + jnp.log(total)).T[:1]


def _query_gradient_kernel(kept, streamed, flags, *refs, call: _Call, stride: int):
    """One block of keys and values past one block of queries."""
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, *ids, out_ref, acc_ref, lse_column, delta_column = refs
    at = pl.program_id(0) * stride + pl.program_id(2)
    flag = flags[at]

    @pl.when(flag & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        lse_column[...] = _column(lse_ref[...])
        delta_column[...] = _column(delta_ref[...])

    def work(masked: bool):
        k, v = k_ref[...], v_ref[...]
        scores = call.dot(q_ref[...], k, (1, 1)) * call.sm_scale  # [queries, keys]
        if masked:
            scores = call.mask(scores, ids, kept[at], streamed[at], query_axis=0)
            k, v = call.existing(k, streamed[at]), call.existing(v, streamed[at])
        weights = jnp.exp(scores - lse_column[:, :1])
        slopes = weights * (call.dot(grad_ref[...], v, (1, 1)) - delta_column[:, :1])
        acc_ref[...] += call.dot(slopes.astype(k.dtype), k, (1, 0))

    call.on_visit(flag, work)

    @pl.when(flag & LAST != 0)
    def _():
        out_ref[...] = (acc_ref[...] * call.sm_scale).astype(out_ref.dtype)


def _key_value_gradients_kernel(kept, streamed, flags, *refs, call: _Call, stride: int):
    """One block of queries, head after head of the group, past one block of keys and values."""
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, *ids, dk_ref, dv_ref, dk_acc, dv_acc = refs
    at = pl.program_id(0) * stride + pl.program_id(2)
    head = pl.program_id(3)
    flag = flags[at]

    @pl.when((flag & FIRST != 0) & (head == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def work(masked: bool):
        q, grad, lse, delta = q_ref[...], grad_ref[...], lse_ref[...], delta_ref[...]
        scores = call.dot(k_ref[...], q, (1, 1)) * call.sm_scale  # [keys, queries]
        if masked:
            scores = call.mask(scores, ids, streamed[at], kept[at], query_axis=1)
            q, grad = call.existing(q, streamed[at]), call.existing(grad, streamed[at])
        weights = jnp.exp(scores - lse)
        dv_acc[...] += call.dot(weights.astype(grad.dtype), grad, (1, 0))
        slopes = weights * (call.dot(v_ref[...], grad, (1, 1)) - delta)
        dk_acc[...] += call.dot(slopes.astype(q.dtype), q, (1, 0))

    call.on_visit(flag, work)

    @pl.when((flag & LAST != 0) & (head == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_acc[...] * call.sm_scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _forward(q, k, v, segment_ids, call: _Call) -> list[jax.Array]:
    """-> out [B, N, T, H], log-sum-exp float32[B, N, 1, n * block]."""
    B, N = q.shape[:2]
    launch = _Launch(call, segment_ids, keep_keys=False, group=N // k.shape[1])
    lse = jax.ShapeDtypeStruct((B, N, 1, call.block * call.num_blocks), jnp.float32)
    return launch(
        _forward_kernel,
        inputs=(("query", q), ("key", k), ("key", v)),
        outputs=(("query", q), ("number", lse)),
        scratch=((call.block, call.head_dim), (call.block, LANES), (call.block, LANES)),
        num_products=2,
    )


def _query_gradient(inputs, segment_ids, call: _Call) -> jax.Array:
    q, k = inputs[:2]
    launch = _Launch(call, segment_ids, keep_keys=False, group=q.shape[1] // k.shape[1])
    return launch(
        _query_gradient_kernel,
        inputs=tuple(zip(SIDES, inputs, strict=True)),
        outputs=(("query", q),),
        scratch=((call.block, call.head_dim), (call.block, LANES), (call.block, LANES)),
        num_products=3,
    )[0]


def _key_value_gradients(inputs, segment_ids, call: _Call) -> list[jax.Array]:
    q, k, v = inputs[:3]
    launch = _Launch(call, segment_ids, keep_keys=True, group=q.shape[1] // k.shape[1])
    return launch(
        _key_value_gradients_kernel,
        inputs=tuple(zip(SIDES, inputs, strict=True)),
        outputs=(("key", k), ("key", v)),
        scratch=((call.block, call.head_dim),) * 2,
        num_products=4,
    )


SIDES = ("query", "key", "key", "query", "number", "number")  # of q, k, v, grad, lse, delta


class _Launch:
    """Where a kernel's blocks come from, by the list of visits that is prefetched into scalar memory.

    The grid is rows, kept heads, visits and, where keys are kept, the query heads of each key/value head.
    """

    def __init__(self, call: _Call, segment_ids, *, keep_keys: bool, group: int):
        ids = None if segment_ids is None else segment_ids[:, 0]
        visible, dense = visible_blocks(ids, num_blocks=call.num_blocks, causal=call.causal)
        if keep_keys:
            visible, dense = visible.swapaxes(1, 2), dense.swapaxes(1, 2)
        self.visits = list_visits(visible, dense, causal=call.causal)
        self.call = call
        self.segment_ids = segment_ids
        self.keep_keys = keep_keys
        self.group = group

    def place(self, side: str, row, head, visit, rest):
        """At a grid point: the row, the head and the block of keys, of queries, or of a number per query."""
        *member, kept, streamed, _ = rest
        if self.keep_keys and side != "key":
            head = head * self.group + member[0]
        if not self.keep_keys and side == "key":
            head = jax.lax.div(head, self.group)
        blocks = kept if (side == "key") == self.keep_keys else streamed
        return row, head, blocks[row * self.visits.stride + visit]

    def spec(self, side: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Blocks of [B, N or K, T, H], or of one number per query, float32[B, N, 1, n * block]."""
        block, lying = self.call.block, side == "number"

        def index(row, head, visit, *rest):
            row, head, place = self.place(side, row, head, visit, rest)
            return (row, head, 0, place) if lying else (row, head, place, 0)

        return pl.BlockSpec((None, None, 1, block) if lying else (None, None, block, shape[3]), index)

    def ids_spec(self, side: str) -> pl.BlockSpec:
        shared = len(self.segment_ids) == 1

        def index(row, head, visit, *rest):
            row, _, place = self.place(side, row, head, visit, rest)
            return 0 if shared else row, 0, place

        return pl.BlockSpec((None, 1, self.call.block), index)

    def __call__(self, kernel, *, inputs, outputs, scratch, num_products: int) -> list[jax.Array]:
        call, visits = self.call, self.visits
        specs = [self.spec(side, x.shape) for side, x in inputs]
        arrays = [x for _, x in inputs]
        if self.segment_ids is not None:
            specs += [self.ids_spec("query"), self.ids_spec("key")]
            arrays += [self.segment_ids] * 2
        B, N = arrays[0].shape[:2]
        grid = (B, N // self.group, visits.width, self.group) if self.keep_keys else (B, N, visits.width)
        scores = B * N * visits.width * call.block**2
        return pl.pallas_call(
            partial(kernel, call=call, stride=visits.stride),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=specs,
                out_specs=[self.spec(side, x.shape) for side, x in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", *("arbitrary",) * (len(grid) - 2))
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * num_products * scores * call.head_dim,
                transcendentals=scores,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=call.interpret,
            name=kernel.__name__.strip("_"),
        )(visits.kept, visits.streamed, visits.flags, *arrays)
