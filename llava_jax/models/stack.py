"""Equal blocks held as one block whose parameters have a leading layer axis, and run by `lax.scan`."""

from collections.abc import Callable, Sequence

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


class CutStack(nnx.Module):
    """A stack in ranges of layers, each with parameters of its own under a name like "28:32"."""

    def __init__(self, blocks: nnx.Module, spans: Sequence[tuple[int, int]]):
        graphdef, params = nnx.split(blocks)
        for begin, end in spans:
            part = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], params)
            setattr(self, f"{begin}:{end}", nnx.merge(graphdef, part))
        self.spans = tuple(spans)

    def parts(self) -> list[nnx.Module]:
        """The stacks that follow each other."""
        return [getattr(self, f"{begin}:{end}") for begin, end in self.spans]


def run_stack(
    call: Callable, blocks: nnx.Module, x: jax.Array, *, per_layer=None, remat: str, unroll: int = 1
):
    """Runs `x, out = call(block, x, per_layer[i])` over the layers; returns x and the stacked outs.

    remat: "none" keeps all activations for the backward pass, "dots" and "full" follow REMAT_POLICIES.
    A CutStack, which is only trained, takes no `per_layer`.
    """
    if isinstance(blocks, CutStack):
        assert per_layer is None
        for part in blocks.parts():
            x, _ = run_stack(call, part, x, remat=remat, unroll=unroll)
        return x, None
    graphdef, params = nnx.split(blocks)

    def body(x, layer):
        params, inputs = layer
        return call(nnx.merge(graphdef, params), x, inputs)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (nnx.to_pure_dict(params), per_layer), unroll=unroll)
