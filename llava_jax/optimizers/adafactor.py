"""Adafactor with given rates: second moments kept as a row and a column of each matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llava_jax.optimizers.parameters import is_matrix

_DECAY = 0.8  # https://arxiv.org/abs/1804.04235, section 7.2
_EPSILON = 1e-30


class Factors(NamedTuple):
    """Means of the squared gradients along each of the last two dimensions; these are kept, of size 1."""

    rows: jax.Array
    columns: jax.Array


class AdafactorState(NamedTuple):
    """Second moments by parameter name: `Factors` of matrices, the moments themselves of others."""

    count: jax.Array
    moments: dict[str, Factors | jax.Array]


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor's direction, each layer of a stack for itself, its root mean square at most 1.

    optax's own would take the two largest dimensions of a stack for a matrix and clip all of its layers together.
    """

    def init(params: dict[str, jax.Array]) -> AdafactorState:
        moments = {}
        for name, value in params.items():
            zeros = jnp.zeros(value.shape, jnp.float32)
            moments[name] = Factors(*_means(zeros)) if _is_factored(name, value) else zeros
        return AdafactorState(jnp.zeros((), jnp.int32), moments)

    def update(grads: dict[str, jax.Array], state: AdafactorState, params=None):
        del params
        count = optax.safe_increment(state.count)
        decay = 1 - count.astype(jnp.float32) ** -_DECAY
        blend = lambda old, new: decay * old + (1 - decay) * new
        updates, moments = {}, {}
        for name, grad in grads.items():
            squares = jnp.square(grad) + _EPSILON
            if _is_factored(name, grad):
                rows, columns = map(blend, state.moments[name], _means(squares))
                moments[name] = Factors(rows, columns)
                scale = jax.lax.rsqrt(rows / rows.mean(-2, keepdims=True)) * jax.lax.rsqrt(columns)
            else:
                moments[name] = blend(state.moments[name], squares)
                scale = jax.lax.rsqrt(moments[name])
            updates[name] = _clip(name, grad * scale)
        return updates, AdafactorState(count, moments)

    return optax.GradientTransformation(init, update)


def _is_factored(name: str, value: jax.Array) -> bool:
    return is_matrix(name) or (value.ndim == 2 and ".layers." not in name)


def _means(squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    return squares.mean(-1, keepdims=True), squares.mean(-2, keepdims=True)


def _clip(name: str, update: jax.Array) -> jax.Array:
    axes = tuple(range(int(".layers." in name), update.ndim))
    root = jnp.sqrt(jnp.square(update).mean(axes, keepdims=True))
    return update / jnp.maximum(root, 1.0)
