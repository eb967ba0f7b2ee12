"""What a machine with NVIDIA GPUs needs around the start of JAX, which reads its settings from the environment."""

import os

from llava_jax.errors import ConfigError

DEFAULT_MEMORY_FRACTION = 0.75  # JAX's own share of a card (docs.jax.dev, GPU memory allocation)
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # still read; JAX refuses both at once
_HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last one is WSL's


def set_memory_limits() -> None:
    """Lets JAX take 92 % of a card and all of the host's memory, unless the environment says otherwise.

    A 7B model with AdamW needs more of one card than JAX takes by itself, and its checkpoint passes through more of the
    host's memory than 64 GB, which is the most that JAX would take there. To be called before JAX finds its devices.
    """
    os.environ.setdefault(memory_fraction_name(), "0.92")
    host_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault(_HOST_LIMIT, str(max(64, host_gib)))


def memory_fraction_name() -> str:
    """The variable that says which share of a card JAX takes."""
    return _OLD_FRACTION if _OLD_FRACTION in os.environ else _FRACTION


def memory_fraction() -> float:
    """The share of a card that JAX takes."""
    return float(os.environ.get(memory_fraction_name(), DEFAULT_MEMORY_FRACTION))


def require_found() -> None:
    """Raises ConfigError where there is an NVIDIA GPU and JAX runs on the CPU although nobody asked for that."""
    import jax

    asked_for = os.environ.get("JAX_PLATFORMS")
    if not asked_for and jax.default_backend() == "cpu" and any(map(os.path.exists, _NVIDIA_DEVICES)):
        raise ConfigError(
            "This machine has an NVIDIA GPU, and JAX found only the CPU. Either its CUDA packages are missing: pip install "
            "-c constraints.txt -e '.[cuda13]', or '.[cuda12]'; or they cannot start, and python -c 'import jax; "
            "jax.devices()' says why. JAX_PLATFORMS=cpu in the environment says that the CPU will do."
        )
