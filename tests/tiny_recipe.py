"""The tiny recipe of the tests, for commands too: --config=tests/tiny_recipe.py:DATASET."""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config


def get_config(dataset: str) -> ConfigDict:
    """One stage that trains in seconds on the quickstart's dataset in the directory `dataset`."""
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
    config.init.tokenizer = f"{dataset}/tokenizer.model"
    config.data.path = f"{dataset}/finetune.json"
    config.data.image_folder = f"{dataset}/images"
    config.data.max_length = 192
    config.data.batch_size = 8
    config.data.num_threads = 2
    config.data.cache_dir = ""
    config.optimizer.learning_rate = 1e-3
    config.train.update(
        max_steps=4, dtype="float32", frozen_dtype="float32", remat="none", log_steps=1, compiled_dir=""
    )
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return config
