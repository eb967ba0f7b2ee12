"""Cross-entropy that never holds the logits of a whole batch.

Letters: B batch, T tokens, D model width, V vocabulary, C chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

IGNORE = -100


def supervised_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, *, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token loss over the supervised positions, and their number.

    hidden float[B, T, D], head float[D, V], labels int[B, T] aligned with the tokens (position t predicts
    labels[:, t + 1]; IGNORE means unsupervised) -> (loss_sum float32[], count int32[]).

    Each row's supervised positions are moved to its front; the head then runs over `chunk_size` columns at
    a time, for as many chunks as the fullest row needs, in both passes. float[B, chunk_size, V] is the
    largest array. Logits, log-sum-exp and loss are float32.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    order = jnp.argsort(~supervised, axis=1, stable=True)
    targets = jnp.take_along_axis(targets, order, axis=1)
    hidden = jnp.take_along_axis(hidden[:, :-1], order[..., None], axis=1)
    chunk_size = min(chunk_size, targets.shape[1])
    padding = -targets.shape[1] % chunk_size
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE)
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    return _chunked_loss(hidden, head, targets, chunk_size), supervised.sum()


def _chunk(hidden, head, targets, i, chunk_size):
    """Logits float32[B, C, V], targets int[B, C] and their validity bool[B, C] for chunk i."""
    h = jax.lax.dynamic_slice_in_dim(hidden, i * chunk_size, chunk_size, axis=1)
    t = jax.lax.dynamic_slice_in_dim(targets, i * chunk_size, chunk_size, axis=1)
    logits = jnp.einsum("BCD,DV->BCV", h, head, preferred_element_type=jnp.float32)
    return h, logits, jnp.maximum(t, 0), t != IGNORE


def _num_chunks(targets, chunk_size):
    fullest = (targets != IGNORE).sum(axis=1).max()
    return (fullest + chunk_size - 1) // chunk_size


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_loss(hidden, head, targets, chunk_size):
    def add_chunk(i, total):
        _, logits, target, valid = _chunk(hidden, head, targets, i, chunk_size)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.where(valid, losses, 0.0).sum()

    return jax.lax.fori_loop(0, _num_chunks(targets, chunk_size), add_chunk, jnp.float32(0))


def _forward(hidden, head, targets, chunk_size):
    return _chunked_loss(hidden, head, targets, chunk_size), (hidden, head, targets)


def _backward(chunk_size, saved, scale):
    hidden, head, targets = saved

    def add_chunk(i, grads):
        grad_hidden, grad_head = grads
        h, logits, target, valid = _chunk(hidden, head, targets, i, chunk_size)
        grad_logits = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(target, logits.shape[-1])
        grad_logits = (grad_logits * jnp.where(valid, scale, 0.0)[..., None]).astype(head.dtype)
        grad_h = jnp.einsum("BCV,DV->BCD", grad_logits, head).astype(hidden.dtype)
        grad_hidden = jax.lax.dynamic_update_slice_in_dim(grad_hidden, grad_h, i * chunk_size, axis=1)
        grad_head += jnp.einsum("BCD,BCV->DV", h, grad_logits, preferred_element_type=jnp.float32)
        return grad_hidden, grad_head

    grads = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
    grad_hidden, grad_head = jax.lax.fori_loop(0, _num_chunks(targets, chunk_size), add_chunk, grads)
    return grad_hidden, grad_head.astype(head.dtype), None


_chunked_loss.defvjp(_forward, _backward)
