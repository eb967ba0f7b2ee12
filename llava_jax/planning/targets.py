"""Devices to plan for: TPU slices or hosts of GPUs that are only described, or those of this machine."""

import dataclasses
import importlib.util
import math
import os
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.config import ConfigError
from llava_jax.gpus import memory_fraction
from llava_jax.planning.chips import GPUS, TPUS, peak_flops

if TYPE_CHECKING:
    import jax

GIB = 2**30
HERE = "here"


_EXAMPLES = "v5e:8x8, v5p:4x4x4, 2xv5e:16x16 (two slices), h100:8, 4xh100:8 (four hosts) or here"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices, what a program may use of each, and how to compile for them."""

    name: str
    devices: list["jax.Device"]
    platform: str
    hbm_bytes: int | None  # None: unknown
    peak_flops: float | None  # per second and device; None: unknown
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_described_gpu(self) -> bool:
        return self.platform == "gpu" and self.name != HERE


def prepare(name: str) -> None:
    """Sets the environment in which `find` can describe this target; call it before JAX is imported.

    Raises ConfigError when the name says nothing, or when what describes such devices is not installed.
    """
    if name == HERE:
        return
    if _parse(name).family in GPUS:
        same = version("jax")
        _require_module(
            "jax_cuda13_plugin", f"pip install --no-deps jax-cuda13-plugin=={same} jax-cuda13-pjrt=={same}"
        )
    else:
        _require_module("libtpu", "pip install -c constraints.txt -e '.[plan]'")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the described devices need no backend, and no TPU is looked for
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # nor a TPU VM's metadata
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs, so several plans may be made at one time
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # only silences a warning
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def find(name: str) -> Target:
    """The devices of this name. Raises ConfigError when there is no such topology."""
    if name == HERE:
        return _find_here()
    topology = _parse(name)
    if topology.family in GPUS:
        return _describe_gpus(name, topology)
    return _describe_tpus(name, topology)


class _Topology(NamedTuple):
    """TPU slices, or hosts of GPUs, all of one shape."""

    number: int
    family: str
    shape: tuple[int, ...]


def _parse(name: str) -> _Topology:
    number, family, shape = re.fullmatch(r"(?:(\d+)x)?([^:]*):?(.*)", name, re.DOTALL).groups()
    dimensions = re.fullmatch(r"\d+(x\d+)*", shape)
    num_dimensions = 1 if family in GPUS else 2 if family in ("v5e", "v6e") else 3
    if family not in TPUS | GPUS:
        raise ConfigError(
            f"--topology={name}: {family!r} is not one of {', '.join(TPUS | GPUS)}. Examples: {_EXAMPLES}."
        )
    sizes = tuple(map(int, shape.split("x"))) if dimensions else ()
    if len(sizes) != num_dimensions or not math.prod(sizes) or number == "0":
        form = {1: "COUNT", 2: "AxB", 3: "AxBxC"}[num_dimensions]
        several = f"NUMBERx before it for several {'hosts' if family in GPUS else 'slices'}"
        raise ConfigError(
            f"--topology={name}: write {family}:{form}, in chips, and {several}. Examples: {_EXAMPLES}."
        )
    return _Topology(int(number or 1), family, sizes)


def has_cudnn() -> bool:
    """Whether the libraries are installed that cuDNN's attention is compiled with."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn"))


def _require_module(module: str, command: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"Planning for devices that are not here needs {module}, which is not installed: {command}"
        )


def _describe_tpus(name: str, topology: _Topology) -> Target:
    from jax.experimental import topologies

    number, family, shape = topology
    options = (
        {"chip_config_name": "megacore"} if family == "v4" else {}
    )  # one device per chip, as JAX has it there
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    slice_name = f"{family}:{'x'.join(map(str, shape))}"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_name, num_slices=number, **options
        )
    except Exception as error:  # whatever libtpu raises
        raise ConfigError(
            f"--topology={name}: libtpu knows no such slice ({_first_line(error)}). "
            "Slices are made of hosts with 2x2 chips; a single chip is 1x1."
        ) from error
    chip = TPUS[family]
    return Target(name, list(described.devices), "tpu", int(chip.hbm_gib * GIB), chip.peak_tflops * 1e12)


def _describe_gpus(name: str, topology: _Topology) -> Target:
    from jax.experimental import topologies

    from llava_jax.planning.gpu_descriptions import DESCRIPTIONS

    number, family, (per_host,) = topology
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=DESCRIPTIONS[family],
            topology=f"1x{number}x{per_host}",  # slices, hosts, devices
        )
    except Exception as error:  # whatever the plugin raises
        raise ConfigError(f"--topology={name}: the CUDA plugin refuses it ({_first_line(error)}).") from error
    chip = GPUS[family]
    # Without a device Triton's matrix products cannot be tuned, and some tilings it tries are refused.
    options = {"xla_gpu_enable_triton_gemm": False}
    hbm_bytes = int(chip.hbm_gib * GIB * memory_fraction())
    return Target(name, list(described.devices), "gpu", hbm_bytes, chip.peak_tflops * 1e12, options)


def _find_here() -> Target:
    import jax

    devices = jax.devices()
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Target(HERE, devices, devices[0].platform, limit, peak_flops(devices[0].device_kind))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
