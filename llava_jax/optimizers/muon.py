"""Muon for matrices between hidden states, Adam for everything else (https://kellerjordan.github.io/posts/muon)."""

import math
from typing import NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llava_jax.optimizers.parameters import is_matrix

# A stack's layer axis comes before these and is mapped over.
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# The root mean square of Adam's updates, so that its rates and decays hold: https://arxiv.org/abs/2502.16982.
_ROOT_MEAN_SQUARE = 0.2


class MuonState(NamedTuple):
    """Of hidden matrices and of all other parameters, each by name."""

    matrices: optax.OptState
    others: optax.OptState


def scale_by_muon_and(
    others: optax.GradientTransformation, *, momentum: float, moment_dtype: str
) -> optax.GradientTransformation:
    """Orthogonalised momentum with updates of Adam's size; `others` for what is no hidden matrix."""
    matrices = optax.chain(
        scale_by_muon(
            beta=momentum,
            mu_dtype=moment_dtype,
            weight_dimension_numbers=lambda params: dict.fromkeys(params, _MATRIX),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_like_adam, updates)),
    )

    def init(params: dict[str, jax.Array]) -> MuonState:
        some, rest = _split(params)
        return MuonState(matrices.init(some), others.init(rest))

    def update(grads: dict, state: MuonState, params: dict):
        (first, second), (some, rest) = _split(grads), _split(params)
        first, matrix_state = matrices.update(first, state.matrices, some)
        second, other_state = others.update(second, state.others, rest)
        return first | second, MuonState(matrix_state, other_state)

    return optax.GradientTransformation(init, update)


def _split(tree: dict) -> tuple[dict, dict]:
    """The entries of hidden matrices, and the others."""
    first = {name: value for name, value in tree.items() if is_matrix(name)}
    return first, {name: value for name, value in tree.items() if name not in first}


def _like_adam(update: jax.Array) -> jax.Array:
    return update * (_ROOT_MEAN_SQUARE * math.sqrt(max(update.shape[-2:])))
