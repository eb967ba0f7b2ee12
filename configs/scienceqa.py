"""LLaVA-1 (2023) on ScienceQA: projector and decoder learn lecture, explanation and answer, in twelve epochs.

Reproduces scripts/finetune_sqa.sh of the original: Vicuna-13B v1.3, CLIP-L/14 at 224 px, the linear projector of its first
stage, learning rate 2e-5, global batch 128, images resized and center-cropped. The script leaves the template open; `v1` is
its Vicuna's. The original gives no hours for it.

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-13b-v1.3                 lmsys/vicuna-13b-v1.3 (or -7b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14          openai/clip-vit-large-patch14
    runs/llava-v1-13b-pretrain                  the run of configs/llava_v1_pretrain.py:13b, or a file with its projector
    playground/data/scienceqa                   llava_train_QCM-LEA.json, made by scripts/convert_sqa_to_llava.py of
                                                the original, and images/train

    python -m llava_jax.train --config=configs/scienceqa.py:13b --workdir=runs/scienceqa-13b
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna_v1_3


def get_config(size: str = "13b") -> ConfigDict:
    config = default_config()
    config.name = f"scienceqa_{size}"
    config.model.text = vicuna_v1_3(size)
    config.model.vision.image_size = 224
    config.model.projector_type = "linear"
    config.init.language_model = f"checkpoints/vicuna-{size}-v1.3"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14"
    config.init.projector = f"runs/llava-v1-{size}-pretrain"

    config.data.path = "playground/data/scienceqa/llava_train_QCM-LEA.json"
    config.data.image_folder = "playground/data/scienceqa/images/train"
    config.data.template = "v1"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 128

    config.optimizer.learning_rate = 2e-5
    config.train.num_epochs = 12.0
    config.export.layout = "llava"
    config.export.dtype = "bfloat16"
    return config
