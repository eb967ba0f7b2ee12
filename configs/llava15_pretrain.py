"""LLaVA-1.5 stage 1: a fresh projector learns to speak to the decoder, on 558K captions.

Reproduces scripts/v1_5/pretrain.sh of the original: projector alone, learning rate 1e-3, global batch 256, one epoch,
images resized and center-cropped ("square"), template `plain`. Published cost: 3.5 hours (7b), 5.5 hours (13b) on eight
A100-80G.

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.5                  lmsys/vicuna-7b-v1.5 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336
    playground/data/LLaVA-Pretrain              liuhaotian/LLaVA-Pretrain, images unpacked in images/

    python -m llava_jax.train --config=configs/llava15_pretrain.py:7b --workdir=runs/llava15-7b-pretrain
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_pretrain_{size}"
    config.model.text = vicuna(size)
    config.init.language_model = f"checkpoints/vicuna-{size}-v1.5"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14-336"

    config.data.path = "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    config.data.image_folder = "playground/data/LLaVA-Pretrain/images"
    config.data.template = "plain"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 256

    config.tune.language_model = "frozen"
    config.optimizer.learning_rate = 1e-3
    return config
