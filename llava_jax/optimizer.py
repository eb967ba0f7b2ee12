"""AdamW as the original's trainer builds it, with each module's rate and decay."""

import math

import jax.numpy as jnp
import optax

from llava_jax.config import OptimizerConfig
from llava_jax.tuning import LORA_B, learning_rates, module_of, weight_decays


def is_decayed(name: str) -> bool:
    """Weights are decayed; norms and biases are not (transformers' get_decay_parameter_names, as LLaVA uses it)."""
    return not name.endswith((".scale", ".bias"))


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """The decay of the parameter of this name: its module's, or none."""
    return weight_decays(config)[module_of(name)] if is_decayed(name) else 0.0


def learning_rate(name: str, config: OptimizerConfig) -> float:
    """The peak rate of the parameter of this name: its module's, and LoRA+'s for the B of a pair."""
    rate = learning_rates(config)[module_of(name)]
    return rate * config.loraplus_lr_ratio if name.endswith(f".{LORA_B}") else rate


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The share of the peak rate at each step: linear warmup from 0, then the shape, which ends at 0.

    Warmup lasts ceil(warmup_ratio * num_steps) steps, as in transformers' trainer.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    rest = max(1, num_steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, max(1, warmup)), after], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW over a flat dict of parameters by name, with each module's rate under one schedule."""
    schedule = make_schedule(config, num_steps)

    def scale_by_rates(updates, count):
        share = schedule(count)
        return {name: -share * learning_rate(name, config) * update for name, update in updates.items()}

    def add_decay(updates, params):
        return {name: update + weight_decay(name, config) * params[name] for name, update in updates.items()}

    steps = [
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.stateless(add_decay),
        _with_count(scale_by_rates),
    ]
    if config.max_grad_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*steps)


def _with_count(transform) -> optax.GradientTransformation:
    """A transformation that sees how many updates came before."""

    def update(updates, state, params=None):
        del params
        return transform(updates, state.count), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )
