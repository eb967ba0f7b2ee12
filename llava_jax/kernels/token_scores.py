"""Loss and accuracy over supervised positions, for evaluation: one pass through the head, nothing kept for gradients."""

import jax
import jax.numpy as jnp

from llava_jax.kernels.cross_entropy import IGNORE

_COLUMNS = 128  # whose logits exist at one time: 16 MB a row with Llama's vocabulary


def score_tokens(
    hidden: jax.Array, head: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the head says of each supervised next token, summed up.

    hidden float[B, T, D], head float[D, V], labels int[B, T] as for `supervised_cross_entropy` -> the sum of the
    losses float32[], how many tokens were the likeliest int32[], how many there are int32[].
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    order = jnp.argsort(~supervised, axis=1, stable=True)  # the supervised to the front of each row
    targets = jnp.take_along_axis(targets, order, axis=1)
    hidden = jnp.take_along_axis(hidden[:, :-1], order[..., None], axis=1)
    columns = min(_COLUMNS, targets.shape[1])
    padding = -targets.shape[1] % columns
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE)
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))

    def add_chunk(i, sums):
        h = jax.lax.dynamic_slice_in_dim(hidden, i * columns, columns, axis=1)
        target = jax.lax.dynamic_slice_in_dim(targets, i * columns, columns, axis=1)
        logits = jnp.einsum("BCD,DV->BCV", h, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        valid = target != IGNORE
        likeliest = valid & (logits.argmax(-1) == target)
        return sums[0] + jnp.where(valid, loss, 0.0).sum(), sums[1] + likeliest.sum()

    fullest = supervised.sum(axis=1).max()
    num_chunks = (fullest + columns - 1) // columns
    total, correct = jax.lax.fori_loop(0, num_chunks, add_chunk, (jnp.float32(0), jnp.int32(0)))
    return total, correct, supervised.sum()
