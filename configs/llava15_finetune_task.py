"""LLaVA-1.5 on your own data: continues the instruction tuning of a finished model.

Reproduces scripts/v1_5/finetune_task.sh of the original: learning rate 2e-5, global batch 128, one epoch, images padded
to square, template `v1`, steps grouped by modality and length. For small datasets lower data.batch_size and learning
rate, or raise train.num_epochs. The original gives no hours; a sample costs what it costs in stage 2 (7b on eight
A100-40G: 665K samples in 10 hours).

Needs:
    checkpoints/llava-1.5-7b-hf                 llava-hf/llava-1.5-7b-hf, liuhaotian/llava-v1.5-7b or a run of ours
    playground/data/custom.json                 your LLaVA JSON; image paths are relative to data.image_folder

    python -m llava_jax.train --config=configs/llava15_finetune_task.py:7b --workdir=runs/llava15-7b-task
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_finetune_task_{size}"
    config.model.text = vicuna(size)
    config.init.model = f"checkpoints/llava-1.5-{size}-hf"

    config.data.path = "playground/data/custom.json"
    config.data.image_folder = "playground/data"
    config.data.group_by_modality_length = True

    config.export.layout = "llava-hf"
    config.export.dtype = "bfloat16"
    return config
