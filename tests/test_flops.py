"""The FLOPs formula against a count by hand and against XLA's."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llava_jax.config import (
    SIGLIP,
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.flops import Work, causal_pairs, training_flops
from llava_jax.program import Program
from llava_jax.sharding import make_mesh
from llava_jax.step import abstract_model, make_eval_step

SMALL = ModelConfig(
    vision=VisionConfig(
        hidden_size=6,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    ),
    text=TextConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    ),
)
WORK = Work(tokens=100, pairs=700, images=3, supervised=20)

# By hand, forward. Two of three tower layers run, on 5 positions of 4 patches and the class token.
TOWER = 3 * (2 * (5 * 2 * (4 * 6 * 6 + 2 * 6 * 10) + 5 * 5 * 4 * 6) + 4 * 2 * 48 * 6)
PATCHES = 3 * (4 * 2 * 48 * 6)
FIRST, SECOND = 3 * 4 * 2 * 6 * 8, 3 * 4 * 2 * 8 * 8  # the projector's matrices, on 4 features per image
DECODER = 2 * 100 * 2 * (8 * 16 + 8 * 8 + 8 * 8 + 16 * 8 + 3 * 8 * 12)  # q, k, v, o, MLP
ATTENTION = 2 * 700 * 4 * 16
HEAD = 20 * 2 * 8 * 50


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        (
            TuneConfig(vision_tower="frozen", projector="full", language_model="frozen"),
            (TOWER, 2 * FIRST + 3 * SECOND, 2 * DECODER + 3 * ATTENTION, 2 * HEAD),
        ),
        (
            TuneConfig(vision_tower="frozen", projector="full", language_model="full"),
            (TOWER, 2 * FIRST + 3 * SECOND, 3 * DECODER + 3 * ATTENTION, 3 * HEAD),
        ),
        (
            TuneConfig(vision_tower="frozen", projector="frozen", language_model="full"),
            (TOWER, FIRST + SECOND, 3 * DECODER + 3 * ATTENTION, 3 * HEAD),
        ),
        (
            TuneConfig(vision_tower="full", projector="frozen", language_model="frozen"),
            (3 * TOWER - PATCHES, 2 * FIRST + 2 * SECOND, 2 * DECODER + 3 * ATTENTION, 2 * HEAD),
        ),
    ],
)
def test_flops_equal_a_count_by_hand(tune, expected):
    flops = training_flops(SMALL, tune, WORK)
    assert tuple(flops.values()) == expected
    assert list(flops) == ["vision_tower", "projector", "decoder", "head"]


def test_a_siglip_tower_has_no_class_token():
    vision = dataclasses.replace(SMALL.vision, image_size=9, model_type=SIGLIP)  # the ninth pixel is left out
    model = dataclasses.replace(SMALL, vision=vision, select_feature="cls_patch")
    tower = 3 * (2 * (4 * 2 * (4 * 6 * 6 + 2 * 6 * 10) + 4 * 4 * 4 * 6) + 4 * 2 * 48 * 6)
    flops = training_flops(model, TuneConfig(), WORK)
    assert (flops["vision_tower"], flops["projector"]) == (tower, 2 * FIRST + 3 * SECOND)
    without_first = training_flops(dataclasses.replace(model, select_feature="patch"), TuneConfig(), WORK)
    assert without_first["projector"] == (2 * FIRST + 3 * SECOND) * 3 / 4


def test_a_sample_of_four_tokens_has_ten_pairs():
    assert causal_pairs(4) == 1 + 2 + 3 + 4


def test_work_adds_up():
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) * 2 == Work(21, 42, 63, 84)


def test_seven_billion_parameters_cost_about_six_flops_each_per_token():
    work = Work(tokens=1, pairs=0, images=0, supervised=1)
    parameters = 6_738_415_616 - 32_000 * 4096  # Llama-2-7B without its embeddings, a lookup
    total = sum(training_flops(ModelConfig(), TuneConfig(), work).values())
    assert total == pytest.approx(6 * parameters, rel=1e-3)  # norms are no matrices


XLAS = ModelConfig(
    vision=VisionConfig(128, 512, 4, 2, 56, 14),
    text=TextConfig(512, 256, 640, 3, 4, 2, 64, max_position_embeddings=128),
)
ADAPTERS = LoraConfig(rank=2, dropout=0.0)


@pytest.mark.parametrize(
    ("tune", "lora", "num_images"),
    [
        (TuneConfig(language_model="frozen"), LoraConfig(), 2),
        (TuneConfig(), LoraConfig(), 2),
        (TuneConfig(), LoraConfig(), 0),
        (TuneConfig(projector="frozen", language_model="lora"), ADAPTERS, 1),
        (TuneConfig(language_model="lora"), ADAPTERS, 1),
    ],
    ids=["stage1", "stage2", "text-only", "lora-alone", "lora"],
)
def test_compiled_steps_compute_what_trains_and_no_more(tune, lora, num_images):
    """A frozen tower runs forward, the frozen decoder gives no gradients of weights; text alone runs no tower."""
    B, T = 2, 96
    config = Config(
        model=XLAS,
        data=DataConfig(batch_size=B, max_length=T),
        tune=tune,
        lora=lora,
        loss=LossConfig(chunk_size=B * T),
        train=TrainConfig(dtype="float32", frozen_dtype="float32", remat="none", scan_unroll=4),
        mesh=MeshConfig(1, 1, 1),
    )
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]), num_steps=3)
    shapes = program.abstract_state(), program.abstract_frozen(), program.abstract_batch(T, num_images)
    compiled = program.train_step().lower(*shapes).compile()

    work = Work(tokens=B * T, pairs=B * T * T, images=B * num_images, supervised=B * T)
    flops = sum(training_flops(XLAS, tune, work).values())
    # Elementwise work, the optimizer's and the adapters' own come on top. Of a single chunk XLA keeps the logits.
    assert flops < compiled.cost_analysis()["flops"] < 1.06 * flops


def test_flops_equal_what_xla_counts_of_the_unrolled_forward_pass():
    """XLA sees the whole square of pairs, all positions' logits, and elementwise work besides."""
    model = ModelConfig(
        vision=VisionConfig(128, 512, 3, 2, 56, 14),
        text=TextConfig(512, 256, 640, 2, 4, 2, 64, max_position_embeddings=128),
    )
    B, T, M = 2, 96, 1
    graphdef, shapes = abstract_model(model, unroll=4)
    parameters = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in shapes.items()}
    batch = {
        key: jax.ShapeDtypeStruct((1, B, T), jnp.int32)
        for key in ("tokens", "labels", "positions", "segment_ids")
    } | {"images": jax.ShapeDtypeStruct((1, B, M, 56, 56, 3), jnp.uint8)}
    step = make_eval_step(graphdef)
    counted = jax.jit(step).lower(parameters, batch).cost_analysis()["flops"]

    work = Work(tokens=B * T, pairs=B * T * T, images=B * M, supervised=B * T)
    trained = training_flops(model, TuneConfig(), work)
    frozen = training_flops(model, TuneConfig(vision_tower="full", projector="frozen"), work)
    forward = {
        "vision_tower": trained["vision_tower"],
        "projector": frozen["projector"] / 2,
        "decoder": trained["decoder"] / 3,
        "head": trained["head"] / 3,
    }
    assert counted == pytest.approx(sum(forward.values()), rel=0.02)
    assert counted > sum(forward.values())
