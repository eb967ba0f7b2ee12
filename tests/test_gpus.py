"""What is set before JAX finds GPUs, and that a GPU which it does not find is told."""

import os

import jax
import pytest

from llava_jax import gpus
from llava_jax.config import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without what the machine, or another test, has set."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_PLATFORMS"))}
    monkeypatch.setattr(os, "environ", own)
    return own


def test_jax_may_take_most_of_a_card_and_all_of_the_host(environment):
    assert gpus.memory_fraction() == 0.75
    gpus.set_memory_limits()
    assert (gpus.memory_fraction(), environment["XLA_CLIENT_MEM_FRACTION"]) == (0.92, "0.92")
    assert int(environment["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) >= 64


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_what_the_environment_says_stays_and_stays_alone(environment, name):
    environment.update({name: "0.5", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "7"})
    before = dict(environment)
    gpus.set_memory_limits()
    assert environment == before  # JAX refuses both names at once
    assert gpus.memory_fraction() == 0.5


def test_a_gpu_that_jax_does_not_find_is_told(environment, monkeypatch, tmp_path):
    assert jax.default_backend() == "cpu"
    monkeypatch.setattr(gpus, "_NVIDIA_DEVICES", (str(tmp_path / "none"),))
    gpus.require_found()
    monkeypatch.setattr(gpus, "_NVIDIA_DEVICES", (str(tmp_path),))
    with pytest.raises(ConfigError, match=r"has an NVIDIA GPU, and JAX found only the CPU.*\.\[cuda13\]"):
        gpus.require_found()
    environment["JAX_PLATFORMS"] = "cpu"
    gpus.require_found()
