"""Eight CPU devices for sharding tests, and small things to train on."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time here

import pytest

from llava_jax.config import Config
from llava_jax.quickstart.dataset import prepare
from llava_jax.recipe import default_config, parse


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory) -> str:
    """A small dataset of drawn shapes with its tokenizer, as the quickstart makes it."""
    root = str(tmp_path_factory.mktemp("data") / "shapes")
    prepare(root, num_train=80, num_dev=2, num_test=6)
    return root


@pytest.fixture
def tiny_recipe(shapes_dataset):
    """A one-stage recipe that trains in seconds; tests change what they need and parse it."""
    config = default_config()
    config.name = "tiny"
    config.model.vision.update(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config.model.text.update(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    config.init.tokenizer = f"{shapes_dataset}/tokenizer.model"
    config.data.path = f"{shapes_dataset}/finetune.json"
    config.data.image_folder = f"{shapes_dataset}/images"
    config.data.max_length = 192
    config.data.batch_size = 8
    config.data.num_threads = 2
    config.data.cache_dir = ""
    config.optimizer.learning_rate = 1e-3
    config.train.update(max_steps=4, dtype="float32", frozen_dtype="float32", remat="none", log_steps=1)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return config


@pytest.fixture
def tiny_config(tiny_recipe) -> Config:
    return parse(tiny_recipe).stages[""]
