"""A small LLaVA, trained on a CPU from nothing: drawn pictures, three short stages, an exam.

    python -m llava_jax.train --config=configs/quickstart.py

Takes about 3 minutes on 2 free cores. The last lines are the shares of right answers about 500 pictures that no
stage has shown: eval_accuracy above 0.95, and eval_accuracy_blind, with another picture in place of the right
one, near 0.35. `runs/quickstart` then holds the model, its curves and its answers.
"""

from functools import partial

from ml_collections import ConfigDict

from llava_jax.config import default_config, default_stage
from llava_jax.quickstart.dataset import prepare

DATASET = "data/quickstart"


def get_config() -> ConfigDict:
    config = default_config()
    for key in default_stage():
        del config[key]  # these differ between the stages
    config.name = "quickstart"
    config.seed = 0
    config.prepare = partial(prepare, DATASET)
    config.init.tokenizer = f"{DATASET}/tokenizer.model"

    # 1.5 million parameters. A picture is 2 x 2 patches, so 4 tokens.
    config.model.vision.update(
        image_size=32,
        patch_size=16,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config.model.text.update(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
    )

    # Not part of LLaVA, which starts from CLIP and Vicuna: everything trains, so that tower and decoder know something.
    towers = stage("towers.json", steps=1300, batch_size=16, max_length=24, learning_rate=1e-3)
    towers.data.template = "plain"
    towers.tune.vision_tower = True

    # LLaVA's first stage: a new projector alone, on captions.
    pretrain = stage("pretrain.json", steps=150, batch_size=32, max_length=24, learning_rate=2e-3)
    pretrain.data.template = "plain"
    pretrain.tune.language_model = False
    pretrain.tune.fresh_projector = True

    # LLaVA's second stage: projector and decoder, on conversations.
    finetune = stage("finetune.json", steps=1000, batch_size=16, max_length=108, learning_rate=8e-4)
    finetune.data.template = "v1"

    config.stage_order = ("towers", "pretrain", "finetune")
    config.stages = ConfigDict({"towers": towers, "pretrain": pretrain, "finetune": finetune})

    config.evaluate.path = f"{DATASET}/questions_test.jsonl"
    config.evaluate.image_folder = f"{DATASET}/images"
    config.evaluate.batch_size = 125
    config.evaluate.max_new_tokens = 8
    config.evaluate.blind = True
    config.export.layout = "llava-hf"
    return config


def stage(path: str, *, steps: int, batch_size: int, max_length: int, learning_rate: float) -> ConfigDict:
    section = default_stage()
    section.data.path = f"{DATASET}/{path}"
    section.data.image_folder = f"{DATASET}/images"
    section.data.batch_size = batch_size
    section.data.max_length = max_length  # the longest row, nearly: every row is padded to it
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
