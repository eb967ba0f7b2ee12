"""What a plan says to a person."""

import math

from llava_jax.config import Config
from llava_jax.gpus import memory_fraction_name
from llava_jax.metrics import format_seconds
from llava_jax.planning.search import flags
from llava_jax.planning.stage_plan import MFUS, StagePlan
from llava_jax.planning.targets import GIB, Target
from llava_jax.planning.workload import Workload


def devices_line(target: Target) -> str:
    """What the target's devices are, and what a program may take of each."""
    parts = [f"{len(target.devices)} x {target.devices[0].device_kind}"]
    if target.hbm_bytes is None:
        parts.append("memory not told by the device")
    else:
        part = f" that {memory_fraction_name()} leaves" if target.platform == "gpu" else ""
        parts.append(f"{target.hbm_bytes / GIB:.2f} GiB each{part}")
    if target.peak_flops:
        parts.append(f"{target.peak_flops / 1e12:g} TFLOP/s bfloat16")
    return ", ".join(parts)


def workload_line(config: Config, workload: Workload) -> str:
    """Which rows are planned for, and why these."""
    return (
        f"{config.data.batch_size} rows per step, {workload.length:,} tokens and {workload.num_images} image "
        f"slots each ({workload.source})"
    )


def describe(plan: StagePlan) -> str:
    """The whole plan, several lines."""
    parts = [_memory(plan)]
    if plan.advice:
        parts.append(_advice(plan))
    if plan.compiled.hlo:
        parts.append(_collectives(plan))
    parts.append(_times(plan))
    return "\n\n".join(parts)


def search_line(plan: StagePlan) -> str:
    """One try of a search."""
    verdict = {True: "fits", False: "does not fit", None: "compiled"}[plan.compiled.fits]
    return (
        f"  remat {plan.config.train.remat:<7}  {plan.rows_per_device:>4} rows per device at a time  "
        f"{plan.compiled.peak / GIB:>8.2f} GiB  {verdict:<12}  {flags(plan)}"
    )


def _memory(plan: StagePlan) -> str:
    sizes, compiled = plan.arguments, plan.compiled
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    accumulation = plan.config.train.accumulation_steps
    rows = f"rows per device {plan.rows_per_device}" + (f", {accumulation} times" if accumulation > 1 else "")
    lines = [f"GiB per device (mesh {mesh}; {rows}; remat {plan.config.train.remat})"]
    entries = (
        ("parameters that train", sizes.parameters),
        ("moments", sizes.moments),
        ("frozen parameters", sizes.frozen),
        ("batch", sizes.batch),
        ("gradients", sizes.gradients),
        ("activations, buffers", plan.activations),
    )
    lines += [f"  {name:<24} {size / GIB:>8.2f}" for name, size in entries]
    total = "total, the compiler's" if compiled.hlo else "total, about"
    lines.append(f"  {total:<24} {compiled.peak / GIB:>8.2f}{_verdict(plan)}")
    return "\n".join(lines)


def _verdict(plan: StagePlan) -> str:
    hbm = plan.target.hbm_bytes
    if hbm is None:
        return ""
    spare = (hbm - plan.compiled.peak) / GIB
    if plan.compiled.fits:
        return f" of {hbm / GIB:.2f}: fits, {spare:.2f} to spare"
    return f" of {hbm / GIB:.2f}: does not fit, {-spare:.2f} too much"


_LORA = ' LoRA (tune.language_model="lora") keeps no gradients and moments of the decoder.'


def _advice(plan: StagePlan) -> str:
    lines = ["What would help, cheapest first (GiB per device, by arithmetic; --search compiles them)"]
    suffices = False
    for advice in plan.advice:
        left = max(0, plan.compiled.peak - advice.saves)
        suffices |= left <= (plan.target.hbm_bytes or math.inf)
        lines.append(
            f"  {-advice.saves / GIB:>7.2f} -> {left / GIB:>6.2f}  {advice.change}  ({advice.price})"
        )
    if not suffices:
        lines.append("  None of these suffices alone." + _LORA * (plan.config.tune.language_model == "full"))
    return "\n".join(lines)


def _collectives(plan: StagePlan) -> str:
    if not plan.collectives:
        return "No collectives."
    lines = ["Collectives per step and device (what is whole before or after)"]
    for kind, traffic in sorted(plan.collectives.items(), key=lambda item: -item[1].num_bytes):
        lines.append(f"  {kind:<20} {traffic.count:>6} x  {traffic.num_bytes / GIB:>9.3f} GiB")
    if plan.num_uncertain:
        lines.append(f"  {plan.num_uncertain} of them run once per chunk of the loss, and are counted once.")
    return "\n".join(lines)


def _times(plan: StagePlan) -> str:
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {100 * part / total:.1f} %" for name, part in plan.flops.items())
    per_device = total / len(plan.target.devices)
    lines = [f"Model FLOPs per step: {total:.3g}, {per_device:.3g} per device ({shares})"]
    if plan.target.peak_flops is None:
        return "\n".join([*lines, "  The peak of these devices is not known, so no times follow."])
    for mfu in MFUS:
        hours = plan.epoch_hours(mfu)
        epoch = f"{hours:>8.3g} hours per epoch" if hours else "(hours per epoch: say --samples=N)"
        label = "at the bound" if mfu == 1 else f"at {mfu:.0%} MFU"
        lines.append(
            f"  {label:<13} {plan.step_seconds(mfu):>8.3g} s per step  "
            f"{plan.tokens_per_second(mfu):>11,.0f} tokens/s  {epoch}"
        )
    return "\n".join([*lines, f"Compiling took {format_seconds(plan.compiled.seconds)}."])
