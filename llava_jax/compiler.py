"""What the compiler is told on each platform, and where it keeps what it has compiled."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

OPTIONS = {
    # Lets operations that do not need each other run beside each other, which uses the cores better. The order of
    # several devices' collectives would be free, too, so it is for one.
    "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": True},
    "gpu": {
        # Runs collectives beside matrix products (docs.jax.dev/en/latest/gpu_performance_tips.html).
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # cuBLAS for matrix products, as NVIDIA's and MaxText's recipes for dense models have it.
        "xla_gpu_enable_triton_gemm": False,
        # Gradients of embeddings are otherwise added in whatever order threads come, and a run continues with other bits.
        "xla_gpu_exclude_nondeterministic_ops": True,
        # XLA begins to compute things twice at 80 % of a card, which saves next to nothing after train.remat has chosen
        # what is kept (7B on one H200, 4 rows, "minimal": 0.15 GiB for 54 more kernels per layer).
        "xla_gpu_memory_limit_slop_factor": 200,
    },
    "tpu": {
        # Parameters are gathered, in steps, beside the products before the ones that need them: MaxText's
        # CF_FOR_ALL_GATHER (benchmarks/xla_flags_library.py).
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}


def compiler_options(platform: str, num_devices: int) -> dict[str, bool | int]:
    """XLA's options for a train step on so many devices of this platform."""
    return {} if platform == "cpu" and num_devices > 1 else OPTIONS.get(platform, {})


def as_precise_as(dtype: jax.typing.DTypeLike, platform: str, function: Callable) -> Callable:
    """`function`, whose float32 products keep all of float32's bits where it computes in that.

    GPUs otherwise round their factors to 10 bits (TF32), TPUs to 7.
    """
    if jnp.dtype(dtype) != jnp.float32 or platform == "cpu":
        return function

    @functools.wraps(function)
    def precise(*arguments):
        with jax.default_matmul_precision("float32"):
            return function(*arguments)

    return precise


def keep_compiled(directory: str) -> None:
    """From here on programs that took a second to compile are kept in `directory`, and read where they are; "": not."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))


class Compilations:
    """Counts the programs that this process compiles, and those it finds compiled, until it is closed."""

    def __init__(self):
        self.num_programs = 0  # of both kinds
        self.num_found = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, name: str, seconds: float, **_) -> None:
        self.num_programs += name == "/jax/core/compile/backend_compile_duration"  # around the cache, too

    def _on_event(self, name: str, **_) -> None:
        self.num_found += name == "/jax/compilation_cache/cache_hits"
