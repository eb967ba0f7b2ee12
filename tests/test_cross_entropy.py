"""The chunked loss against the naive one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.kernels.cross_entropy import IGNORE, supervised_cross_entropy

B, T, D, V = 3, 11, 5, 13


def naive(hidden, head, labels):
    logits = (hidden.astype(jnp.float32) @ head.astype(jnp.float32))[:, :-1]
    targets = labels[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets == IGNORE, 0.0, losses).sum()


def inputs(share: float, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    labels = np.where(rng.random((B, T)) < share, rng.integers(0, V, (B, T)), IGNORE)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(labels)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 512])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_value_and_gradients_equal_the_naive_loss(share, chunk_size):
    hidden, head, labels = inputs(share)
    (total, count), grads = jax.value_and_grad(
        lambda h, w: supervised_cross_entropy(h, w, labels, chunk_size=chunk_size),
        argnums=(0, 1),
        has_aux=True,
    )(hidden, head)
    expected, expected_grads = jax.value_and_grad(naive, argnums=(0, 1))(hidden, head, labels)
    assert count == (labels[:, 1:] != IGNORE).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_the_label_of_the_first_token_is_never_predicted():
    hidden, head, labels = inputs(0.0)
    total, count = supervised_cross_entropy(hidden, head, labels.at[:, 0].set(4))
    assert (float(total), int(count)) == (0.0, 0)


def test_bfloat16_states_give_a_float32_loss_and_bfloat16_gradients():
    hidden, head, labels = inputs(0.5, jnp.bfloat16)
    (total, _), grads = jax.value_and_grad(
        lambda h, w: supervised_cross_entropy(h, w, labels, chunk_size=4), argnums=(0, 1), has_aux=True
    )(hidden, head)
    assert total.dtype == jnp.float32
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(total, naive(hidden, head, labels), rtol=1e-3)


def test_the_logits_of_a_whole_batch_never_exist():
    B, T, D, V, chunk = 4, 512, 16, 4096, 16

    def loss(hidden, head, labels):
        return supervised_cross_entropy(hidden, head, labels, chunk_size=chunk)[0]

    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * T * V * 4 / 4
