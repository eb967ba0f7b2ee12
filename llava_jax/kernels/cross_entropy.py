"""Cross-entropy of the supervised tokens, whose logits exist for a chunk at a time only.

Letters: B batch, T tokens, D model width, V vocabulary, C chunk, R parts into which rows are cut. Inside `_forward`
and `_backward` B and V are a device's share.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llava_jax.kernels.attention import Placement

IGNORE = -100


def supervised_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int = 2048,
    z_loss: float = 0.0,
    placement: Placement | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token loss over the supervised positions, and their number.

    hidden float[B, T, D], head float[D, V], labels int[B, T] aligned with the tokens (position t predicts
    labels[:, t + 1]; IGNORE means unsupervised) -> (loss_sum float32[], count int32[]).

    On each device the head runs over `chunk_size` of its supervised positions at a time, for as many chunks as they
    fill, in both passes; float32[chunk_size, V] is the largest array. Logits, log-sum-exp and loss are float32.
    z_loss: that share of each position's squared log-sum-exp is added to its loss.
    placement: how the rows of `hidden` lie on several devices; the vocabulary lies over the axis of heads where that
    divides it. The head is gathered and its gradient reduced once. What needs no gradient has none computed.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels {labels.shape} are not those of the tokens of hidden {hidden.shape}.")
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    if placement is not None and placement.mesh.size == 1:
        placement = None
    how = _How(chunk_size, z_loss, placement, head.shape[1])
    return _summed_loss(hidden, head, targets, how), (targets != IGNORE).sum()


@dataclasses.dataclass(frozen=True)
class _How:
    """What of a call is static."""

    chunk_size: int
    z_loss: float
    placement: Placement | None
    vocab_size: int

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis over which the vocabulary lies."""
        if self.placement is None:
            return None
        size = self.placement.mesh.shape[self.placement.heads]
        return self.placement.heads if size > 1 and self.vocab_size % size == 0 else None

    def on_each_device(self, function: Callable, inputs: str, outputs: str) -> Callable:
        """`function` on each device's share. A letter for each array: r has rows, h is the head, s a scalar, g the
        gradient of the head, which gets the dimension R."""
        if self.placement is None:
            return function
        rows, vocab = self.placement.rows, self.vocab_axis
        specs = {
            "r": PartitionSpec(rows),
            "h": PartitionSpec(None, vocab),
            "s": PartitionSpec(),
            "g": PartitionSpec(rows, None, vocab),
        }
        in_specs, out_specs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
        # Sums over devices are written out, so JAX need not know over which axes values vary.
        return jax.shard_map(
            function, mesh=self.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def over_vocab(self, reduce: Callable, x: jax.Array) -> jax.Array:
        return x if self.vocab_axis is None else reduce(x, self.vocab_axis)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed_loss(hidden, head, targets, how):
    losses, _ = how.on_each_device(partial(_forward, how), "rhr", "rr")(hidden, head, targets)
    return losses.sum()


def _save(hidden, head, targets, how):
    arrays = hidden.value, head.value, targets.value
    losses, lse = how.on_each_device(partial(_forward, how), "rhr", "rr")(*arrays)
    # Of what is saved only the structure is static: an empty tuple says yes, None says no.
    wanted = tuple(() if primal.perturbed else None for primal in (hidden, head))
    return losses.sum(), (*arrays, lse, wanted)


def _differentiate(how, saved, scale):
    hidden, head, targets, lse, wanted = saved
    of_hidden, of_head = (flag is not None for flag in wanted)
    if isinstance(scale, SymbolicZero):
        return None, None, None
    backward = how.on_each_device(
        partial(_backward, how, of_hidden, of_head), "rhrrs", "r" * of_hidden + "g" * of_head
    )
    grads = list(backward(hidden, head, targets, lse, scale))
    grad_hidden = grads.pop(0) if of_hidden else None
    return grad_hidden, grads[0].sum(axis=0) if of_head else None, None


_summed_loss.defvjp(_save, _differentiate, symbolic_zeros=True)


def _forward(how, hidden, head, targets):
    """A device's sum of losses float32[1], and the log-sum-exps float32[...] of its supervised positions in order."""
    chunk, num_chunks, padded = _chunks(how, hidden, targets)

    def add_chunk(i, sums):
        total, lses = sums
        _, h, target = chunk(i)
        logits, hit = _logits(how, h, head, target)
        largest = how.over_vocab(jax.lax.pmax, logits.max(axis=-1))
        lse = jnp.exp(logits - largest[:, None]).sum(axis=-1)
        lse = largest + jnp.log(how.over_vocab(jax.lax.psum, lse))
        picked = how.over_vocab(jax.lax.psum, jnp.where(hit, logits, 0.0).sum(axis=-1))
        losses = lse - picked + how.z_loss * lse**2
        total += jnp.where(target != IGNORE, losses, 0.0).sum()
        return total, jax.lax.dynamic_update_slice_in_dim(lses, lse, i * len(lse), axis=0)

    zeros = jnp.float32(0), jnp.zeros(padded, jnp.float32)
    total, lses = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
    return total[None], lses


def _backward(how, of_hidden, of_head, hidden, head, targets, lses, scale):
    """Those that are wanted of a device's gradients: of its rows, and its part of the head's, [1, D, V]."""
    chunk, num_chunks, _ = _chunks(how, hidden, targets)
    B, T, D = hidden.shape

    def add_chunk(i, grads):
        grad_hidden, grad_head = grads
        index, h, target = chunk(i)
        logits, hit = _logits(how, h, head, target)
        lse = jax.lax.dynamic_slice_in_dim(lses, i * len(index), len(index))
        weight = jnp.where(target != IGNORE, scale, 0.0)
        grad_logits = jnp.exp(logits - lse[:, None]) * (1 + 2 * how.z_loss * lse)[:, None] - hit
        grad_logits = (grad_logits * weight[:, None]).astype(head.dtype)
        if of_hidden:
            grad_h = jnp.einsum("CV,DV->CD", grad_logits, head, preferred_element_type=jnp.float32)
            grad_h = how.over_vocab(jax.lax.psum, grad_h).astype(hidden.dtype)
            grad_hidden = grad_hidden.at[index].set(grad_h, mode="drop", unique_indices=True)
        if of_head:
            # Contracted along two dimensions, of which one is 1: XLA is faster at that on CPUs (products_cpu.py).
            grad_head += jnp.einsum(
                "RCD,RCV->DV", h[None], grad_logits[None], preferred_element_type=jnp.float32
            )
        return grad_hidden, grad_head

    zeros = (
        jnp.zeros((B * T, D), hidden.dtype) if of_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if of_head else None,
    )
    grad_hidden, grad_head = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
    grads = (grad_hidden.reshape(B, T, D),) if of_hidden else ()
    # Devices add up their parts in the head's dtype, as they do for every other matrix.
    return (*grads, grad_head[None].astype(head.dtype)) if of_head else grads


def _chunks(how, hidden, targets):
    """A function of a chunk's number -> (where it lies in the flat rows int[C], hidden [C, D], targets int[C]); how
    many chunks there are int[]; and how many positions their largest possible number holds."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = min(how.chunk_size, len(targets))
    padded = math.ceil(len(targets) / size) * size
    supervised = targets != IGNORE
    (order,) = jnp.nonzero(supervised, size=padded, fill_value=len(targets))

    def chunk(i):
        index = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        h = hidden.at[index].get(mode="fill", fill_value=0)
        return index, h, targets.at[index].get(mode="fill", fill_value=IGNORE)

    count = supervised.sum()
    if how.vocab_axis is not None:
        # Devices that meet in the loop run it equally often; all do, for the sake of networks that ask for it.
        count = jax.lax.pmax(count, how.placement.rows)
    return chunk, (count + size - 1) // size, padded


def _logits(how, h, head, target):
    """Logits float32[C, V] of a device's part of the vocabulary, and where the target is bool[C, V]."""
    logits = jnp.einsum("CD,DV->CV", h, head, preferred_element_type=jnp.float32)
    words = jnp.arange(head.shape[1])
    if how.vocab_axis is not None:
        words += jax.lax.axis_index(how.vocab_axis) * head.shape[1]
    return logits, words == target[:, None]
