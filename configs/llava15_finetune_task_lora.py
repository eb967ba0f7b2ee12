"""LLaVA-1.5 on your own data by LoRA: continues the instruction tuning of a finished model.

Reproduces scripts/v1_5/finetune_task_lora.sh of the original: rank 128, alpha 256 and dropout 0.05 on all linear layers
of the decoder, learning rate 2e-4, the projector in full at 2e-5, global batch 128, one epoch, images padded to square,
template `v1`, steps grouped by modality and length. For small datasets lower data.batch_size and learning rate, or raise
train.num_epochs. A sample costs what it costs in llava15_finetune_lora.py.

The export is the merged model; "peft-llava-hf" in its place writes an adapter for transformers' LLaVA, "peft" one for the
original's loader.

Needs:
    checkpoints/llava-1.5-7b-hf                 llava-hf/llava-1.5-7b-hf, liuhaotian/llava-v1.5-7b or a run of ours
    playground/data/custom.json                 your LLaVA JSON; image paths are relative to data.image_folder

    python -m llava_jax.train --config=configs/llava15_finetune_task_lora.py:7b --workdir=runs/llava15-7b-task-lora
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_finetune_task_lora_{size}"
    config.model.text = vicuna(size)
    config.init.model = f"checkpoints/llava-1.5-{size}-hf"

    config.data.path = "playground/data/custom.json"
    config.data.image_folder = "playground/data"
    config.data.group_by_modality_length = True

    config.tune.update(language_model="lora", projector="full")
    config.lora.update(rank=128, alpha=256.0, dropout=0.05, target="all")
    config.optimizer.learning_rate = 2e-4
    config.optimizer.projector_learning_rate = 2e-5
    config.export.layout = "llava-hf"
    config.export.dtype = "bfloat16"
    return config
