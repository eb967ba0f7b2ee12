"""The optimizers beside AdamW: against torch and transformers, on eight devices, and through a checkpoint."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import Adafactor

from llava_jax.checkpoint import Checkpoints
from llava_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.optimizer import averaged_parameters, is_decayed, make_optimizer
from llava_jax.optimizers.parameters import is_matrix
from llava_jax.optimizers.stored_moments import Blocks
from llava_jax.program import Program
from llava_jax.sharding import make_mesh
from llava_jax.step import TrainState
from llava_jax.watchdog import Watchdog

EVERY = (
    {"name": "adamw"},
    {"name": "adamw", "moment_dtype": "bfloat16"},
    {"name": "adamw_8bit"},
    {"name": "adafactor"},
    {"name": "lion"},
    {"name": "lion", "moment_dtype": "bfloat16"},
    {"name": "muon"},
    {"name": "muon", "moment_dtype": "bfloat16"},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adamw", "ema_decay": 0.9},
)
every_optimizer = pytest.mark.parametrize(
    "settings", EVERY, ids=lambda settings: "-".join(str(value) for value in settings.values())
)
MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    text=TextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    ),
)
CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0}
MATRIX = "multi_modal_projector.linear_1.kernel"
STACK = "language_model.layers.mlp.up_proj.kernel"
BIAS = "multi_modal_projector.linear_1.bias"


def make_program(optimizer: dict, sizes=(1, 8, 1), **tune) -> Program:
    config = Config(
        model=MODEL,
        data=DataConfig(batch_size=16, max_length=128),
        tune=TuneConfig(**tune),
        lora=LoraConfig(rank=8) if "lora" in tune.values() else LoraConfig(),
        optimizer=OptimizerConfig(**optimizer),
        mesh=MeshConfig(*sizes),
    )
    return Program(config, make_mesh(config.mesh, jax.devices()[: math.prod(sizes)]), num_steps=3)


def draw(shapes: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(config: OptimizerConfig, params: dict, grads: list[dict], num_steps: int = 100):
    optimizer = make_optimizer(config, num_steps)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def run_torch(make, params: dict, grads: list[dict]) -> dict[str, np.ndarray]:
    """Each layer of a stack is a parameter of its own, as it is there."""
    theirs = {name: torch.tensor(value) for name, value in params.items()}
    theirs = {
        name: [part.requires_grad_() for part in (value.unbind() if name == STACK else [value])]
        for name, value in theirs.items()
    }
    optimizer = make([part for parts in theirs.values() for part in parts])
    for grad in grads:
        for name, parts in theirs.items():
            for part, value in zip(parts, grad[name] if name == STACK else [grad[name]], strict=True):
                part.grad = torch.tensor(value)
        optimizer.step()
    return {
        name: np.stack([part.detach().numpy() for part in parts]).reshape(params[name].shape)
        for name, parts in theirs.items()
    }


SHAPES = {MATRIX: (5, 7), STACK: (3, 4, 6), BIAS: (7,)}


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        (
            {"name": "adafactor"},
            lambda parts: Adafactor(parts, lr=1e-2, scale_parameter=False, relative_step=False),
        ),
        ({"name": "sgd"}, lambda parts: torch.optim.SGD(parts, lr=1e-2)),
        ({"name": "sgd", "momentum": 0.8}, lambda parts: torch.optim.SGD(parts, lr=1e-2, momentum=0.8)),
        ({"name": "adamw"}, lambda parts: torch.optim.AdamW(parts, lr=1e-2, weight_decay=0.0)),
    ],
    ids=["adafactor", "sgd", "momentum", "adamw"],
)
def test_ten_steps_equal_those_of_torch_and_transformers(settings, make):
    params, grads = draw(SHAPES, 0), [draw(SHAPES, seed) for seed in range(1, 11)]
    found, _ = run(OptimizerConfig(learning_rate=1e-2, **settings, **CONSTANT), params, grads)
    expected = run_torch(make, params, grads)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_lion_steps_by_the_sign_of_its_two_averages():
    params, grads = draw({MATRIX: (5, 7)}, 0), [draw({MATRIX: (5, 7)}, seed) for seed in range(1, 6)]
    found, _ = run(OptimizerConfig(name="lion", learning_rate=1e-2, **CONSTANT), params, grads)
    value, moment = params[MATRIX].astype(np.float64), 0.0
    for grad in grads:  # https://arxiv.org/abs/2302.06675, algorithm 2
        value = value - 1e-2 * np.sign(0.9 * moment + 0.1 * grad[MATRIX])
        moment = 0.99 * moment + 0.01 * grad[MATRIX]
    np.testing.assert_allclose(found[MATRIX], value, atol=1e-6)


def test_muon_orthogonalises_each_layer_as_torch_does_and_leaves_the_rest_to_adam():
    shapes = {MATRIX: (20, 30), STACK: (3, 24, 16), BIAS: (30,)}
    params, grads = draw(shapes, 0), [draw(shapes, seed) for seed in range(1, 4)]
    found, _ = run(OptimizerConfig(name="muon", learning_rate=1e-2, **CONSTANT), params, grads)
    matrices = {name: params[name] for name in (MATRIX, STACK)}
    make = lambda parts: torch.optim.Muon(parts, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    expected = run_torch(make, matrices, grads)
    for name in matrices:
        moved, theirs = found[name] - params[name], expected[name] - params[name]
        # torch computes in bfloat16, and corrects no bias of the momentum.
        assert np.linalg.norm(moved - theirs) < 0.1 * np.linalg.norm(theirs), name
    adam, _ = run(OptimizerConfig(learning_rate=1e-2, **CONSTANT), params, grads)
    np.testing.assert_allclose(found[BIAS], adam[BIAS], rtol=1e-6)


def test_embeddings_head_norms_and_biases_are_no_hidden_matrices():
    program = make_program({}, vision_tower="full", language_model="lora")
    names = [*program.abstract_trainable(), *program.abstract_frozen()]
    left = {name.rpartition(".")[2] for name in names if not is_matrix(name)}
    assert left == {"bias", "scale", "embedding", "class_embedding", "position_embedding", "kernel"}
    assert {name for name in names if not is_matrix(name) and name.endswith("kernel")} == {
        "language_model.lm_head.kernel",
        "vision_tower.patch_embedding.kernel",
    }


def adam_error(settings: dict, num_steps: int) -> float:
    """How far a run ends from float32 AdamW's end, relative to the way; gradients differ by row and column."""
    shapes = {STACK: (2, 16, 512)}
    start, rng = draw(shapes, 0), np.random.default_rng(1)
    sizes = 1e-4 * np.exp(rng.normal(size=(2, 16, 1)) + rng.normal(size=(2, 1, 512))).astype(np.float32)
    grads = [{STACK: sizes * (0.3 + draw(shapes, seed)[STACK])} for seed in range(2, 2 + num_steps)]
    config = OptimizerConfig(learning_rate=1e-3, **CONSTANT)
    expected = run(config, start, grads)[0][STACK] - start[STACK]
    found = run(dataclasses.replace(config, **settings), start, grads)[0][STACK] - start[STACK]
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_moments_of_few_bits_end_near_those_of_many():
    assert 1e-6 < adam_error({"moment_dtype": "bfloat16"}, 50) < 0.005
    assert 1e-6 < adam_error({"name": "adamw_8bit"}, 50) < 0.06


