"""The attention door: what every implementation must give, which one is taken, and what is refused."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llava_jax.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig
from llava_jax.kernels import attention as door
from llava_jax.kernels import einsum_attention
from llava_jax.kernels.attention import attention, check_platform, choose
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.sharding import attention_placement, make_mesh
from llava_jax.step import model_settings
from tests.attention_oracle import assert_close, attention_and_gradients, packed_row, random_inputs

EINSUMS = pytest.mark.parametrize("implementation", ["reference", "xla"])
ON_CPUS = pytest.mark.parametrize("implementation", ["reference", "xla", "xla_cpu"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one shorter, already in short sequences."""
    monkeypatch.setattr(einsum_attention, "CHUNK", 3)


def run(*inputs, **how):
    """(out, dq, dk, dv) of q, k, v and the gradient of out."""

    @jax.jit
    def both(q, k, v, grad):
        out, vjp = jax.vjp(partial(attention, **how), q, k, v)
        return out, *vjp(grad)

    return both(*inputs)


def check(*inputs, implementation, placement=None, **how):
    """Values and gradients against the oracle."""
    found = run(*inputs, implementation=implementation, placement=placement, **how)
    assert_close(found, attention_and_gradients(*inputs, **how), atol=2e-6)


@ON_CPUS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_queries_and_causality(causal, num_kv_heads, implementation):
    check(*random_inputs(K=num_kv_heads), causal=causal, implementation=implementation)


@ON_CPUS
@pytest.mark.parametrize("causal", [False, True])
def test_segments_do_not_see_each_other(causal, implementation):
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
    check(*random_inputs(), causal=causal, segment_ids=segment_ids, implementation=implementation)


@ON_CPUS
def test_padding_gives_zero_and_has_no_gradient(implementation):
    segment_ids = packed_row(7, 3)[None]
    inputs = random_inputs(B=1)
    for found in run(*inputs, causal=True, segment_ids=segment_ids, implementation=implementation):
        assert not np.asarray(found)[:, 3:].any()


@EINSUMS
def test_keys_may_have_segments_of_their_own(implementation):
    how = dict(
        causal=False,
        segment_ids=np.array([[1, 1, 1, 0], [1, 2, 4, 1]]),
        kv_segment_ids=np.array([[0, 1, 1, 1, 0, 0, 0], [1, 2, 2, 0, 0, 0, 0]]),
    )
    check(*random_inputs(T=4, S=7), implementation=implementation, **how)


@EINSUMS
def test_a_prompt_sees_what_is_written_of_a_longer_cache(implementation):
    check(*random_inputs(T=5, S=7), causal=True, implementation=implementation)


@ON_CPUS
def test_scores_are_scaled_as_asked(implementation):
    check(*random_inputs(), causal=False, sm_scale=0.3, implementation=implementation)


@ON_CPUS
def test_bfloat16_keeps_its_dtype_and_scores_in_float32(implementation):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(T=64)]
    found = run(*inputs, causal=True, implementation=implementation)
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    expected = attention_and_gradients(*(np.asarray(x, np.float32) for x in inputs), causal=True)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=0.02 * np.abs(exact).max())


def test_chunks_leave_no_scores_of_all_tokens_by_all_tokens(monkeypatch):
    monkeypatch.setattr(einsum_attention, "CHUNK", 16)
    x = jnp.ones((1, 64, 1, 4))
    loss = lambda x, implementation: attention(x, x, x, causal=False, implementation=implementation).sum()
    for implementation, whole in (("reference", True), ("xla", False)):
        jaxpr = str(jax.make_jaxpr(jax.grad(partial(loss, implementation=implementation)))(x))
        assert ("f32[1,1,1,64,64]" in jaxpr) == whole


@pytest.mark.parametrize("longest", [1, 4, 5, 6, 100])
def test_a_promise_about_segments_changes_nothing(longest):
    lengths = [
        min(longest, rest) for rest in range(23, 0, -longest)
    ]  # as many of the longest as there is room for
    segment_ids = np.stack([packed_row(23, *lengths), packed_row(23, 1, *lengths[1:])])
    inputs = random_inputs(T=23)
    found = run(*inputs, causal=True, segment_ids=segment_ids, implementation="xla", longest_segment=longest)
    assert_close(found, attention_and_gradients(*inputs, causal=True, segment_ids=segment_ids), atol=2e-6)


