"""Eight CPU devices for sharding tests, and small things to train on."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time here

import pytest

from llava_jax.config import Config
from llava_jax.quickstart.dataset import prepare
from llava_jax.recipe import parse
from tests.tiny_recipe import get_config as tiny_recipe_of


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory) -> str:
    """A small dataset of drawn shapes with its tokenizer, as the quickstart makes it."""
    root = str(tmp_path_factory.mktemp("data") / "shapes")
    prepare(root, num_train=80, num_dev=2, num_test=6)
    return root


@pytest.fixture(scope="session")
def tiny_model(shapes_dataset, tmp_path_factory) -> str:
    """The tiny recipe's model before training, as a directory of ours; drawing it takes longer than reading it."""
    from llava_jax.convert.ours import write_model
    from llava_jax.weights import initial_weights

    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_model(directory, initial_weights(parse(tiny_recipe_of(shapes_dataset)).first))
    return str(directory)


@pytest.fixture
def tiny_recipe(shapes_dataset):
    """A one-stage recipe that trains in seconds; tests change what they need and parse it."""
    return tiny_recipe_of(shapes_dataset)


@pytest.fixture
def tiny_config(tiny_recipe) -> Config:
    return parse(tiny_recipe).stages[""]
