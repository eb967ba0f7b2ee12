"""A moving average of the trained parameters, kept among the optimizer's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AverageState(NamedTuple):
    """The averages by parameter name, float32, and how many updates they saw."""

    count: jax.Array
    average: dict[str, jax.Array]


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are; comes last. The average starts from the first update's result, as torch's does."""

    def init(params: dict[str, jax.Array]) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: dict, state: AverageState, params: dict):
        keep = jnp.where(state.count == 0, 0.0, decay)
        average = jax.tree.map(
            lambda old, value, change: keep * old + (1 - keep) * (value + change),
            state.average,
            params,
            updates,
        )
        return updates, AverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(init, update)


def averaged_parameters(opt_state: optax.OptState) -> dict[str, jax.Array] | None:
    """The averages by parameter name; None without `optimizer.ema_decay`. Evaluation and the last save take these."""
    is_average = lambda part: isinstance(part, AverageState)
    found = [part for part in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(part)]
    return found[0].average if found else None