@pytest.mark.parametrize("settings", [{"moment_dtype": "bfloat16"}, {"name": "adamw_8bit"}])
def test_stored_moments_fade_although_a_step_is_less_than_their_resolution(settings):
    shapes = {STACK: (2, 16, 512)}
    ones, zeros = ({STACK: np.full(shapes[STACK], value, np.float32)} for value in (1e-3, 0.0))
    zeros[STACK][..., 0] = 1e-3  # keeps the scale of its block
    for config in (OptimizerConfig(**CONSTANT, **settings), OptimizerConfig(**CONSTANT)):
        _, state = run(config, ones, [ones] + [zeros] * 300)
        moment = state[0].nu[STACK]
        if isinstance(moment, Blocks):
            moment = (moment.codes.astype(jnp.float32) / 255) ** 4 * moment.scales[..., :1]
        mean = float(moment[..., 1:256].astype(jnp.float32).mean())
        assert mean == pytest.approx(1e-9 * 0.999**300, rel=0.02)


def test_eight_bits_hold_moments_in_little_more_than_a_quarter_but_those_of_embeddings():
    names = {STACK: (2, 64, 512), "language_model.embed_tokens.embedding": (96, 64)}
    _, state = run(OptimizerConfig(name="adamw_8bit"), draw(names, 0), [])
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(state[0].mu[STACK]) == size(state[0].nu[STACK]) == 2 * 64 * 512 * (1 + 4 / 256)
    assert state[0].mu["language_model.embed_tokens.embedding"].dtype == jnp.float32
    _, state = run(OptimizerConfig(moment_dtype="bfloat16"), draw(names, 0), [])
    assert size(state[0].mu) == size(state[0].nu) == 2 * (2 * 64 * 512 + 96 * 64)


