"""Loss and accuracy of evaluation against optax and numpy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.kernels import token_scores
from llava_jax.kernels.cross_entropy import IGNORE

B, T, D, V = 3, 11, 5, 7


@pytest.mark.parametrize("columns", [1, 4, 10, 128])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_sums_are_those_of_all_logits_at_once(monkeypatch, columns, share):
    monkeypatch.setattr(token_scores, "_COLUMNS", columns)
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    labels = np.where(rng.random((B, T)) < share, rng.integers(0, V, (B, T)), IGNORE)
    total, correct, count = token_scores.score_tokens(
        jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(labels)
    )

    logits, targets = (hidden @ head)[:, :-1], labels[:, 1:]
    valid = targets != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), np.maximum(targets, 0))
    np.testing.assert_allclose(total, np.asarray(losses)[valid].sum(), rtol=1e-6)
    assert (int(correct), int(count)) == ((logits.argmax(-1) == targets)[valid].sum(), valid.sum())
