"""The TPU kernels, interpreted on the CPU, against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llava_jax.errors import ConfigError
from llava_jax.kernels import flash_tpu
from llava_jax.kernels.flash_blocks import DENSE, FIRST, LAST, MASKED, list_visits, visible_blocks
from llava_jax.kernels.flash_tpu import block_size, flash_attention
from llava_jax.kernels.splash import splash_attention
from tests.attention_oracle import assert_close, attention_and_gradients, packed_row, random_inputs

INTERPRETED = pltpu.InterpretParams()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks already in short sequences."""
    monkeypatch.setattr(flash_tpu, "BLOCK", 128)
    monkeypatch.setattr(flash_tpu, "WHOLE", 160)


def run(q, k, v, grad, *, segment_ids=None, interpret=INTERPRETED, kernel=flash_attention, **how):
    """(out, dq, dk, dv)."""
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    how = dict(sm_scale=q.shape[-1] ** -0.5, interpret=interpret) | how

    @jax.jit
    def both(q, k, v, grad):
        out, vjp = jax.vjp(lambda q, k, v: kernel(q, k, v, ids, **how), q, k, v)
        return out, *vjp(grad)

    return both(*(jnp.asarray(x) for x in (q, k, v, grad)))


# name: B, T, N, K, H, causal, lengths of the segments of each row
CASES = {
    "clip": (2, 145, 2, 2, 64, False, None),
    "odd_without_mask": (1, 273, 2, 1, 80, False, None),
    "odd_causal": (1, 301, 2, 2, 64, True, None),
    "packed": (2, 300, 1, 1, 128, True, [(200, 100), (10, 118, 72, 70, 30)]),
    "grouped_by_8_with_padding": (2, 200, 8, 1, 64, True, [(130,), (7, 100, 50)]),
    "segments_without_causality": (1, 256, 4, 2, 32, False, [(40, 3, 100)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_oracle(name):
    B, T, N, K, H, causal, lengths = CASES[name]
    segment_ids = None if lengths is None else np.stack([packed_row(T, *row) for row in lengths])
    inputs = random_inputs(B=B, T=T, N=N, K=K, H=H)
    how = dict(causal=causal, segment_ids=segment_ids)
    assert_close(run(*inputs, **how), attention_and_gradients(*inputs, **how), atol=1e-5)


def test_padding_gives_zero_and_has_no_gradient():
    inputs = random_inputs(B=2, T=300, N=1, K=1, H=16)
    segment_ids = np.stack(
        [packed_row(300, 100), packed_row(300)]
    )  # whole blocks of padding, a whole row of it
    for found in run(*inputs, segment_ids=segment_ids, causal=True):
        assert not np.asarray(found)[segment_ids == 0].any()
        assert np.asarray(found)[0, :100].any()


def test_ids_in_any_order_give_the_same_as_the_oracle():
    ids = np.random.default_rng(0).integers(0, 3, (1, 260)).astype(np.int32)
    inputs = random_inputs(B=1, T=260, N=1, K=1, H=8)
    how = dict(segment_ids=ids, causal=False)
    assert_close(run(*inputs, **how), attention_and_gradients(*inputs, **how), atol=1e-5)


def test_bfloat16_stays_within_its_rounding():
    """Weights and slopes are rounded to 8 bits before they are multiplied, sums are float32."""
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(B=1, T=250, N=1, K=1, H=128)]
    how = dict(causal=True, segment_ids=packed_row(250, 150, 80)[None])
    found = run(*inputs, **how)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    expected = attention_and_gradients(*(np.asarray(x, np.float32) for x in inputs), **how)
    for got, want in zip(found, expected, strict=True):
        error = np.abs(np.asarray(got, np.float32) - want)
        assert error.max() < 0.03 and error.mean() < 0.002


def test_skipped_blocks_are_not_read():
    """Keys and values of the first segment are NaN; the second begins with a block of its own."""
    q, k, v, grad = random_inputs(B=1, T=384, N=1, K=1, H=16)
    segment_ids = packed_row(384, 128, 256)[None]
    how = dict(segment_ids=segment_ids, causal=True)
    expected = [x[:, 128:] for x in attention_and_gradients(q, k, v, grad, **how)]
    for x in (q, k, v, grad):
        x[:, :128] = np.nan
    assert_close([x[:, 128:] for x in run(q, k, v, grad, **how)], expected, atol=1e-5)


def visits_of(segment_ids, num_blocks, causal, keep_keys=False):
    """Per row, the visits that compute: (kept, streamed, masked)."""

    @jax.jit
    def visits(segment_ids):
        visible, dense = visible_blocks(segment_ids, num_blocks=num_blocks, causal=causal)
        if keep_keys:
            visible, dense = visible.swapaxes(1, 2), dense.swapaxes(1, 2)
        return list_visits(visible, dense, causal=causal)

    kept, streamed, flags, width = visits(segment_ids)
    rows = np.stack([kept, streamed, flags]).reshape(3, -1, width).transpose(1, 2, 0).tolist()
    for row in rows:
        assert (
            [v[0] for v in row if v[2] & FIRST]
            == [v[0] for v in row if v[2] & LAST]
            == list(range(num_blocks))
        )
    return [[(a, b, bool(f & MASKED)) for a, b, f in row if f & (MASKED | DENSE)] for row in rows]


def test_only_blocks_with_something_to_see_are_visited():
    dense, masked = False, True
    assert visits_of(None, 2, True) == [[(0, 0, masked), (1, 0, dense), (1, 1, masked)]]
    assert visits_of(None, 2, True, keep_keys=True) == [[(0, 0, masked), (0, 1, dense), (1, 1, masked)]]
    assert visits_of(None, 2, False) == [[(0, 0, dense), (0, 1, dense), (1, 0, dense), (1, 1, dense)]]
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert visits_of(ids, 4, True) == [
        [(0, 0, masked), (1, 0, dense), (1, 1, masked), (2, 2, masked), (3, 2, dense), (3, 3, masked)],
        [(0, 0, masked), (1, 0, masked), (1, 1, masked), (2, 1, masked), (2, 2, masked)],
        [],
    ]


def test_blocks_hold_short_sequences_whole_and_waste_little_of_long_ones(monkeypatch):
    monkeypatch.undo()
    assert block_size(577) == (577, 1)
    assert block_size(2048) == (512, 4)
    assert block_size(700) == (384, 2)
    assert block_size(8192) == (512, 16)


@pytest.mark.parametrize("causal", [False, True])
def test_splash_gives_the_same(causal):
    inputs = random_inputs(B=2, T=150, N=4, K=2, H=64)
    segment_ids = np.stack([packed_row(150, 70, 40), packed_row(150, 130, 20)])
    for ids in (None, segment_ids):
        how = dict(causal=causal, segment_ids=ids)
        expected = attention_and_gradients(*inputs, **how)
        assert_close(run(*inputs, kernel=splash_attention, interpret=True, **how), expected, atol=2e-5)


def races_found(call) -> bool:
    """Whether the interpreter saw two accesses that nothing orders."""
    interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    jax.block_until_ready(call())
    return interpreter.races.races_found


def test_kernels_have_no_races():
    inputs = random_inputs(B=1, T=200, N=2, K=1, H=8)
    segment_ids = packed_row(200, 70, 90)[None]
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    assert not races_found(lambda: run(*inputs, segment_ids=segment_ids, causal=True, interpret=interpret))


def test_races_are_detected():
    def hasty(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        out_ref[0, 0] = 1.0
        copy.wait()

    call = pl.pallas_call(
        hasty,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert races_found(partial(call, jnp.ones((8, 128))))


def test_other_dtypes_are_refused():
    x = jnp.ones((1, 8, 1, 8), jnp.float16)
    with pytest.raises(ConfigError, match="bfloat16 or float32, not float16"):
        flash_attention(x, x, x, causal=True, sm_scale=1.0)
    with pytest.raises(ConfigError, match="not bfloat16, float32, float32"):
        y = x.astype(jnp.float32)
        flash_attention(x.astype(jnp.bfloat16), y, y, causal=True, sm_scale=1.0)


@st.composite
def calls(draw):
    B, K, G = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 8)))
    T = draw(st.integers(1, 520))
    shape = dict(B=B, T=T, N=K * G, K=K, H=draw(st.sampled_from((8, 64, 80, 128))))
    segment_ids = None
    if draw(st.booleans()):
        ends = st.lists(st.integers(0, T), min_size=1, max_size=5).map(sorted)
        segment_ids = np.stack([packed_row(T, *np.diff([0, *draw(ends)])) for _ in range(B)])
    return shape, dict(causal=draw(st.booleans()), segment_ids=segment_ids)


@pytest.mark.slow
@given(calls())
@settings(max_examples=30, deadline=None)
def test_any_shape_equals_the_oracle(call):
    shape, how = call
    inputs = random_inputs(**shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_tpu, "BLOCK", 128)
        patch.setattr(flash_tpu, "WHOLE", 160)
        assert_close(run(*inputs, **how), attention_and_gradients(*inputs, **how), atol=2e-5)


@pytest.mark.slow
def test_the_blocks_that_tpus_run_equal_the_oracle(monkeypatch):
    monkeypatch.undo()
    for shape, causal, lengths in (
        (dict(B=1, T=577, N=2, K=2, H=64), False, None),
        (dict(B=1, T=2048, N=2, K=1, H=128), True, (700, 900, 300)),
    ):
        inputs = random_inputs(**shape)
        how = dict(causal=causal, segment_ids=lengths and packed_row(shape["T"], *lengths)[None])
        assert_close(run(*inputs, **how), attention_and_gradients(*inputs, **how), atol=2e-5)
