"""The backward kernels of flash attention on Hopper: dq, and dk with dv; no atomics, so the bits are always the same."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llava_jax.kernels import hopper
from llava_jax.kernels.flash_gpu_forward import LOG2E, heads_together
from llava_jax.kernels.flash_gpu_ranges import key_steps, query_steps
from llava_jax.kernels.flash_gpu_tiles import ROWS, Tiles


class Saved(NamedTuple):
    """What the backward kernels read; see flash_gpu.flash_attention for the letters."""

    q: jax.Array  # bfloat16[B, T, N, H]
    k: jax.Array  # bfloat16[B, S, K, H]
    v: jax.Array
    do: jax.Array  # bfloat16[B, T, N, H], the gradient of the output
    lse: jax.Array  # float32[B, N, padded], from the forward kernel
    delta: jax.Array  # float32[B, N, padded], output times its gradient
    first: jax.Array  # int32[B, padded], key ranges
    end: jax.Array


@dataclasses.dataclass(frozen=True)
class _Block:
    """A tile of ROWS queries (dq) or keys (dkv) of one warpgroup against steps of `step` keys or queries."""

    step: int
    width: int
    sm_scale: float
    checked: bool

    @property
    def scores_shape(self) -> tuple[int, int]:
        return ROWS, self.step

    @property
    def out_shape(self) -> tuple[int, int]:
        return ROWS, self.width

    def weights(self, scores, lse, first, end, key, *, masked):
        """The softmax again, from scores[...] and what is known per query, all of the same shape."""
        weights = jnp.exp2(scores * (self.sm_scale * LOG2E) - lse)
        if masked:
            weights = jnp.where((key() >= first()) & (key() < end()), weights, 0.0)
        return lax.optimization_barrier(weights)  # now, while the next matmul is under way

    def accumulate(self, body, *shapes):
        return hopper.with_accumulators(body, *shapes, checked=self.checked)

    def dq(self, bounds, q, do, rows, k_ring, v_ring):
        """The loop of a warpgroup over keys: float32[ROWS, H], without the factor sm_scale."""
        lo, full_lo, full_hi, hi = bounds
        first, end, lse, delta = (lambda row=row: hopper.over_columns(row, self.scores_shape) for row in rows)

        def score_gradients(i, scores, weight_gradients, behind, *, masked):
            """The accumulators are in flight with `behind` matmuls behind them."""
            key = lambda: (
                plgpu.broadcasted_iota(jnp.int32, self.scores_shape, 1, layout=hopper.TILE) + i * self.step
            )
            value = scores.value(in_flight=behind + 1)
            weights = self.weights(value, lse(), first, end, key, masked=masked)
            return lax.optimization_barrier(weights * (weight_gradients.value(in_flight=behind) - delta()))

        def begin(scores, weight_gradients):
            (k,), (v,) = k_ring.at(0), v_ring.at(0)
            scores.add(q, k.transpose((1, 0)))
            weight_gradients.add(do, v.transpose((1, 0)))
            return score_gradients(lo, scores, weight_gradients, 0, masked=True)

        def advance(masked):
            def step(i, carry):
                """Behind the two matmuls of step i, that of dq for step i - 1 is under way during the arithmetic."""
                dq, ds = carry
                (k,), (v,), (k_before,) = k_ring.wait(i - lo), v_ring.wait(i - lo), k_ring.at(i - 1 - lo)

                def matmuls(scores, weight_gradients, sum_dq):
                    sum_dq.set(dq)
                    scores.add(q, k.transpose((1, 0)))
                    weight_gradients.add(do, v.transpose((1, 0)))
                    sum_dq.add(ds, k_before)
                    new_ds = score_gradients(i, scores, weight_gradients, 1, masked=masked)
                    v_ring.release(i - lo)
                    new_dq = sum_dq.value()
                    k_ring.release(i - 1 - lo)
                    return new_dq, hopper.rounded(new_ds)

                return self.accumulate(matmuls, self.scores_shape, self.scores_shape, self.out_shape)

            return step

        def finish(sum_dq):
            (k,) = k_ring.at(hi - 1 - lo)
            sum_dq.set(dq)
            sum_dq.add(ds, k)
            return sum_dq.value()

        start = jnp.int32(0)
        k_ring.wait(start), v_ring.wait(start)
        ds = self.accumulate(begin, self.scores_shape, self.scores_shape)
        v_ring.release(start)
        carry = hopper.filled(self.out_shape, 0.0, hopper.TILE), hopper.rounded(ds)
        full_lo = jnp.maximum(full_lo, lo + 1)
        full_hi = jnp.maximum(full_hi, full_lo)
        carry = lax.fori_loop(lo + 1, full_lo, advance(masked=True), carry)
        carry = lax.fori_loop(full_lo, full_hi, advance(masked=False), carry)
        dq, ds = lax.fori_loop(full_hi, hi, advance(masked=True), carry)
        dq = self.accumulate(finish, self.out_shape)
        k_ring.release(hi - 1 - lo)
        return dq

    def dkv(self, bounds, group, key0, k, v, q_ring, do_ring):
        """The loop of a warpgroup over queries of `group` heads: dk, without the factor sm_scale, and dv."""
        lo, full_lo, full_hi, hi = bounds
        over = lambda vector: hopper.over_rows(hopper.load(vector, hopper.PER_COLUMN), self.scores_shape)
        key = lambda: plgpu.broadcasted_iota(jnp.int32, self.scores_shape, 0, layout=hopper.TILE) + key0

        def advance(turn0, masked):
            def step(i, carry):
                """The matmul of dv is under way while the gradients of the scores are computed for dk."""
                dk, dv = carry
                turn = turn0 + i
                (q, lse, first, end), (do, delta) = q_ring.wait(turn), do_ring.wait(turn)

                def matmuls(scores, weight_gradients, sum_dk, sum_dv):
                    sum_dk.set(dk)
                    sum_dv.set(dv)
                    scores.add(k, q.transpose((1, 0)))
                    weight_gradients.add(v, do.transpose((1, 0)))
                    value = scores.value(in_flight=1)
                    weights = self.weights(
                        value, over(lse), lambda: over(first), lambda: over(end), key, masked=masked
                    )
                    sum_dv.add(hopper.rounded(weights), do)
                    ds = weights * (weight_gradients.value(in_flight=1) - over(delta))
                    sum_dk.add(hopper.rounded(ds), q)
                    return sum_dk.value(), sum_dv.value()

                carry = self.accumulate(
                    matmuls, self.scores_shape, self.scores_shape, self.out_shape, self.out_shape
                )
                plgpu.commit_smem()  # the vectors were read by plain loads, and TMA writes there next
                q_ring.release(turn)
                do_ring.release(turn)
                return carry

            return step

        def one_head(n, carry):
            turn0 = n * (hi - lo) - lo
            carry = lax.fori_loop(lo, full_lo, advance(turn0, masked=True), carry)
            carry = lax.fori_loop(full_lo, full_hi, advance(turn0, masked=False), carry)
            return lax.fori_loop(full_hi, hi, advance(turn0, masked=True), carry)

        zero = hopper.filled(self.out_shape, 0.0, hopper.TILE)
        return lax.fori_loop(0, group, one_head, (zero, zero))


def _store(value: jax.Array, tile, destination) -> None:
    """Registers to global memory through the shared memory of `tile`; wait_smem_to_gmem ends it."""
    tile[...] = value.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, destination)


def gradient_of_queries(saved: Saved, *, causal: bool, sm_scale: float, tiles: Tiles, interpret) -> jax.Array:
    """-> dq bfloat16[B, T, N, H]."""
    (B, _, N, H), (S, K) = saved.q.shape, saved.k.shape[1:3]
    wgs, rows = tiles.dq_warpgroups, ROWS * tiles.dq_warpgroups
    num_blocks = saved.first.shape[1] // rows
    steps = key_steps(saved.first, saved.end, rows, tiles.dq_keys)
    together = heads_together(B * N, 4 * S * H * K // N, tiles.cache_bytes)
    math = _Block(tiles.dq_keys, H, sm_scale, interpret is not None)

    def kernel(gm, steps_gm, dq_gm, *, q_sm, do_sm, q_full, k_ring, v_ring):
        wg, sheet = lax.axis_index("wg"), lax.axis_index("group") * together + lax.axis_index("sheet")
        b, head = lax.div(sheet, jnp.int32(N)), lax.rem(sheet, jnp.int32(N))
        block = num_blocks - 1 - lax.axis_index("block") if causal else lax.axis_index("block")
        bounds = lo, _, _, hi = tuple(steps_gm[b, block, i] for i in range(4))

        @pl.when(wg == wgs)
        def _():
            plgpu.set_max_registers(hopper.LOADER_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(N // K))

            @pl.loop(lo, hi)
            def _(step):
                keys = pl.ds(step * tiles.dq_keys, tiles.dq_keys)
                k_ring.fill(step - lo, gm.k.at[b, keys, kv_head])
                v_ring.fill(step - lo, gm.v.at[b, keys, kv_head])

            k_ring.drain(hi - lo)
            v_ring.drain(hi - lo)

        @pl.when(wg < wgs)
        def _():
            plgpu.set_max_registers(hopper.compute_registers(wgs), action="increase")
            mine = pl.ds(block * rows + wg * ROWS, ROWS)
            q, do, destination = q_sm.at[wg], do_sm.at[wg], dq_gm.at[b, mine, head]

            @pl.when(lo < hi)
            def _():
                plgpu.copy_gmem_to_smem(gm.q.at[b, mine, head], q, q_full.at[wg])
                plgpu.copy_gmem_to_smem(gm.do.at[b, mine, head], do, q_full.at[wg])
                refs = (
                    gm.first.at[b, mine],
                    gm.end.at[b, mine],
                    gm.lse.at[b, head, mine],
                    gm.delta.at[b, head, mine],
                )
                known = tuple(hopper.load(ref, hopper.PER_ROW) for ref in refs)
                plgpu.barrier_wait(q_full.at[wg])
                _store(math.dq(bounds, q, do, known, k_ring, v_ring) * sm_scale, q, destination)

            @pl.when(lo == hi)
            def _():
                _store(hopper.filled((ROWS, H), 0.0, hopper.TILE), q, destination)

            plgpu.wait_smem_to_gmem(0)

    ring = hopper.Ring.types((hopper.swizzled, (tiles.dq_keys, H)), stages=tiles.dq_stages, readers=wgs)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(saved.q.shape, saved.q.dtype),
        scratch_types=dict(
            q_sm=hopper.swizzled(wgs, ROWS, H),
            do_sm=hopper.swizzled(wgs, ROWS, H),
            q_full=plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
            k_ring=ring,
            v_ring=ring,
        ),
        grid=(B * N // together, num_blocks, together),
        grid_names=("group", "block", "sheet"),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=hopper.COMPILER,
        interpret=interpret,
    )(saved, steps)


def gradients_of_keys_and_values(
    saved: Saved, *, sm_scale: float, tiles: Tiles, interpret
) -> tuple[jax.Array, jax.Array]:
    """-> dk, dv bfloat16[B, S, K, H], summed over the query heads of each key head inside the kernel."""
    (B, T, N, H), (S, K) = saved.q.shape, saved.k.shape[1:3]
    wgs, keys, group = tiles.dkv_warpgroups, ROWS * tiles.dkv_warpgroups, N // K
    num_blocks = -(-S // keys)
    steps = query_steps(saved.first, saved.end, tiles.dkv_queries, keys, S)
    together = heads_together(B * K, 4 * T * H * group, tiles.cache_bytes)
    math = _Block(tiles.dkv_queries, H, sm_scale, interpret is not None)

    def kernel(gm, steps_gm, dk_gm, dv_gm, *, k_sm, v_sm, kv_full, q_ring, do_ring):
        wg, sheet = lax.axis_index("wg"), lax.axis_index("group") * together + lax.axis_index("sheet")
        b, kv_head = lax.div(sheet, jnp.int32(K)), lax.rem(sheet, jnp.int32(K))
        block = lax.axis_index("block")
        bounds = lo, _, _, hi = tuple(steps_gm[b, block, i] for i in range(4))

        @pl.when(wg == wgs)
        def _():
            plgpu.set_max_registers(hopper.LOADER_REGISTERS, action="decrease")
            turns = (hi - lo) * group

            @pl.loop(0, turns)
            def _(turn):
                head = kv_head * group + lax.div(turn, hi - lo)
                at = pl.ds((lo + lax.rem(turn, hi - lo)) * tiles.dkv_queries, tiles.dkv_queries)
                vectors = gm.lse.at[b, head, at], gm.first.at[b, at], gm.end.at[b, at]
                q_ring.fill(turn, gm.q.at[b, at, head], *vectors)
                do_ring.fill(turn, gm.do.at[b, at, head], gm.delta.at[b, head, at])

            q_ring.drain(turns)
            do_ring.drain(turns)

        @pl.when(wg < wgs)
        def _():
            plgpu.set_max_registers(hopper.compute_registers(wgs), action="increase")
            key0 = block * keys + wg * ROWS
            mine = pl.ds(key0, ROWS)
            k, v = k_sm.at[wg], v_sm.at[wg]
            plgpu.copy_gmem_to_smem(gm.k.at[b, mine, kv_head], k, kv_full.at[wg])
            plgpu.copy_gmem_to_smem(gm.v.at[b, mine, kv_head], v, kv_full.at[wg])
            plgpu.barrier_wait(kv_full.at[wg])
            dk, dv = math.dkv(bounds, group, key0, k, v, q_ring, do_ring)
            _store(dk * sm_scale, k, dk_gm.at[b, mine, kv_head])
            _store(dv, v, dv_gm.at[b, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

    vector = lambda dtype: (lambda *shape: plgpu.SMEM(shape, dtype), (tiles.dkv_queries,))
    tile = hopper.swizzled, (tiles.dkv_queries, H)
    ring = lambda *buffers: hopper.Ring.types(*buffers, stages=tiles.dkv_stages, readers=wgs)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(saved.k.shape, saved.k.dtype),) * 2,
        scratch_types=dict(
            k_sm=hopper.swizzled(wgs, ROWS, H),
            v_sm=hopper.swizzled(wgs, ROWS, H),
            kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
            q_ring=ring(tile, vector(jnp.float32), vector(jnp.int32), vector(jnp.int32)),
            do_ring=ring(tile, vector(jnp.float32)),
        ),
        grid=(B * K // together, num_blocks, together),
        grid_names=("group", "block", "sheet"),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=hopper.COMPILER,
        interpret=interpret,
    )(saved, steps)