def leaf_names(state) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """The leaves of moments with the parameter's name each lies under."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [key.key for key in path if "." in str(getattr(key, "key", ""))]
        if names:
            found.append((names[0], leaf))
    return found


@every_optimizer
def test_moments_are_cut_as_their_parameters_are(settings):
    program = make_program(settings)
    state = program.abstract_state()
    for name, leaf in leaf_names(state.opt_state):
        parameter = state.trainable[name]
        if leaf.shape == parameter.shape:
            assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), name
        else:
            assert leaf.ndim == parameter.ndim, name
            assert leaf.size <= parameter.size // 16, (
                name
            )  # the smallest dimension of a matrix; blocks are larger
    kept = {
        name: leaf for name, leaf in leaf_names(state.opt_state) if leaf.shape == state.trainable[name].shape
    }
    assert settings["name"] in ("sgd", "adafactor") or kept.keys() == state.trainable.keys()


@pytest.mark.parametrize(
    "settings", [EVERY[i] for i in (2, 3, 7, 10)], ids=["adamw_8bit", "adafactor", "muon", "average"]
)
def test_eight_devices_update_as_one_and_a_checkpoint_continues_bit_by_bit(settings, tmp_path):
    tune = {"language_model": "partial", "language_model_modules": "lm_head,norm", "projector": "full"}
    shapes = {n: leaf.shape for n, leaf in make_program(settings, **tune).abstract_trainable().items()}
    start, grads = draw(shapes, 0), [draw(shapes, seed) for seed in range(1, 4)]
    ends = []
    for sizes in ((1, 1, 1), (1, 4, 2)):
        program = make_program({"learning_rate": 1e-3, **settings, **CONSTANT}, sizes, **tune)
        update = update_of(program)
        state = program.new_state(start)
        for grad in grads[:2]:
            state = update(state, grad)
        with contextlib.closing(
            Checkpoints(tmp_path / str(sizes), CheckpointConfig(), Watchdog(None))
        ) as checkpoints:
            checkpoints.save(state, {"step": 2})
            checkpoints.finish()
            restored = checkpoints.restore(tmp_path / str(sizes) / "2", program.abstract_state())
        state, restored = update(state, grads[2]), update(restored, grads[2])
        jax.tree.map(np.testing.assert_array_equal, state, restored)
        ends.append(state.trainable)
    for name in shapes:
        np.testing.assert_allclose(ends[1][name], ends[0][name], atol=2e-4, err_msg=name)


def update_of(program: Program):
    optimizer = make_optimizer(program.config.optimizer, program.num_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state())

    def update(state: TrainState, grads: dict) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)

    return jax.jit(update, out_shardings=shardings)


@every_optimizer
def test_a_step_without_gradients_is_finite_and_moves_nothing(settings):
    start = draw(SHAPES, 0)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    found, state = run(OptimizerConfig(**settings, **CONSTANT), start, [zeros, zeros])
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], start[name])
    assert all(jnp.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(state))


@every_optimizer
def test_every_optimizer_keeps_rates_decays_and_what_is_frozen(settings):
    rates = {"language_model": 1e-3, "multi_modal_projector": 4e-3}
    program = make_program(
        {
            **settings,
            **CONSTANT,
            "learning_rate": 1e-3,
            "projector_learning_rate": 4e-3,
            "weight_decay": 0.1,
            "loraplus_lr_ratio": 16.0,
        },
        language_model="lora",
    )
    shapes = {name: leaf.shape for name, leaf in program.abstract_trainable().items()}
    assert not any(name.startswith("vision_tower") or "q_proj.kernel" in name for name in shapes)
    start, grads = draw(shapes, 0), [draw(shapes, 1)]
    found, _ = run(program.config.optimizer, start, grads)
    plain, _ = run(OptimizerConfig(**settings, **CONSTANT, learning_rate=1e-3), start, grads)
    for name in shapes:
        rate = rates[name.split(".")[0]] * (16 if name.endswith("lora_b") else 1)
        decay = 0.1 if is_decayed(name) else 0.0
        expected = rate / 1e-3 * (plain[name] - start[name]) - rate * decay * start[name]
        np.testing.assert_allclose(found[name] - start[name], expected, rtol=1e-3, atol=2e-6, err_msg=name)
        assert np.abs(plain[name] - start[name]).max() > 1e-4, name


def test_the_average_equals_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    start = draw({MATRIX: (5, 7)}, 0)
    grads = [draw({MATRIX: (5, 7)}, seed) for seed in range(1, 6)]
    _, state = run(OptimizerConfig(name="sgd", learning_rate=0.1, ema_decay=0.9, **CONSTANT), start, grads)
    module = torch.nn.ParameterList([torch.tensor(start[MATRIX])])
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for grad in grads:
        module[0].data -= 0.1 * torch.tensor(grad[MATRIX])
        average.update_parameters(module)
    expected = average.module[0].detach().numpy()
    np.testing.assert_allclose(averaged_parameters(state)[MATRIX], expected, atol=1e-6)
    assert averaged_parameters(run(OptimizerConfig(), start, grads)[1]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "Did you mean 'adamw'"),
        ({"name": "sgd", "beta2": 0.95}, "beta2=0.95 reaches nothing with optimizer.name='sgd'"),
        ({"momentum": 0.9}, "choose one of muon, sgd"),
        (
            {"name": "adamw_8bit", "moment_dtype": "bfloat16"},
            "reaches nothing with optimizer.name='adamw_8bit'",
        ),
        ({"name": "sgd", "moment_dtype": "bfloat16"}, "SGD without optimizer.momentum has no moments"),
        ({"min_lr_ratio": 0.1}, "choose one of cosine_with_min_lr, warmup_stable_decay"),
        ({"schedule": "constant", "warmup_steps": 10}, "warmup_steps=10 reaches nothing"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie in 0 to 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is no number of steps"),
    ],
)
def test_settings_that_reach_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)
