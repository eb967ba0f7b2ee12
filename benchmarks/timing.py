"""Seconds of calls on a device, and what the device can do at most, measured in the same run."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def seconds(run: Callable, *arguments, rounds: int, calls: int) -> float:
    """Of one call of JAX: the median over rounds, in each of which calls follow each other without waiting."""
    return _median(lambda: run(*arguments), jax.block_until_ready, rounds, calls)


def torch_seconds(run: Callable, *, rounds: int, calls: int) -> float:
    """The same of torch."""
    import torch

    def wait(_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return _median(run, wait, rounds, calls)


def _median(run: Callable, wait: Callable, rounds: int, calls: int) -> float:
    wait(run())
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        measured.append((time.perf_counter() - start) / calls)
    return statistics.median(measured)


def practical_peak(size: int, **timing) -> float:
    """TFLOP/s of a square bfloat16 matmul of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b, **timing) / 1e12


def conditions() -> dict[str, str]:
    """The device and the version of JAX."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}


def torch_conditions() -> dict[str, str]:
    """The device and the version of torch."""
    import torch

    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "torch_device": found}


def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None
