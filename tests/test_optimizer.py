"""AdamW, schedules and groups against torch and transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_scheduler

from llava_jax.config import Config, OptimizerConfig, TuneConfig
from llava_jax.optimizer import is_decayed, make_optimizer, make_schedule
from llava_jax.tuning import is_trainable, learning_rates

NAMES = (
    "language_model.embed_tokens.embedding",
    "language_model.layers.self_attn.q_proj.kernel",
    "language_model.layers.self_attn.q_proj.bias",
    "language_model.norm.scale",
    "multi_modal_projector.linear_1.kernel",
    "multi_modal_projector.linear_1.bias",
    "vision_tower.layers.mlp.fc1.kernel",
)


# transformers' own settings of a schedule, and ours that say the same of 37 steps
SCHEDULES = [
    ("cosine", {}, {}),
    ("linear", {}, {}),
    ("constant", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("inverse_sqrt", {}, {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 8}, {"decay_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "min_lr_ratio": 0.25}, {"min_lr_ratio": 0.25}),
]


@pytest.mark.parametrize(("schedule", "theirs", "ours"), SCHEDULES)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.0}, {"warmup_ratio": 0.03}, {"warmup_steps": 18}])
def test_schedules_equal_transformers(schedule, theirs, ours, warmup):
    num_steps = 37
    num_warmup_steps = warmup.get("warmup_steps", int(np.ceil(warmup.get("warmup_ratio", 0) * num_steps)))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    expected = get_scheduler(schedule, optimizer, num_warmup_steps, num_steps, theirs)
    if schedule == "constant":
        warmup = {}
    found = make_schedule(OptimizerConfig(schedule=schedule, **warmup, **ours), num_steps)
    for step in range(num_steps):
        assert float(found(step)) == pytest.approx(expected.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        expected.step()


def test_warmup_may_take_the_whole_run_or_more():
    for warmup in ({"warmup_ratio": 1.0}, {"warmup_steps": 37}):
        schedule = make_schedule(OptimizerConfig(**warmup), 37)
        assert [float(schedule(step)) for step in (0, 36)] == pytest.approx([0, 36 / 37], abs=1e-6)
    assert float(make_schedule(OptimizerConfig(warmup_steps=74), 37)(37)) == pytest.approx(0.5)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_ten_steps_equal_torch_adamw_with_the_original_groups(max_grad_norm):
    config = OptimizerConfig(
        learning_rate=1e-2,
        projector_learning_rate=3e-2,
        vision_tower_learning_rate=5e-3,
        weight_decay=0.1,
        beta2=0.95,
        warmup_ratio=0.2,
        max_grad_norm=max_grad_norm,
    )
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in NAMES}
    rates = {"language_model": 1e-2, "multi_modal_projector": 3e-2, "vision_tower": 5e-3}
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {
            "params": [theirs[name]],
            "lr": rates[name.split(".")[0]],
            "weight_decay": 0.0 if name.endswith(("bias", "scale")) else 0.1,
        }
        for name in NAMES
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    torch_schedule = get_cosine_schedule_with_warmup(torch_optimizer, 2, 10)

    optimizer = make_optimizer(config, 10)
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    state = optimizer.init(ours)
    for _ in range(10):
        grads = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in NAMES}
        updates, state = optimizer.update({n: jnp.asarray(g) for n, g in grads.items()}, state, ours)
        ours = {name: ours[name] + updates[name] for name in NAMES}
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        torch_optimizer.step()
        torch_schedule.step()
    for name in NAMES:
        np.testing.assert_allclose(
            ours[name], theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_norms_and_biases_are_not_decayed_but_embeddings_are():
    assert [is_decayed(name) for name in NAMES] == [True, True, False, False, True, False, True]


def test_one_filter_says_what_trains():
    config = Config(tune=TuneConfig(vision_tower="frozen", projector="full", language_model="frozen"))
    assert [name for name in NAMES if is_trainable(name, config)] == list(NAMES[4:6])


def test_modules_without_a_rate_of_their_own_take_the_common_one():
    assert learning_rates(OptimizerConfig(learning_rate=1.0, projector_learning_rate=2.0)) == {
        "vision_tower": 1.0,
        "projector": 2.0,
        "language_model": 1.0,
    }