def test_keys_that_no_segment_reaches_are_not_read():
    q, k, v, grad = random_inputs(B=1, T=12)
    k[:, :6], v[:, :6] = np.nan, np.nan
    segment_ids = packed_row(12, 4, 4, 4)[None]
    how = dict(causal=True, segment_ids=segment_ids, implementation="xla")
    out, *grads = run(
        q, k, v, grad, **how, longest_segment=4
    )  # chunks of 3: queries 9..11 read keys from 6 on
    assert np.isfinite(out[:, 9:]).all() and np.isfinite(grads[0][:, 9:]).all()
    assert np.isnan(run(q, k, v, grad, **how)[0][:, 9:]).all()


@ON_CPUS
def test_a_row_of_one_segment_needs_no_segments(implementation):
    segment_ids = np.stack([packed_row(7, 4), packed_row(7, 7)])
    real = (segment_ids > 0)[..., None, None]
    q, k, v, grad = random_inputs()
    how = dict(causal=True, segment_ids=segment_ids)
    found = run(q, k, v, grad * real, **how, single_segment=True, implementation=implementation)
    assert np.isfinite(found[0]).all() and np.any(found[0][0, 4:])
    found = (found[0] * real, *found[1:])
    assert_close(found, attention_and_gradients(q, k, v, grad * real, **how), atol=2e-6)


def test_rows_of_one_segment_may_take_kernels_without_segments(monkeypatch):
    monkeypatch.setitem(door.KERNELS, "cudnn", lambda q, k, v, segment_ids, **how: (q, segment_ids))
    q = jnp.ones((1, 7, 2, 8), jnp.bfloat16)
    how = dict(causal=True, segment_ids=np.ones((1, 7), np.int32), placement=on("gpu"))
    assert attention(q, q, q, **how, single_segment=True)[1] is None


def test_minimal_rematerialisation_keeps_what_cudnn_has_computed(monkeypatch):
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    x = jnp.ones((2, 1024, 2, 64), jnp.bfloat16)

    def attend(q):
        return attention(q, q, q, causal=True, implementation="cudnn", placement=on("gpu")).astype(
            jnp.float32
        )

    for remat, times in (("minimal", 1), ("dots", 2)):
        block = jax.checkpoint(attend, policy=REMAT_POLICIES[remat])
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda q, block=block: block(q).sum()))(x))
        assert jaxpr.count("dot_product_attention_fwd_wrapper[") == times


def on(platform: str):
    return SimpleNamespace(platform=platform, mesh=SimpleNamespace(size=1))


@pytest.mark.parametrize(
    ("expected", "platform", "length", "dtype", "segmented"),
    [
        ("flash_tpu", "tpu", 2048, "bfloat16", True),
        ("flash_tpu", "tpu", 577, "float32", False),
        ("reference", "tpu", 100, "bfloat16", True),
        ("cudnn", "gpu", 577, "bfloat16", False),
        ("xla", "gpu", 2048, "bfloat16", True),
        ("xla", "gpu", 577, "float32", False),
        ("xla", "cpu", 577, "bfloat16", False),
        ("xla_cpu", "cpu", 512, "float32", True),
    ],
)
def test_auto_is_a_table(expected, platform, length, dtype, segmented, monkeypatch):
    monkeypatch.setattr(door, "CHUNK", 512)
    q = jax.ShapeDtypeStruct((1, length, 2, 64), dtype)
    assert choose(q, segmented=segmented, itself=True, placement=on(platform)) == expected


def test_auto_takes_no_kernel_for_a_cache_or_for_several_devices_without_placement():
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    assert choose(q, segmented=True, itself=False, placement=on("tpu")) in ("xla", "reference")
    assert jax.device_count() > 1
    assert choose(q, segmented=True, itself=True, placement=None) in ("xla", "reference")


def test_the_choice_is_told_once(capsys):
    x = jnp.ones((1, 5, 1, 11))
    for _ in range(2):
        attention(x, x, x, causal=True)
    assert capsys.readouterr().out == "attention: reference for 5 tokens, head width 11, causal\n"


@pytest.fixture
def placement():
    return attention_placement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


@pytest.mark.parametrize("segmented", [False, True])
def test_kernels_get_each_devices_rows_and_heads(placement, segmented, monkeypatch):
    shapes = []

    def kernel(q, k, v, segment_ids, **how):
        shapes.append((q.shape, k.shape, None if segment_ids is None else segment_ids.shape))
        return einsum_attention.reference(q, k, v, segment_ids, segment_ids, **how)

    monkeypatch.setitem(door.KERNELS, "flash_tpu", kernel)
    segment_ids = np.stack([packed_row(7, 3, 2)] * 8) if segmented else None
    inputs = random_inputs(B=8, N=12, K=2)
    check(*inputs, implementation="flash_tpu", placement=placement, causal=True, segment_ids=segment_ids)
    assert set(shapes) == {((2, 7, 6, 5), (2, 7, 1, 5), (2, 7) if segmented else None)}


