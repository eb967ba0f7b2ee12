"""What a step casts, how often, and that the network computes the same with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import llava_jax.step
from llava_jax.config import LossConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.models.stack import REMAT_POLICIES
from llava_jax.step import TrainState, abstract_model, bind, make_train_step, random_parameters

MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    ),
    text=TextConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    ),
)
A, B, T = 3, 2, 20


@pytest.fixture(scope="module")
def batch():
    draws = np.random.default_rng(0)
    tokens = draws.integers(1, MODEL.text.vocab_size, (A, B, T))
    return {
        "tokens": jnp.asarray(tokens),
        "labels": jnp.asarray(np.where(draws.random((A, B, T)) < 0.5, tokens, -100)),
        "positions": jnp.broadcast_to(jnp.arange(T), (A, B, T)),
        "segment_ids": jnp.ones((A, B, T), jnp.int32),
        "images": jnp.asarray(draws.integers(0, 256, (A, B, 1, 8, 8, 3)), jnp.uint8),
    }


@functools.cache
def parameters() -> dict[str, jax.Array]:
    return random_parameters(MODEL, 0, set(abstract_model(MODEL)[1]))


def make_step(cast_once: bool):
    """A bfloat16 network's step, with plain descent, and its first state."""
    graphdef, _ = abstract_model(MODEL, dtype=jnp.bfloat16)
    optimizer = optax.sgd(1e-2)
    dtype = jnp.bfloat16 if cast_once else jnp.float32  # else layers cast what they read
    step = make_train_step(graphdef, optimizer, LossConfig(), dtype=dtype)
    return step, TrainState(jnp.int32(0), parameters(), optimizer.init(parameters()))


def test_casting_once_per_step_changes_no_bit(batch):
    results = []
    for cast_once in (False, True):
        step, state = make_step(cast_once)
        results.append(jax.jit(step)(state, {}, batch))
    expected, found = results
    assert float(found[1]["loss"]) == float(expected[1]["loss"]) > 1
    for name, value in expected[0].trainable.items():
        assert np.array_equal(found[0].trainable[name], value), name


WAYS = [llava_jax.step._called_if, llava_jax.step._selected_if]  # on CPUs, on other platforms


@pytest.mark.parametrize("way", WAYS)
def test_updates_happen_on_a_condition(way):
    def update(number, pair):
        return number + 1, {"x": pair["y"] * 2, "y": pair["x"] + number}

    state = jnp.float32(3), {"x": jnp.arange(3.0), "y": jnp.ones(3)}
    for condition, expected in [(True, update(*state)), (False, state)]:
        found = jax.jit(way, static_argnums=1)(jnp.bool_(condition), update, *state)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("normalize", ["tokens", "microbatch"])
