"""The plan of one stage on one target: what its step needs, exchanges and computes."""

import dataclasses
import math

from jax.sharding import Mesh

from llava_jax.config import Config, ConfigError
from llava_jax.flops import training_flops
from llava_jax.planning.advice import Advice, Situation, advise
from llava_jax.planning.collectives import Traffic, read_collectives
from llava_jax.planning.compilation import Compiled, compile_step
from llava_jax.planning.memory import Arguments, arguments
from llava_jax.planning.targets import GIB, Target, has_cudnn
from llava_jax.planning.workload import Workload
from llava_jax.program import Program
from llava_jax.sharding import make_mesh, num_row_shards

MFUS = (1.0, 0.5, 0.4, 0.3)  # at which times are told; 1.0 is the bound
_NUM_STEPS = 1000  # of the schedule; nothing that is planned depends on it


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What is known of a stage before it runs. Sizes are bytes per device."""

    config: Config
    target: Target
    mesh: Mesh
    workload: Workload
    arguments: Arguments
    compiled: Compiled
    collectives: dict[str, Traffic]  # of a step, by kind
    num_uncertain: int  # collectives in loops whose length only the data decides, counted once
    flops: dict[str, float]  # of a step on all devices, by part

    @property
    def rows_per_device(self) -> int:
        """Of a microbatch."""
        return rows_per_device(self.config, self.mesh)

    @property
    def activations(self) -> int:
        """All that the step needs beside its arguments and the gradients."""
        return max(0, self.compiled.peak - self.arguments.total - self.arguments.gradients)

    @property
    def advice(self) -> list[Advice]:
        """What to change if the step does not fit, cheapest first."""
        if self.compiled.fits is not False:
            return []
        return advise(
            Situation(
                self.config,
                self.workload.length,
                len(self.target.devices),
                num_row_shards(self.mesh),
                self.target.platform,
                self.arguments,
                self.compiled.peak,
                self.target.hbm_bytes,
            )
        )

    def step_seconds(self, mfu: float) -> float | None:
        """How long a step takes at this model FLOPs utilisation; None if the devices' peak is not known."""
        return self._seconds(sum(self.flops.values()), mfu)

    def epoch_hours(self, mfu: float) -> float | None:
        """None if the number of samples or the devices' peak is not known."""
        if not self.workload.epoch:
            return None
        flops = sum(training_flops(self.config.model, self.config.tune, self.workload.epoch).values())
        seconds = self._seconds(flops, mfu)
        return seconds and seconds / 3600

    def tokens_per_second(self, mfu: float) -> float | None:
        """Over all devices, padding included."""
        seconds = self.step_seconds(mfu)
        return seconds and self.config.data.batch_size * self.workload.length / seconds

    def _seconds(self, flops: float, mfu: float) -> float | None:
        if not self.target.peak_flops:
            return None
        return flops / (mfu * self.target.peak_flops * len(self.target.devices))

    def to_json(self) -> dict:
        """The plan as plain JSON data."""
        hbm, compiled, sizes = self.target.hbm_bytes, self.compiled, self.arguments
        return {
            "fits": compiled.fits,
            "peak_gib": compiled.peak / GIB,
            "hbm_gib": hbm and hbm / GIB,
            "headroom_gib": hbm and (hbm - compiled.peak) / GIB,
            "parameters_gib": sizes.parameters / GIB,
            "moments_gib": sizes.moments / GIB,
            "frozen_gib": sizes.frozen / GIB,
            "batch_gib": sizes.batch / GIB,
            "gradients_gib": sizes.gradients / GIB,
            "activations_gib": self.activations / GIB,
            "topology": self.target.name,
            "num_devices": len(self.target.devices),
            "mesh": dict(self.mesh.shape),
            "batch_size": self.config.data.batch_size,
            "accumulation_steps": self.config.train.accumulation_steps,
            "rows_per_device": self.rows_per_device,
            "remat": self.config.train.remat,
            "tokens": self.workload.length,
            "images": self.workload.num_images,
            "shape_source": self.workload.source,
            "collectives": {
                kind: {"count": traffic.count, "gib": traffic.num_bytes / GIB}
                for kind, traffic in self.collectives.items()
            },
            "collectives_of_unknown_number": self.num_uncertain,
            "flops_per_step": sum(self.flops.values()),
            "at_mfu": {
                f"{mfu:g}": {
                    "step_seconds": self.step_seconds(mfu),
                    "tokens_per_second": self.tokens_per_second(mfu),
                    "hours_per_epoch": self.epoch_hours(mfu),
                }
                for mfu in MFUS
            },
            "compile_seconds": compiled.seconds,
            "advice": [
                {"change": advice.change, "saves_gib": advice.saves / GIB, "price": advice.price}
                for advice in self.advice
            ],
        }


def make_plan(config: Config, target: Target, workload: Workload) -> StagePlan:
    """Compiles the stage's step for the target. Raises ConfigError when its rows cannot be spread over the devices.

    Where cuDNN's libraries are not, the attention that described GPUs would take by themselves is planned as XLA's.
    """
    if target.is_described_gpu:
        if config.sharding.offload_moments:
            raise ConfigError(
                "sharding.offload_moments cannot be planned for GPUs that are only described, for they tell nothing of the "
                "host's memory. Plan without it, which is the most that a step needs: the update brings all moments to "
                "the card."
            )
        if config.train.attention == "auto" and not has_cudnn():
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, attention="xla"))
    mesh = make_mesh(config.mesh, target.devices)
    require_even_rows(config, mesh)
    program = Program(config, mesh, _NUM_STEPS)
    sizes = arguments(program, workload.length, workload.num_images)
    compiled = compile_step(program, target, workload.length, workload.num_images, argument_bytes=sizes.total)
    collectives, num_uncertain = read_collectives(compiled.hlo) if compiled.hlo else ({}, 0)
    step = workload.row * config.data.batch_size
    flops = training_flops(config.model, config.tune, step)
    return StagePlan(config, target, mesh, workload, sizes, compiled, collectives, num_uncertain, flops)


def rows_per_device(config: Config, mesh: Mesh) -> int:
    """Rows of a microbatch on one device."""
    return config.data.batch_size // config.train.accumulation_steps // num_row_shards(mesh)


def require_even_rows(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError, with what would do, unless the rows of a microbatch can be spread over the devices evenly."""
    rows, shards = config.data.batch_size // config.train.accumulation_steps, num_row_shards(mesh)
    if rows % shards == 0:
        return
    cures = []
    if config.train.accumulation_steps > 1 and config.data.batch_size % shards == 0:
        cures.append("--config.train.accumulation_steps=1")
    parts = math.gcd(rows, shards)
    tensor = mesh.size // parts
    if config.model.text.num_key_value_heads % tensor == 0:
        cures.append(f"--config.mesh.tensor={tensor}, so that {parts} groups of devices share the rows")
    cures.append(
        f"a --config.data.batch_size that is a multiple of {shards * config.train.accumulation_steps}"
    )
    raise ConfigError(
        f"data.batch_size / train.accumulation_steps = {rows} rows cannot be spread evenly over {shards} devices; "
        f"use {', or '.join(cures)}."
    )
