"""What TPUs run, compiled by libtpu without one. Needs the extra [plan]."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.compile_attention import ENVIRONMENT, Case, compile_case
from llava_jax.config import Config, ModelConfig, TextConfig, TrainConfig, VisionConfig
from llava_jax.kernels.flash_tpu import flash_attention
from llava_jax.sharding import AXES, ROWS, attention_placement, constrain_rows, parameter_sharding, replicated
from llava_jax.step import abstract_model, make_eval_step, model_settings

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def described_tpus():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def kernels_of(traced) -> int:
    """How many kernels are in what comes out of the compiler."""
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize(
    ("case", "topology"),
    [
        (Case("packed", 1024, 4, 2, 128, causal=True), "v5e:2x2"),
        (Case("CLIP", 577, 4, 4, 64, causal=False), "v5e:2x2"),
        *(
            pytest.param(case, topology, marks=pytest.mark.slow)
            for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
            for case in (
                Case("packed", 2048, 8, 2, 128, causal=True),
                Case("odd", 1001, 2, 2, 80, causal=True, dtype="float32"),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_compiler_takes_our_kernels(case, topology):
    compiled = compile_case(case, "flash_tpu", topology)
    assert compiled["kernels"] == 3
    assert compiled["vmem_mib"] < 8  # half of what a kernel gets


def test_the_compiler_takes_splash():
    assert compile_case(Case("CLIP", 577, 2, 2, 64, causal=False), "splash", "v5e:2x2")["kernels"] == 3


def test_remat_keeps_what_is_named_attention():
    """With its output and log-sum-exp kept, the backward pass does not run the forward kernel again."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct(
        (1, 128, 1, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
    )

    def num_kernels(policy):
        call = jax.checkpoint(
            lambda x: flash_attention(jnp.sin(x), x, x, causal=True, sm_scale=1.0), policy=policy
        )
        return kernels_of(jax.jit(jax.grad(lambda x: (call(x).astype(jnp.float32) ** 2).sum())).trace(x))

    assert num_kernels(jax.checkpoint_policies.nothing_saveable) == 4
    assert num_kernels(jax.checkpoint_policies.save_only_these_names("attention")) == 3


def test_auto_puts_the_kernel_into_a_model_that_is_spread_over_rows_and_heads():
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    mesh = Mesh(devices.reshape(1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    vision = VisionConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=168
    )
    text = TextConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    )
    config = Config(model=ModelConfig(vision, text), train=TrainConfig(attention="auto"))
    settings = model_settings(config, constrain_rows(mesh), attention_placement(mesh))
    graphdef, shapes = abstract_model(config.model, **settings)

    def array(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    parameters = {
        name: array(leaf.shape, jnp.bfloat16, parameter_sharding(mesh, name, leaf.shape))
        for name, leaf in shapes.items()
    }
    rows = NamedSharding(mesh, PartitionSpec(None, ROWS))
    tokens = array((1, 4, 640), jnp.int32, rows)
    batch = {name: tokens for name in ("tokens", "positions", "segment_ids", "labels")}
    batch["images"] = array((1, 4, 1, 168, 168, 3), jnp.uint8, rows)
    step = jax.jit(make_eval_step(graphdef), out_shardings=replicated(mesh))
    assert kernels_of(step.trace(parameters, batch)) == 2  # CLIP's and the decoder's, in their layer loops
