"""A small LLaVA, trained on a CPU from nothing: drawn pictures, three short stages, an exam. Minutes on 2 cores.

    python -m llava_jax.train --config=configs/quickstart.py
"""

from functools import partial

from ml_collections import ConfigDict

from llava_jax.config import default_config, default_stage
from llava_jax.quickstart.dataset import prepare

DATASET = "data/quickstart"


def stage(path: str, *, template: str, max_length: int, steps: int, batch_size: int, learning_rate: float) -> ConfigDict:
    section = default_stage()
    section.data.path = f"{DATASET}/{path}"
    section.data.image_folder = f"{DATASET}/images"
    section.data.template = template
    section.data.batch_size = batch_size
    section.data.max_length = max_length
    section.data.num_threads = 2
    section.optimizer.learning_rate = learning_rate
    section.optimizer.warmup_ratio = 0.06
    section.optimizer.beta2 = 0.98
    section.optimizer.max_grad_norm = 1.0
    section.train.max_steps = steps
    section.train.dtype = section.train.frozen_dtype = "float32"
    section.train.remat = "none"
    section.train.scan_unroll = 4
    section.loss.chunk_size = 32
    section.checkpoint.save_steps = 1000
    return section


def get_config() -> ConfigDict:
    config = default_config()
    for key in default_stage():
        del config[key]
    config.name = "quickstart"
    config.seed = 0
    config.prepare = partial(prepare, DATASET)
    config.init.tokenizer = f"{DATASET}/tokenizer.model"

    config.model.vision.update(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    config.model.text.update(
        vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
    )

    towers = stage("towers.json", template="plain", max_length=40, steps=600, batch_size=32, learning_rate=1.5e-3)
    towers.tune.vision_tower = True
    pretrain = stage("pretrain.json", template="plain", max_length=40, steps=60, batch_size=64, learning_rate=5e-3)
    pretrain.tune.language_model = False
    pretrain.tune.fresh_projector = True
    finetune = stage("finetune.json", template="v1", max_length=128, steps=600, batch_size=32, learning_rate=1.5e-3)
    config.stage_order = ("towers", "pretrain", "finetune")
    config.stages = ConfigDict({"towers": towers, "pretrain": pretrain, "finetune": finetune})

    config.evaluate.path = f"{DATASET}/questions_test.jsonl"
    config.evaluate.image_folder = f"{DATASET}/images"
    config.evaluate.batch_size = 125
    config.evaluate.max_new_tokens = 8
    config.evaluate.blind = True
    config.export.layout = "llava-hf"
    return config
