"""Equal blocks held as one block whose parameters have a leading layer axis, and run by `lax.scan`."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.linear import PRODUCT

_policies = jax.checkpoint_policies
_ATTENTION = "attention"  # its output and, of kernels, the log-sum-exp


def _is_cudnn(primitive, *_, **__) -> bool:
    """Of JAX's own call of cuDNN what its backward pass reads has no name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


REMAT_POLICIES = {  # what the backward pass finds kept of a block, beside its input; it recomputes the rest
    "minimal": _policies.save_from_both_policies(  # recomputes elementwise steps alone
        _policies.save_only_these_names(PRODUCT, _ATTENTION), _is_cudnn
    ),
    "offload": _policies.save_and_offload_only_these_names(  # the same, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT, _ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": _policies.save_only_these_names(PRODUCT),  # recomputes attention too
    "full": _policies.nothing_saveable,
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

    def parts(self) -> list[tuple[tuple[int, int], nnx.Module]]:
        """The ranges and their stacks, as they follow each other."""
        return [((begin, end), getattr(self, f"{begin}:{end}")) for begin, end in self.spans]


def run_stack(
    call: Callable, blocks: nnx.Module, x: jax.Array, *, per_layer=None, remat: str, unroll: int = 1
):
    """Runs `x, out = call(block, x, per_layer[i])` over the layers; returns x and the stacked outs.

    remat: "none" keeps all activations for the backward pass, the others follow REMAT_POLICIES. A stack in which, and
    before which, nothing trains keeps and recomputes nothing in any case.
    """
    if isinstance(blocks, CutStack):
        outs = []
        for (begin, end), part in blocks.parts():
            inputs = jax.tree.map(lambda leaf, begin=begin, end=end: leaf[begin:end], per_layer)
            x, out = run_stack(call, part, x, per_layer=inputs, remat=remat, unroll=unroll)
            outs.append(out)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
    graphdef, params = nnx.split(blocks)

    def body(x, layer):
        params, inputs = layer
        return call(nnx.merge(graphdef, params), x, inputs)

    params = nnx.to_pure_dict(params)
    if remat != "none":
        # Without a loop XLA finds what is computed twice, and keeps it.
        straight = unroll >= len(jax.tree.leaves(params)[0])
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=straight)
    return jax.lax.scan(body, x, (params, per_layer), unroll=unroll)
