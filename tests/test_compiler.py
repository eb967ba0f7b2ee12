"""The options of each platform's compiler are options that it knows."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.compile_attention import ENVIRONMENT
from llava_jax.compiler import OPTIONS, as_precise_as, compiler_options


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed")
def test_libtpu_knows_its_options(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def compile_with(options):
        jax.jit(lambda x: x @ x, compiler_options=options).trace(x).lower(
            lowering_platforms=("tpu",)
        ).compile()

    compile_with(OPTIONS["tpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with({"xla_tpu_no_such_option": True})


def test_xla_knows_its_options_for_gpus():
    with jax.default_device(jax.devices("cpu")[0]):  # each of its compilers knows the options of all
        x = jnp.ones((2, 2))
        assert (jax.jit(lambda x: x @ x, compiler_options=OPTIONS["gpu"])(x) == 2).all()
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            jax.jit(lambda x: x @ x, compiler_options={"xla_gpu_no_such_option": True})(x)


@pytest.mark.parametrize(
    ("dtype", "platform", "precise"),
    [
        ("float32", "gpu", True),
        ("float32", "tpu", True),
        ("float32", "cpu", False),
        ("bfloat16", "gpu", False),
    ],
)
def test_float32_products_keep_their_bits(dtype, platform, precise):
    product = as_precise_as(dtype, platform, lambda a, b: a @ b)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda a, b: product(a, b).sum()))(*jnp.ones((2, 2, 2))))
    assert jaxpr.count("dot_general") == 2
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == (2 if precise else 0)


def test_collectives_of_several_cpus_keep_their_order():
    assert compiler_options("cpu", 2) == {}
    assert compiler_options("cpu", 1) == OPTIONS["cpu"] != {}
    assert compiler_options("tpu", 256) == OPTIONS["tpu"]


PROGRAM = """
import sys
import jax
from llava_jax.compiler import keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3))).block_until_ready()
print(len(hits))
"""


def test_the_next_run_finds_what_this_one_compiled(tmp_path):
    def num_hits(directory) -> int:
        command = [sys.executable, "-c", PROGRAM, str(directory)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert num_hits(tmp_path) == 0
    assert num_hits(tmp_path) > 0
    assert num_hits("") == 0
