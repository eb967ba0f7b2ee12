"""What attention kernels need of a Hopper GPU: tiles in swizzled shared memory, rings of them, matmuls, registers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA
PER_ROW = TILE.reduce(1)  # one value for each row of a tile
PER_COLUMN = TILE.reduce(0)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # 64 bfloat16 are 128 bytes
LOADER_REGISTERS = 24
COMPILER = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)  # what jax 0.11 does and jax 0.10 does not by itself


def compute_registers(warpgroups: int) -> int:
    """Registers per thread that computing warpgroups may claim when the loading one keeps LOADER_REGISTERS.

    The block starts with an equal share of 65536 for everyone; asking for more than the loader gives up hangs.
    """
    share = 65536 // (128 * (warpgroups + 1)) // 8 * 8
    return min(240, (share * (warpgroups + 1) - LOADER_REGISTERS) // warpgroups // 8 * 8)


def swizzled(*shape: int):
    """bfloat16 shared memory as TMA writes and wgmma reads it; the last two dimensions are the tile."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def load(ref, layout) -> jax.Array:
    """A vector in global or shared memory as registers of the given layout."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # an argument that jax 0.11 gave up
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def over_columns(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[rows] -> [rows, columns], the same in every column."""
    return lax.broadcast_in_dim(vector, shape, [0])


def over_rows(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[columns] -> [rows, columns], the same in every row."""
    return lax.broadcast_in_dim(vector, shape, [1])


def filled(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A float32 tile of one value, as registers of the given layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rounded(tile: jax.Array) -> jax.Array:
    """The tile in bfloat16, for a matmul that starts now.

    Without the barrier the conversion may happen early, into registers that a matmul in flight still reads:
    ptxas then runs all matmuls one by one (its message C7513).
    """
    return lax.optimization_barrier(tile).astype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that the loader fills by TMA and the computing warpgroups use and release, in turns."""

    buffers: tuple  # each [stages, ...]; filled together
    full: jax.Array
    empty: jax.Array
    stages: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def types(cls, *tiles, stages: int, readers: int) -> "Ring":
        """What to allocate for a ring of such tiles: (shape, dtype) vectors or shapes of swizzled tiles."""
        barrier = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        buffers = tuple(make(stages, *shape) for make, shape in tiles)
        return cls(buffers, barrier(len(tiles)), barrier(readers), stages)

    def slot(self, turn):
        return lax.rem(turn, jnp.int32(self.stages))

    def fill(self, turn, *sources) -> None:
        slot = self.slot(turn)

        @pl.when(turn >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def at(self, turn) -> tuple:
        """References to what was loaded in this turn, to use after wait and before release."""
        return tuple(buffer.at[self.slot(turn)] for buffer in self.buffers)

    def wait(self, turn) -> tuple:
        plgpu.barrier_wait(self.full.at[self.slot(turn)])
        return self.at(turn)

    def release(self, turn) -> None:
        plgpu.barrier_arrive(self.empty.at[self.slot(turn)])

    def drain(self, turns) -> None:
        """Sees the last releases, so that no barrier is left in the middle of a phase."""

        @pl.loop(jnp.maximum(turns - self.stages, 0), turns)
        def _(turn):
            plgpu.barrier_wait(self.empty.at[self.slot(turn)])


class Accumulator:
    """A float32 tile in registers that matmuls add to while the program goes on."""

    def __init__(self, ref):
        self._ref = ref

    def set(self, value: jax.Array) -> None:
        self._ref[...] = value

    def add(self, a, b) -> None:
        """Starts a @ b, with a in shared memory or registers and b in shared memory."""
        plgpu.wgmma(self._ref, a, b)

    def value(self, in_flight: int = 0) -> jax.Array:
        """The sum, after waiting until only the last `in_flight` matmuls may be unfinished.

        The barrier keeps the compiler from using the registers before the wait, which it does not see them need.
        """
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(self._ref, wait_n=in_flight))


class CheckedAccumulator:
    """The same for interpret mode, which has no wgmma on registers and does not watch what wgmma reads (jax 0.12)."""

    def __init__(self, shape: tuple[int, int]):
        self._value = jnp.zeros(shape, jnp.float32)

    def set(self, value: jax.Array) -> None:
        self._value = value

    def add(self, a, b) -> None:
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        plgpu.commit_smem()  # a plain read, unlike one of wgmma, is fenced before TMA may write there again
        self._value += jnp.dot(a, b, preferred_element_type=jnp.float32)

    def value(self, in_flight: int = 0) -> jax.Array:
        return self._value


def with_accumulators(body: Callable, *shapes: tuple[int, int], checked: bool):
    """body(*accumulators) with accumulators of these shapes that start at zero; none is in flight after it."""
    if checked:
        return body(*(CheckedAccumulator(shape) for shape in shapes))
    return pl.run_scoped(
        lambda *refs: body(*(Accumulator(ref) for ref in refs)), *(plgpu.ACC(shape) for shape in shapes)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
    """Warpgroups that start their matmuls one after the other, so that one computes while another multiplies."""

    barriers: jax.Array | None
    warpgroups: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def types(cls, warpgroups: int, *, take_turns: bool) -> "Turns":
        taken = take_turns and warpgroups > 1
        return cls(plgpu.Barrier(num_barriers=warpgroups) if taken else None, warpgroups)

    def open(self, wg) -> None:
        if self.barriers is not None:
            pl.when(wg == self.warpgroups - 1)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))

    def take(self, wg) -> None:
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[wg])

    def pass_on(self, wg) -> None:
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[lax.rem(wg + 1, jnp.int32(self.warpgroups))])

    def close(self, wg) -> None:
        """Uses up the turn that is left when everyone took equally many."""
        if self.barriers is not None:
            pl.when(wg == 0)(lambda: plgpu.barrier_wait(self.barriers.at[0]))
