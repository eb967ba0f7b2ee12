"""The chunked loss against the naive one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.config import MeshConfig
from llava_jax.kernels.cross_entropy import IGNORE, supervised_cross_entropy
from llava_jax.sharding import attention_placement, make_mesh

B, T, D, V = 3, 11, 5, 13


def naive(hidden, head, labels, z_loss=0.0):
    logits = (hidden.astype(jnp.float32) @ head.astype(jnp.float32))[:, :-1]
    targets = labels[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.where(targets == IGNORE, 0.0, losses).sum()


def inputs(share: float, dtype=jnp.float32, B=B, D=D, V=V):
    rng = np.random.default_rng(1)
    labels = np.where(rng.random((B, T)) < share, rng.integers(0, V, (B, T)), IGNORE)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(labels)


def assert_equals_the_naive_loss(hidden, head, labels, *, z_loss=0.0, **how):
    (total, count), grads = jax.jit(
        jax.value_and_grad(
            lambda h, w: supervised_cross_entropy(h, w, labels, z_loss=z_loss, **how),
            argnums=(0, 1),
            has_aux=True,
        )
    )(hidden, head)
    expected, expected_grads = jax.value_and_grad(naive, argnums=(0, 1))(hidden, head, labels, z_loss)
    assert count == (labels[:, 1:] != IGNORE).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(grad).max()))


@pytest.mark.parametrize("chunk_size", [1, 7, 11, 512])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_value_and_gradients_equal_the_naive_loss(share, chunk_size):
    assert_equals_the_naive_loss(*inputs(share), chunk_size=chunk_size)


def test_the_squared_log_sum_exp_is_added():
    assert_equals_the_naive_loss(*inputs(0.5), chunk_size=4, z_loss=0.1)


@pytest.mark.parametrize("vocab", [26, 25], ids=["split", "whole"])  # over a tensor axis of 2
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_eight_devices_agree_with_the_naive_loss(sizes, vocab):
    placement = attention_placement(make_mesh(MeshConfig(*sizes)))
    arrays = inputs(0.4, B=8, D=16, V=vocab)
    assert_equals_the_naive_loss(*arrays, chunk_size=4, z_loss=0.01, placement=placement)


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


def compiled(argnums, *, T, V):
    """The gradient with respect to some of hidden states and head, compiled for one device."""
    B, D = 4, 16

    def loss(hidden, head, labels):
        return supervised_cross_entropy(hidden, head, labels, chunk_size=16)[0]

    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    return jax.jit(jax.grad(loss, argnums=argnums)).lower(*shapes).compile()


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    def temporary(**sizes):
        return compiled((0, 1), **sizes).memory_analysis().temp_size_in_bytes

    of_tokens = [temporary(T=512, V=V) - temporary(T=128, V=V) for V in (1024, 4096)]
    assert of_tokens[0] == of_tokens[1] < 4 * 4 * 384 * 32 * 4
    assert temporary(T=512, V=4096) < 4 * 512 * 4096 * 4 / 4  # the logits of the batch, by four


def test_what_needs_no_gradient_has_none_computed():
    def num_products(argnums):
        return compiled(argnums, T=64, V=128).as_text().count(" dot(")

    # Logits in both passes, and a product for each gradient.
    assert [num_products(argnums) for argnums in ((0, 1), (0,), (1,))] == [4, 3, 3]


def test_labels_of_other_tokens_are_refused():
    hidden, head, labels = jnp.zeros((2, 6, 4)), jnp.zeros((4, 8)), jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="are not those of the tokens"):
        supervised_cross_entropy(hidden, head, labels)