def test_a_step_descends_along_the_mean_over_tokens_or_over_microbatches(normalize, batch):
    batch = batch | {"labels": batch["labels"].at[0, 0].set(-100).at[1].set(-100)}  # one microbatch has none
    graphdef, _ = abstract_model(MODEL)

    def mean_loss(params):
        model = bind(graphdef, params)
        sums = []
        for i in range(A):
            of = {key: value[i] for key, value in batch.items()}
            hidden = model(of["tokens"], of["images"], of["positions"], of["segment_ids"])
            logits, labels = hidden[:, :-1] @ model.language_model.head(), of["labels"][:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
            sums.append((jnp.where(labels >= 0, losses, 0).sum(), (labels >= 0).sum()))
        if normalize == "tokens":
            return sum(total for total, _ in sums) / sum(count for _, count in sums)
        return (sums[0][0] / sums[0][1] + sums[2][0] / sums[2][1]) / 2

    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), parameters(), optimizer.init(parameters()))
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig(normalize=normalize)))
    found, metrics = step(state, {}, batch)
    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(parameters())
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    for name, value in parameters().items():
        np.testing.assert_allclose(
            value - found.trainable[name], grads[name], rtol=1e-3, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("bad", ["loss", "gradients"])
def test_a_step_is_left_out_if_only_its_loss_or_only_its_gradients_are_not_finite(bad, batch):
    graphdef, _ = abstract_model(MODEL)
    name = "language_model.embed_tokens.embedding"
    optimizer = optax.sgd(1.0)
    constant = jnp.nan if bad == "gradients" else 0.0
    step = make_train_step(
        graphdef,
        optimizer,
        LossConfig(),
        constrain_gradients=lambda grads: jax.tree.map(lambda x: jnp.full_like(x, constant), grads),
    )
    poison = jnp.inf if bad == "loss" else 0.0
    trainable = parameters() | {name: parameters()[name] + poison}
    found, metrics = jax.jit(step)(TrainState(jnp.int32(0), trainable, optimizer.init(trainable)), {}, batch)
    finite = [bool(jnp.isfinite(metrics[key])) for key in ("loss", "grad_norm")]
    assert finite == [bad != "loss", bad != "gradients"]
    assert metrics["skipped"] and jax.tree.all(jax.tree.map(np.array_equal, found.trainable, trainable))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(way, batch, monkeypatch):
    monkeypatch.setattr(llava_jax.step, "_called_if", way)
    graphdef, _ = abstract_model(MODEL)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig()))
    state = TrainState(jnp.int32(4), parameters(), optimizer.init(parameters()))
    state, metrics = step(state, {}, batch)  # moments that are not 0
    assert not metrics["skipped"]
    word = int(batch["tokens"][0, 0, 0])
    name = "language_model.embed_tokens.embedding"
    bad = state.trainable | {name: state.trainable[name].at[word, 0].set(jnp.inf)}
    bad_state = TrainState(state.step, bad, state.opt_state)
    found, metrics = step(bad_state, {}, batch)
    assert metrics["skipped"] and found.step == bad_state.step + 1 == 6
    assert jax.tree.all(jax.tree.map(np.array_equal, found.trainable, bad_state.trainable))
    assert jax.tree.all(jax.tree.map(np.array_equal, found.opt_state, bad_state.opt_state))


def equations(jaxpr, loops: int = 0):
    """Each equation of a program, and in how many loops it is."""
    for eqn in jaxpr.eqns:
        yield eqn, loops
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, loops + (eqn.primitive.name == "scan"))


KERNELS = {(16, 20), (20, 16), (16, 8)}  # of a layer: MLP, keys and values


def test_no_loop_casts_kernels(batch):
    counts = []
    for cast_once in (False, True):
        step, state = make_step(cast_once)
        program = jax.make_jaxpr(step)(state, {}, batch).jaxpr
        counts.append(sum(loops > 0 and _is_cast(eqn) for eqn, loops in equations(program)))
    assert counts[0] > counts[1] == 0


def _is_cast(eqn) -> bool:
    if eqn.primitive.name != "convert_element_type" or eqn.params["new_dtype"] != jnp.bfloat16:
        return False
    source = eqn.invars[0].aval
    return source.dtype == jnp.float32 and source.shape in KERNELS


TOWER = 12  # the width of its MLP, which nothing else has


def products_in_tower(remat: str, trains: str, batch) -> int:
    """The matrix products of the tower's MLP that a step has if the parameters train whose names start so."""
    graphdef, _ = abstract_model(MODEL, remat=remat)
    optimizer = optax.sgd(1e-2)
    trainable = {name: value for name, value in parameters().items() if name.startswith(trains)}
    frozen = {name: value for name, value in parameters().items() if name not in trainable}
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    step = make_train_step(graphdef, optimizer, LossConfig())
    program = jax.make_jaxpr(step)(state, frozen, jax.tree.map(lambda x: x[:1], batch)).jaxpr
    products = [eqn for eqn, _ in equations(program) if eqn.primitive.name == "dot_general"]
    return sum(any(TOWER in var.aval.shape for var in eqn.invars) for eqn in products)


@pytest.mark.parametrize("remat", ["none", *REMAT_POLICIES])
def test_a_frozen_tower_runs_forward_once_whatever_is_computed_again(remat, batch):
    assert products_in_tower(remat, "language_model", batch) == 2


def test_a_tower_that_trains_is_differentiated_and_computed_again(batch):
    assert products_in_tower("none", "", batch) == 2 + 4
    assert products_in_tower("full", "", batch) == 2 + 4 + 1  # the product before the activation
