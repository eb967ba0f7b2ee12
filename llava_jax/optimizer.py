"""The optimizer of a stage: a direction for each parameter, its module's decay and rate, under one schedule."""

import jax.numpy as jnp
import optax

from llava_jax.config import SCHEDULES, OptimizerConfig
from llava_jax.optimizers.adafactor import scale_by_adafactor
from llava_jax.optimizers.averaging import average_parameters, averaged_parameters
from llava_jax.optimizers.muon import scale_by_muon_and
from llava_jax.optimizers.parameters import is_decayed
from llava_jax.optimizers.schedules import make_schedule
from llava_jax.optimizers.stored_moments import scale_by_stored_adam
from llava_jax.tuning import LORA_B, learning_rates, module_of, weight_decays

__all__ = [
    "averaged_parameters",
    "is_decayed",
    "learning_rate",
    "make_optimizer",
    "make_schedule",
    "weight_decay",
]

_LION_BETA2 = 0.99  # https://arxiv.org/abs/2302.06675
_MUON_MOMENTUM = 0.95


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """The decay of the parameter of this name: its module's, or none."""
    return weight_decays(config)[module_of(name)] if is_decayed(name) else 0.0


def learning_rate(name: str, config: OptimizerConfig) -> float:
    """The peak rate of the parameter of this name: its module's, and LoRA+'s for the B of a pair."""
    rate = learning_rates(config)[module_of(name)]
    return rate * config.loraplus_lr_ratio if name.endswith(f".{LORA_B}") else rate


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer over a flat dict of parameters by name, with each module's rate under one schedule.

    Decay is decoupled from every direction, as AdamW's is: rate * decay * parameter is taken away.
    """
    schedule = make_schedule(config, num_steps)

    def scale_by_rates(updates, count):
        share = schedule(count)
        return {name: -share * learning_rate(name, config) * update for name, update in updates.items()}

    def add_decay(updates, params):
        return {name: update + weight_decay(name, config) * params[name] for name, update in updates.items()}

    steps = [_direction(config), optax.stateless(add_decay), _with_count(scale_by_rates)]
    if config.max_grad_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    if config.ema_decay is not None:
        steps.append(average_parameters(config.ema_decay))
    return optax.chain(*steps)


def described(config: OptimizerConfig) -> str:
    """The optimizer in words, with the settings that its name and schedule do not tell."""
    parts = [config.name, f"{config.schedule} schedule"]
    if "warmup_ratio" in SCHEDULES[config.schedule]:
        warmup = (
            f"{config.warmup_ratio:g} of the run"
            if config.warmup_steps is None
            else f"{config.warmup_steps} steps"
        )
        parts.append(f"warmup {warmup}")
    if config.moment_dtype != "float32":
        parts.append(f"moments in {config.moment_dtype}")
    parts.append(f"clipped at {config.max_grad_norm:g}" if config.max_grad_norm else "not clipped")
    if config.ema_decay is not None:
        parts.append(f"average of parameters with decay {config.ema_decay:g}")
    return ", ".join(parts)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What is done with gradients before decay and rate."""
    if config.name == "adafactor":
        return scale_by_adafactor()
    if config.name == "lion":
        beta2 = _LION_BETA2 if config.beta2 is None else config.beta2
        return optax.scale_by_lion(config.beta1, beta2, mu_dtype=config.moment_dtype)
    if config.name == "muon":
        momentum = _MUON_MOMENTUM if config.momentum is None else config.momentum
        return scale_by_muon_and(_adam(config), momentum=momentum, moment_dtype=config.moment_dtype)
    if config.name == "sgd":
        if not config.momentum:
            return optax.identity()
        return optax.trace(config.momentum, accumulator_dtype=config.moment_dtype)
    return _adam(config)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    settings = (config.beta1, 0.999 if config.beta2 is None else config.beta2, config.epsilon)
    if config.name == "adamw_8bit":
        return scale_by_stored_adam(*settings, bits=8)
    if config.moment_dtype == "bfloat16":
        return scale_by_stored_adam(*settings, bits=16)
    return optax.scale_by_adam(*settings)


def _with_count(transform) -> optax.GradientTransformation:
    """A transformation that sees how many updates came before."""

    def update(updates, state, params=None):
        del params
        return transform(updates, state.count), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )
