"""What trains, at which rate, with which decay: AdamW as the original's trainer builds it."""

import math

import jax.numpy as jnp
import optax

from llava_jax.config import OptimizerConfig, TuneConfig

MODULES = {  # the first part of a parameter's name -> the module's name in TuneConfig
    "vision_tower": "vision_tower",
    "multi_modal_projector": "projector",
    "language_model": "language_model",
}


def is_trainable(name: str, tune: TuneConfig) -> bool:
    """Whether the parameter of this name trains. The one filter for gradients, moments and checkpoints."""
    return getattr(tune, MODULES[name.split(".")[0]])


def is_decayed(name: str) -> bool:
    """Weights are decayed; norms and biases are not (transformers' get_decay_parameter_names, as LLaVA uses it)."""
    return not name.endswith((".scale", ".bias"))


def learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """Each module's peak learning rate."""
    own = {"projector": config.projector_learning_rate, "vision_tower": config.vision_tower_learning_rate}
    return {
        module: config.learning_rate if own.get(module) is None else own[module]
        for module in MODULES.values()
    }


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
    rates = learning_rates(config)

    def scale_by_rates(updates, count):
        share = schedule(count)
        return {
            name: -share * rates[MODULES[name.split(".")[0]]] * update for name, update in updates.items()
        }

    steps = [
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: {name: is_decayed(name) for name in params}
        ),
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
