"""The Hopper attention kernels: in Pallas's interpreter against float64, and lowered for a GPU that is not there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.attention import oracle, seen_keys
from benchmarks.compile_attention_gpu import misused_registers
from llava_jax.kernels.flash_gpu import flash_attention
from llava_jax.kernels.flash_gpu_ranges import key_ranges, key_steps, query_steps
from llava_jax.kernels.flash_gpu_tiles import Tiles

SMALL = Tiles(keys=64)  # many steps, so that the slots of a ring are used again and again
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas interprets Hopper kernels from jax 0.11 on"
)


def segments(*rows):
    """int32[B, T] from rows of (id, length)."""
    return np.array([np.repeat(*zip(*row, strict=True)) for row in rows], np.int32)


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # nowhere public

    return interpret_pallas_call.get_races().races_found


def draw(B, T, S, N, K, H):
    random = np.random.default_rng(0)
    tensor = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    return tensor(B, T, N, H), tensor(B, S, K, H), tensor(B, S, K, H), tensor(B, T, N, H)


def results(q, k, v, do, segment_ids, **how):
    @jax.jit
    def run(q, k, v, do):
        out, pull = jax.vjp(lambda *qkv: flash_attention(*qkv, segment_ids, **how), q, k, v)
        return out, *pull(do)

    return [np.asarray(x).astype(np.float64) for x in run(q, k, v, do)]


PACKED = segments([(1, 50), (2, 110), (3, 1), (4, 50), (5, 45)], [(1, 130), (2, 60), (0, 66)])
ODD = dict(warpgroups=3, dq_warpgroups=1, dkv_warpgroups=1, take_turns=False)
CASES = {
    "causal, odd length": (dict(B=1, T=269, S=269, N=1, K=1, H=64), None, True, SMALL),
    "causal, packed, padded, grouped heads": (dict(B=2, T=256, S=256, N=2, K=1, H=128), PACKED, True, SMALL),
    "one token beyond a tile, as CLIP has": (dict(B=1, T=193, S=193, N=1, K=1, H=64), None, False, Tiles()),
    "fewer queries than keys": (
        dict(B=1, T=70, S=330, N=1, K=1, H=128),
        None,
        False,
        Tiles(keys=64, stages=3),
    ),
    "packed, other warpgroups": (
        dict(B=1, T=200, S=200, N=1, K=1, H=64),
        segments([(7, 64), (2, 129), (0, 7)]),
        False,
        Tiles(keys=64, **ODD),
    ),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_float64_without_races(case):
    shape, segment_ids, causal, tiles = CASES[case]
    tensors = draw(**shape)
    how = dict(causal=causal, sm_scale=0.1)
    found = results(*tensors, segment_ids, tiles=tiles, interpret=True, **how)
    for name, x, expected in zip(
        ("out", "dq", "dk", "dv"), found, oracle(*tensors, segment_ids, **how), strict=True
    ):
        assert np.abs(x - expected).max() < 0.008 * np.abs(expected).max(), name
    assert not races_found()


@interpreted
def test_padding_sees_nothing_and_nothing_sees_it():
    q, k, v, do = draw(B=1, T=130, S=130, N=1, K=1, H=64)
    segment_ids = segments([(1, 60), (0, 70)])
    for x in results(q, k, v, do, segment_ids, causal=True, sm_scale=1.0, interpret=True):
        assert x[:, :60].any() and not x[:, 60:].any()


ids = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=24, max_size=24)


@settings(max_examples=30, deadline=None)
@given(ids, st.booleans())
def test_ranges_and_steps_say_what_the_masks_say(runs, causal):
    lengths = [length for _, length in runs]
    row = np.repeat([i + 1 if wanted else 0 for i, (wanted, _) in enumerate(runs)], lengths)[:24]
    segment_ids = row[None].astype(np.int32)
    seen = seen_keys(1, 24, 24, segment_ids, causal)[0, 0]
    first, end = key_ranges(jnp.asarray(segment_ids), 1, 24, 24, 32, causal=causal)
    keys = np.arange(24)
    padded = np.pad(seen, ((0, 8), (0, 0)))
    np.testing.assert_array_equal((keys >= first[0][:, None]) & (keys < end[0][:, None]), padded)
    tiles = padded.reshape(4, 8, 6, 4)
    for block, (lo, full_lo, full_hi, hi) in enumerate(np.asarray(key_steps(first, end, 8, 4))[0]):
        check_steps(lo, full_lo, full_hi, hi, tiles[block].any(axis=(0, 2)), tiles[block].all(axis=(0, 2)))
    tiles = padded.reshape(8, 4, 3, 8)
    for block, (lo, full_lo, full_hi, hi) in enumerate(np.asarray(query_steps(first, end, 4, 8, 24))[0]):
        check_steps(
            lo, full_lo, full_hi, hi, tiles[:, :, block].any(axis=(1, 2)), tiles[:, :, block].all(axis=(1, 2))
        )


def check_steps(lo, full_lo, full_hi, hi, some, full):
    assert lo <= full_lo <= full_hi <= hi
    assert full[full_lo:full_hi].all()
    assert not some[:lo].any() and not some[hi:].any()
    assert hi == lo or (some[lo] and some[hi - 1])


def lowered(transform=lambda f: f, T=256, **how):
    """The program for a GPU with output and gradients, as text."""
    tensor = jax.ShapeDtypeStruct((2, T, 4, 128), jnp.bfloat16)
    few = jax.ShapeDtypeStruct((2, T, 2, 128), jnp.bfloat16)
    attend = lambda q, k, v: (
        flash_attention(q, k, v, None, causal=True, sm_scale=0.1, **how).astype(jnp.float32).sum()
    )
    step = jax.jit(jax.value_and_grad(transform(attend), argnums=(0, 1, 2)))
    return step.trace(tensor, few, few).lower(lowering_platforms=("cuda",)).as_text()


def num_kernels(text):
    return len(re.findall(r"custom_call @mosaic_gpu", text))


def test_kernels_lower_for_a_gpu_and_saved_names_spare_the_forward_kernel():
    save = lambda names: (
        lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(*names))
    )
    assert num_kernels(lowered(save(["attention"]))) == 3
    assert num_kernels(lowered(save([]))) == 4


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shared memory"):
        lowered(tiles=Tiles(keys=256, stages=4))
    with pytest.raises(ValueError, match=r"Tiles.keys=96"):
        Tiles(keys=96)
    with pytest.raises(ValueError, match=r"Tiles.dq_stages=1"):
        Tiles(dq_stages=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(H=80), NotImplementedError, "not 80"),
        (dict(N=3, K=2), ValueError, "do not fit together"),
        (dict(S=5), ValueError, "for T = S"),
    ],
)
def test_what_it_cannot_do_is_refused(change, error, message):
    q, k, v, _ = draw(**dict(B=1, T=8, S=8, N=2, K=2, H=64) | change)
    with pytest.raises(error, match=message):
        flash_attention(q, k, v, np.ones((1, 8), np.int32), causal=True, sm_scale=1.0)


def test_float32_and_scales_that_are_not_positive_are_refused():
    q, k, v, _ = draw(B=1, T=8, S=8, N=1, K=1, H=64)
    with pytest.raises(NotImplementedError, match="float32"):
        flash_attention(q.astype(jnp.float32), k, v, None, causal=True, sm_scale=1.0)
    with pytest.raises(ValueError, match="sm_scale=0"):
        flash_attention(q, k, v, None, causal=True, sm_scale=0)


MATMUL = "{ wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, {%r5,%r6}, %rd1, p, 1, 1, 0;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ((MATMUL, COMMIT, f"{WAIT} 0;", "mul.f32 %r7, %r1, %r9;"), None),
        ((MATMUL, COMMIT, f"{WAIT} 1;", "mul.f32 %r7, %r1, %r9;"), "result in flight"),
        ((MATMUL, COMMIT, "cvt.rn.bf16x2.f32 %r5, %r8, %r9;", f"{WAIT} 0;"), "operand overwritten"),
        ((MATMUL, COMMIT, "add.f32 %r7, %r5, %r9;", f"{WAIT} 0;"), None),
        ((MATMUL, COMMIT, "$L__BB0_3:"), "in flight at a branch"),
    ],
)
def test_registers_used_too_early_are_found_in_compiled_code(lines, complaint):
    found = misused_registers("\n".join(lines))
    assert (complaint in found[0]) if complaint else not found
