"""Compiles the step that the trainer runs and tells whether its memory suffices."""

import dataclasses
import re
import time

import jax

from llava_jax.config import ConfigError
from llava_jax.planning.targets import GIB, Target
from llava_jax.program import Program

# What libtpu says of a program that is too large, before and after it has laid out the memory.
_TEMPORARIES = re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step after compilation. One that does not fit may have no program, only what it would need at least."""

    peak: int  # bytes per device
    fits: bool | None  # None: it is not known how much memory a device has
    seconds: float
    hlo: str  # '' without a program


def compile_step(
    program: Program, target: Target, length: int, num_images: int, *, argument_bytes: int
) -> Compiled:
    """Compiles the train step for rows of that many tokens and image slots, for the target's devices.

    argument_bytes: of the step's arguments, per device. Raises ConfigError when the step needs cuDNN and there is none;
    and what the compiler raises, unless it is that the memory of a device does not suffice.
    """
    shapes = program.abstract_state(), program.abstract_frozen(), program.abstract_batch(length, num_images)
    began = time.monotonic()
    try:
        platform = {"gpu": "cuda"}.get(target.platform, target.platform)  # as lowering calls it
        lowered = program.train_step().trace(*shapes).lower(lowering_platforms=(platform,))
        compiled = lowered.compile(compiler_options=target.compiler_options or None)
    except RuntimeError as error:  # XLA's JaxRuntimeError is one
        if "cuDNN not found" in str(error):
            raise ConfigError(
                "The step's attention is cuDNN's, whose libraries are not here: plan with --config.train.attention=xla, "
                f"whose memory differs, or pip install 'jax-cuda13-plugin[with-cuda]=={jax.__version__}' (gigabytes)."
            ) from error
        needed = needed_bytes(str(error), argument_bytes)
        if needed is None:
            raise
        return Compiled(needed, False, time.monotonic() - began, "")
    # Arguments plus temporaries would be too much: some of these lie where others lay before.
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes  # which the compiler counts too
    fits = None if target.hbm_bytes is None else peak <= target.hbm_bytes
    return Compiled(peak, fits, time.monotonic() - began, compiled.as_text())


def needed_bytes(message: str, argument_bytes: int) -> int | None:
    """How many bytes a program needs per device, if that is what the compiler's message complains of."""
    used = _USED.search(message)
    if used:
        return _bytes(*used.groups())
    temporaries = _TEMPORARIES.search(message)
    return argument_bytes + _bytes(*temporaries.groups()) if temporaries else None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
