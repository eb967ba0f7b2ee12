"""The share of the peak rate at each step, under the names and with the values of transformers' schedulers."""

import math

import jax.numpy as jnp
import optax

from llava_jax.config import OptimizerConfig

_TIMESCALE = 10_000  # of inverse_sqrt without warmup (transformers' get_inverse_sqrt_schedule)


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Steps in which the rate rises from 0: as many as asked, or ceil(warmup_ratio * num_steps)."""
    if config.schedule == "constant":
        return 0
    return math.ceil(config.warmup_ratio * num_steps) if config.warmup_steps is None else config.warmup_steps


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """A function of the number of updates done -> the share of the peak rate, float32[]."""
    warmup = warmup_steps(config, num_steps)
    rest = max(1, num_steps - warmup)
    least = config.min_lr_ratio
    decay = min(math.ceil(config.decay_ratio * num_steps), rest)
    timescale = warmup or _TIMESCALE
    constant = optax.constant_schedule(1.0)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "cosine_with_min_lr": optax.cosine_decay_schedule(1.0, rest, alpha=least),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "constant": constant,
        "constant_with_warmup": constant,
        "inverse_sqrt": lambda count: jnp.sqrt(timescale / (jnp.maximum(count, 0) + timescale)),
        "warmup_stable_decay": optax.join_schedules(
            [constant, optax.cosine_decay_schedule(1.0, decay, alpha=least)], [rest - decay]
        ),
    }[config.schedule]
    first = least if config.schedule == "warmup_stable_decay" else 0.0
    rise = optax.linear_schedule(first, 1.0, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])
