"""The forward kernel of flash attention on Hopper."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llava_jax.kernels import hopper
from llava_jax.kernels.flash_gpu_ranges import key_steps
from llava_jax.kernels.flash_gpu_tiles import ROWS, Tiles

LOG2E = math.log2(math.e)  # softmax in base 2: the exponential that the hardware has
FLOOR = -1e30  # where the running maximum starts: finite, so that a row without keys makes no inf - inf


def heads_together(num_sheets: int, sheet_bytes: int, cache_bytes: int) -> int:
    """How many of the (batch, head) sheets run before the next ones begin, so that their keys stay in L2."""
    fit = max(1, min(num_sheets, cache_bytes // sheet_bytes))
    return max(n for n in range(1, fit + 1) if num_sheets % n == 0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What is known of a block of queries before it runs."""

    q_shape: tuple[int, int, int, int]
    kv_heads: int
    tiles: Tiles
    log2_scale: float
    checked: bool

    @property
    def width(self) -> int:
        return self.q_shape[3]

    def load(self, lo, hi, b, head, k_gm, v_gm, k_ring, v_ring):
        """The loading warpgroup."""
        plgpu.set_max_registers(hopper.LOADER_REGISTERS, action="decrease")
        kv_head = lax.div(head, jnp.int32(self.q_shape[2] // self.kv_heads))

        @pl.loop(lo, hi)
        def _(step):
            keys = pl.ds(step * self.tiles.keys, self.tiles.keys)
            k_ring.fill(step - lo, k_gm.at[b, keys, kv_head])
            v_ring.fill(step - lo, v_gm.at[b, keys, kv_head])

        k_ring.drain(hi - lo)
        v_ring.drain(hi - lo)

    def softmax(self, scores, step, first, end, top, total, *, masked):
        """One step of the running softmax.

        Returns by how much older weights shrink, the new ones, the new maximum and the total per row.
        """
        if masked:
            shape = scores.shape
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=hopper.TILE) + step * self.tiles.keys
            seen = (key >= hopper.over_columns(first, shape)) & (key < hopper.over_columns(end, shape))
            scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * self.log2_scale)
        weights = jnp.exp2(scores * self.log2_scale - hopper.over_columns(new_top, scores.shape))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + weights.sum(axis=1)
        # Now, while the matmul of the step before is under way, and not when the results are first needed:
        return lax.optimization_barrier((shrink, weights, new_top, total))

    def attend(self, bounds, q, first, end, k_ring, v_ring, turn, wg):
        """The loop of a computing warpgroup: output, unnormalised, with maximum and total per row."""
        lo, full_lo, full_hi, hi = bounds
        shape, out_shape = (ROWS, self.tiles.keys), (ROWS, self.width)
        row = lambda value: hopper.filled((ROWS,), value, hopper.PER_ROW)

        def begin(scores):
            scores.add(q, k.transpose((1, 0)))
            return scores.value()

        def advance(masked):
            def step(i, carry):
                """The matmul of scores i goes first, that of values i - 1 is under way during the softmax."""
                out, weights, top, total = carry
                (k,), (v,) = k_ring.wait(i - lo), v_ring.wait(i - 1 - lo)
                turn.take(wg)

                def matmuls(scores, values):
                    values.set(out)
                    scores.add(q, k.transpose((1, 0)))
                    values.add(weights, v)
                    turn.pass_on(wg)
                    new = scores.value(in_flight=1)
                    k_ring.release(i - lo)
                    shrink, new_weights, *rest = self.softmax(new, i, first, end, top, total, masked=masked)
                    new_out = values.value() * hopper.over_columns(shrink, out_shape)
                    v_ring.release(i - 1 - lo)
                    return new_out, hopper.rounded(new_weights), *rest

                return hopper.with_accumulators(matmuls, shape, out_shape, checked=self.checked)

            return step

        def finish(values):
            values.set(out)
            values.add(weights, v)
            return values.value()

        (k,) = k_ring.wait(jnp.int32(0))
        scores = hopper.with_accumulators(begin, shape, checked=self.checked)
        k_ring.release(jnp.int32(0))
        _, weights, *rest = self.softmax(scores, lo, first, end, row(FLOOR), row(0.0), masked=True)
        carry = hopper.filled(out_shape, 0.0, hopper.TILE), hopper.rounded(weights), *rest
        full_lo = jnp.maximum(full_lo, lo + 1)
        full_hi = jnp.maximum(full_hi, full_lo)
        turn.open(wg)
        carry = lax.fori_loop(lo + 1, full_lo, advance(masked=True), carry)
        carry = lax.fori_loop(full_lo, full_hi, advance(masked=False), carry)
        out, weights, top, total = lax.fori_loop(full_hi, hi, advance(masked=True), carry)
        turn.close(wg)
        (v,) = v_ring.wait(hi - 1 - lo)
        out = hopper.with_accumulators(finish, out_shape, checked=self.checked)
        v_ring.release(hi - 1 - lo)
        return out, top, total

    def store(self, result, q_sm, lse_sm):
        """Normalises into the shared memory that held the queries."""
        out, top, total = result
        inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
        q_sm[...] = (out * hopper.over_columns(inverse, out.shape)).astype(jnp.bfloat16)
        # Infinity makes all weights 0 when the backward kernels compute them again.
        lse_sm[...] = jnp.where(total == 0.0, jnp.inf, top + jnp.log(total) * LOG2E)


def flash_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    end: jax.Array,
    *,
    causal: bool,
    sm_scale: float,
    tiles: Tiles,
    interpret,
) -> tuple[jax.Array, jax.Array]:
    """q bfloat16[B, T, N, H], k and v bfloat16[B, S, K, H], key ranges int32[B, padded] -> out, lse.

    out bfloat16[B, T, N, H]; lse float32[B, N, padded] is in base 2, and infinite where a query sees nothing.
    interpret: None to run on a GPU, or the parameters of Pallas's interpret mode.
    """
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    rows, wgs = ROWS * tiles.warpgroups, tiles.warpgroups
    num_blocks = first.shape[1] // rows
    steps = key_steps(first, end, rows, tiles.keys)
    together = heads_together(B * N, 4 * S * H * K // N, tiles.cache_bytes)
    block = _Block(q.shape, K, tiles, sm_scale * LOG2E, interpret is not None)

    def kernel(
        q_gm, k_gm, v_gm, first_gm, end_gm, steps_gm, out_gm, lse_gm, *, q_sm, lse_sm, q_full, k, v, turns
    ):
        wg, sheet = lax.axis_index("wg"), lax.axis_index("group") * together + lax.axis_index("sheet")
        b, head = lax.div(sheet, jnp.int32(N)), lax.rem(sheet, jnp.int32(N))
        at = lax.axis_index("block")
        if causal:  # the blocks with most keys begin, so that none is left over at the end
            at = num_blocks - 1 - at
        bounds = lo, _, _, hi = tuple(steps_gm[b, at, i] for i in range(4))

        @pl.when(wg == wgs)
        def _():
            block.load(lo, hi, b, head, k_gm, v_gm, k, v)

        @pl.when(wg < wgs)
        def _():
            plgpu.set_max_registers(hopper.compute_registers(wgs), action="increase")
            mine = pl.ds(at * rows + wg * ROWS, ROWS)
            q_mine, lse_mine = q_sm.at[wg], lse_sm.at[wg]

            @pl.when(lo < hi)
            def _():
                plgpu.copy_gmem_to_smem(q_gm.at[b, mine, head], q_mine, q_full.at[wg])
                key_range = (hopper.load(ref.at[b, mine], hopper.PER_ROW) for ref in (first_gm, end_gm))
                plgpu.barrier_wait(q_full.at[wg])
                block.store(block.attend(bounds, q_mine, *key_range, k, v, turns, wg), q_mine, lse_mine)

            @pl.when(lo == hi)
            def _():
                q_mine[...] = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.bfloat16), hopper.TILE)
                lse_mine[...] = hopper.filled((ROWS,), math.inf, hopper.PER_ROW)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_mine, out_gm.at[b, mine, head])
            plgpu.copy_smem_to_gmem(lse_mine, lse_gm.at[b, head, mine])
            plgpu.wait_smem_to_gmem(0)

    keys = (hopper.swizzled, (tiles.keys, H))
    ring = hopper.Ring.types(keys, stages=tiles.stages, readers=wgs)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, first.shape[1]), jnp.float32),
        ),
        scratch_types=dict(
            q_sm=hopper.swizzled(wgs, ROWS, H),
            lse_sm=plgpu.SMEM((wgs, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_barriers=wgs),
            k=ring,
            v=ring,
            turns=hopper.Turns.types(wgs, take_turns=tiles.take_turns),
        ),
        grid=(B * N // together, num_blocks, together),
        grid_names=("group", "block", "sheet"),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=hopper.COMPILER,
        interpret=interpret,
    )(q, k, v, first, end, steps)
