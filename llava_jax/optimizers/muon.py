"""Muon for matrices between hidden states, Adam for everything else (https://kellerjordan.github.io/posts/muon)."""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llava_jax.optimizers.parameters import is_matrix

# A stack's layer axis comes before these and is mapped over.
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# The root mean square of Adam's updates, so that its rates and decays hold: https://arxiv.org/abs/2502.16982.
_ROOT_MEAN_SQUARE = 0.2


def scale_by_muon_and(
    others: optax.GradientTransformation, *, momentum: float, moment_dtype: str
) -> optax.GradientTransformation:
    """Orthogonalised momentum with updates of Adam's size; `others` for what is no hidden matrix."""

    def dimensions(params: dict) -> dict:
        # Of a masked tree, what is left out must stay so.
        return {name: value if _is_masked(value) else _MATRIX for name, value in params.items()}

    matrices = optax.chain(
        scale_by_muon(beta=momentum, mu_dtype=moment_dtype, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(_like_adam, updates)),
    )
    kinds = lambda params: {name: "muon" if is_matrix(name) else "adam" for name in params}
    return optax.partition({"muon": matrices, "adam": others}, kinds)


def _like_adam(update: jax.Array) -> jax.Array:
    return update * (_ROOT_MEAN_SQUARE * math.sqrt(max(update.shape[-2:])))


def _is_masked(value) -> bool:
    return isinstance(value, optax.MaskedNode)
