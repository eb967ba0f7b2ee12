"""LLaVA-1.5 stage 2: visual instruction tuning of projector and decoder on the 665K mix.

Reproduces scripts/v1_5/finetune.sh of the original: learning rate 2e-5, global batch 128, one epoch, images padded to
square, template `v1`, steps grouped by modality and length, no gradient clipping (its DeepSpeed files switch it off).
Published cost: 10 hours (7b, eight A100-40G), 20 hours (13b).

A quarter of what such steps hold is padding. Packed rows of 8192 tokens hold next to none, and 16 of them about 150 samples:
    --config.data.packing=True --config.data.group_by_modality_length=False --config.data.batch_size=16

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.5                  lmsys/vicuna-7b-v1.5 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336
    runs/llava15-7b-pretrain                    the run of configs/llava15_pretrain.py, or a file with its projector
    playground/data                             llava_v1_5_mix665k.json and coco, gqa, ocr_vqa, textvqa, vg beside it

    python -m llava_jax.train --config=configs/llava15_finetune.py:7b --workdir=runs/llava15-7b
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_finetune_{size}"
    config.model.text = vicuna(size)
    config.init.language_model = f"checkpoints/vicuna-{size}-v1.5"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14-336"
    config.init.projector = f"runs/llava15-{size}-pretrain"

    config.data.path = "playground/data/llava_v1_5_mix665k.json"
    config.data.image_folder = "playground/data"
    config.data.template = "v1"
    config.data.image_aspect_ratio = "pad"
    config.data.batch_size = 128
    config.data.group_by_modality_length = True

    config.optimizer.learning_rate = 2e-5
    config.export.layout = "llava-hf"
    config.export.dtype = "bfloat16"
    return config
