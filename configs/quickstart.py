"""A small LLaVA, trained on a CPU from nothing: drawn pictures, three short stages, an exam.

    python -m llava_jax.train --config=configs/quickstart.py

Takes 2 to 4 minutes on 2 cores. It ends with 2,000 questions about pictures that no stage has shown:
eval_accuracy should be above 0.95, and eval_accuracy_blind, with another picture in place of the right one,
near 0.3. The model, its curves and its answers are then in runs/quickstart.
"""

from functools import partial

from ml_collections import ConfigDict

from llava_jax.quickstart.dataset import prepare
from llava_jax.recipe import default_config

DATASET = "data/quickstart"


def get_config() -> ConfigDict:
    config = default_config("towers", "pretrain", "finetune")
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

    # max_length is just above each stage's longest row, because that is what long rows are padded to.
    for stage in config.stages.values():
        stage.data.image_folder = f"{DATASET}/images"
        stage.data.num_threads = 2
        stage.optimizer.update(warmup_ratio=0.06, beta2=0.98, max_grad_norm=1.0)
        stage.train.update(dtype="float32", frozen_dtype="float32", remat="none", scan_unroll=4)
        stage.loss.chunk_size = 32
        stage.checkpoint.save_steps = 1000

    # Not part of LLaVA, which starts from CLIP and Vicuna: everything trains, so that tower and decoder know something.
    towers = config.stages.towers
    towers.data.update(path=f"{DATASET}/towers.json", template="plain", batch_size=16, max_length=24)
    towers.tune.vision_tower = "full"
    towers.optimizer.learning_rate = 1e-3
    towers.train.max_steps = 1300

    # LLaVA's first stage: a new projector alone, on captions.
    pretrain = config.stages.pretrain
    pretrain.data.update(path=f"{DATASET}/pretrain.json", template="plain", batch_size=32, max_length=24)
    pretrain.tune.update(language_model="frozen", fresh_projector=True)
    pretrain.optimizer.learning_rate = 2e-3
    pretrain.train.max_steps = 150

    # LLaVA's second stage: projector and decoder, on conversations.
    finetune = config.stages.finetune
    finetune.data.update(path=f"{DATASET}/finetune.json", template="v1", batch_size=16, max_length=108)
    finetune.optimizer.learning_rate = 8e-4
    finetune.train.max_steps = 1000

    config.evaluate.path = f"{DATASET}/questions_test.jsonl"
    config.evaluate.image_folder = f"{DATASET}/images"
    config.evaluate.batch_size = 125
    config.evaluate.max_new_tokens = 8
    config.evaluate.blind = True
    config.export.layout = "llava-hf"
    return config