def test_the_tpu_kernel_runs_on_a_mesh(placement):
    segment_ids = np.stack([packed_row(9, 3, 5)] * 4)
    inputs = random_inputs(B=4, T=9, N=4, K=2, H=8)
    with pltpu.force_tpu_interpret_mode():
        check(*inputs, implementation="flash_tpu", placement=placement, causal=True, segment_ids=segment_ids)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            dict(B=6, N=4, K=2),
            r"6 rows cannot be cut into 4 equal parts, .*'data': 2, 'fsdp': 2, 'tensor': 2",
        ),
        (dict(B=4, N=4, K=1), "1 key/value heads cannot be cut into 2"),
        (dict(B=4, N=3, K=3), "3 query heads cannot be cut into 2"),
    ],
)
def test_what_the_mesh_cannot_divide_is_refused(shape, message, placement):
    q, k, v, _ = random_inputs(**shape)
    with pytest.raises(ConfigError, match=message):
        attention(q, k, v, causal=True, implementation="flash_tpu", placement=placement)


def test_what_an_implementation_cannot_do_is_refused():
    q, k, v, _ = random_inputs()
    ids = np.ones((2, 7), np.int32)
    with pytest.raises(ConfigError, match="'fast' is not one of"):
        attention(q, k, v, causal=True, implementation="fast")
    with pytest.raises(ConfigError, match="4 key/value heads do not divide 6"):
        attention(q, *random_inputs(K=4)[1:3], causal=True)
    with pytest.raises(ConfigError, match=r"takes bfloat16 .* 64 or 128, not float32 and 5; use 'auto'"):
        attention(q, k, v, causal=True, implementation="mosaic_gpu")
    with pytest.raises(ConfigError, match="kv_segment_ids need segment_ids"):
        attention(q, k, v, causal=True, kv_segment_ids=ids)
    for kernel in door.KERNELS:
        with pytest.raises(ConfigError, match="not for keys of another length"):
            attention(q[:, :1], k, v, causal=False, implementation=kernel)
        with pytest.raises(ConfigError, match="with segments of their own"):
            attention(q, k, v, causal=False, segment_ids=ids, kv_segment_ids=ids, implementation=kernel)
    with pytest.raises(ConfigError, match="cannot do segments"):
        attention(q, k, v, causal=True, segment_ids=ids, implementation="cudnn")
    with pytest.raises(ConfigError, match="cannot do float32"):
        attention(q, k, v, causal=True, implementation="cudnn")
    with pytest.raises(ConfigError, match="cannot do heads of width 5"):
        attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), causal=True, implementation="cudnn")


@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "xla_cpu", "flash_tpu"])
def test_arrays_that_do_not_fit_together_are_refused(implementation):
    q, k, v, _ = random_inputs()
    ids = np.ones(q.shape[:2], np.int32)
    for arrays, segment_ids in (
        ((q, k, v[:, :, :1]), None),
        ((q, k, v[:, :1]), None),
        ((q, k[..., :1], v[..., :1]), None),
        ((q, k[:1], v[:1]), None),
        ((q[0], k, v), None),
        ((q, k, v), ids[:, :1]),
        ((q, k, v), ids[:1]),
        ((q, k, v.astype(jnp.bfloat16)), None),
    ):
        with pytest.raises(ConfigError, match=r"are not \[B, T|are not those of|of different dtypes"):
            attention(*arrays, causal=True, segment_ids=segment_ids, implementation=implementation)


def test_the_setting_reaches_the_door(placement):
    for packing in (False, True):
        config = Config(train=TrainConfig(attention="xla"), data=DataConfig(max_length=1000, packing=packing))
        bound = model_settings(config, constrain=None, placement=placement)["attention"]
        assert bound.func is attention
        how = dict(longest_segment=1000, single_segment=not packing)
        assert bound.keywords == dict(implementation="xla", placement=placement) | how
    with pytest.raises(ConfigError, match=r"train\.attention='cudnn' runs on a gpu, and this is a cpu"):
        model_settings(Config(train=TrainConfig(attention="cudnn")), constrain=None)


def test_an_implementation_for_other_machines_is_refused():
    with pytest.raises(ConfigError, match=r"train.attention='flash' is not one of .* Did you mean"):
        TrainConfig(attention="flash")
    with pytest.raises(ConfigError, match=r"train\.attention='flash_tpu' runs on a tpu, and this is a cpu"):
        check_platform("flash_tpu", "cpu")
    check_platform("splash", "tpu")
    check_platform("cudnn", "gpu")
    check_platform("xla", "cpu")
