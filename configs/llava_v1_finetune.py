"""LLaVA-1 (2023) stage 2: visual instruction tuning of projector and decoder on 80K or 158K conversations.

Reproduces scripts/finetune.sh of the original: CLIP-L/14 at 224 px, a linear projector, learning rate 2e-5, global batch
128, one epoch, images resized and center-cropped, template `v1`. Its scripts/finetune_full_schedule.sh is
    --config.data.path=playground/data/llava_instruct_158k.json --config.train.num_epochs=3
For LLaVA-Lightning the original tells 1 hour on eight GPUs; what its first stage added on the command line, this one needs
too (configs/llava_v1_pretrain.py), but for tune.*.

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.3                  lmsys/vicuna-7b-v1.3 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14          openai/clip-vit-large-patch14
    runs/llava-v1-7b-pretrain                   the run of configs/llava_v1_pretrain.py, or a file with its projector
    playground/data                             llava_instruct_80k.json, and coco/train2017 beside it

    python -m llava_jax.train --config=configs/llava_v1_finetune.py:7b --workdir=runs/llava-v1-7b
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna_v1_3


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava_v1_finetune_{size}"
    config.model.text = vicuna_v1_3(size)
    config.model.vision.image_size = 224
    config.model.projector_type = "linear"
    config.init.language_model = f"checkpoints/vicuna-{size}-v1.3"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14"
    config.init.projector = f"runs/llava-v1-{size}-pretrain"

    config.data.path = "playground/data/llava_instruct_80k.json"
    config.data.image_folder = "playground/data/coco/train2017"
    config.data.template = "v1"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 128

    config.optimizer.learning_rate = 2e-5
    config.export.layout = "llava"
    config.export.dtype = "bfloat16"
    return config
