"""Equal blocks held as one block whose parameters have a leading layer axis, and run by `lax.scan`."""

from collections.abc import Callable

import jax
from flax import nnx

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul outputs, recompute the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the input of each block
}


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """A block whose every parameter has shape [num_layers, ...]."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return make_block(rngs)

    return make(rngs)


def run_stack(
    call: Callable, blocks: nnx.Module, x: jax.Array, *, per_layer=None, remat: str, unroll: int = 1
):
    """Runs `x, out = call(block, x, per_layer[i])` over the layers; returns x and the stacked outs.

    remat: "none" keeps all activations for the backward pass, "dots" and "full" follow REMAT_POLICIES.
    """
    graphdef, params = nnx.split(blocks)

    def body(x, layer):
        params, inputs = layer
        return call(nnx.merge(graphdef, params), x, inputs)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (nnx.to_pure_dict(params), per_layer), unroll=unroll)
