"""LLaVA-1.5 stage 2 by LoRA: adapters in the decoder, the projector in full, on the 665K mix.

Reproduces scripts/v1_5/finetune_lora.sh of the original: rank 128, alpha 256 and dropout 0.05 on all linear layers of
the decoder, learning rate 2e-4, the projector at 2e-5, global batch 128, one epoch, images padded to square, template
`v1`, steps grouped by modality and length. The original gives no hours of its own for it.

Frozen weights are bfloat16 and have neither gradients nor moments: weights, gradients and moments of 7b take 20 GB (320
million parameters train) where full fine-tuning takes 110.
The export is an adapter for the original's loader; "llava-hf" in its place writes the merged model.

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.5                  lmsys/vicuna-7b-v1.5 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336
    runs/llava15-7b-pretrain                    the run of configs/llava15_pretrain.py, or a file with its projector
    playground/data                             llava_v1_5_mix665k.json and coco, gqa, ocr_vqa, textvqa, vg beside it

    python -m llava_jax.train --config=configs/llava15_finetune_lora.py:7b --workdir=runs/llava15-7b-lora
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_finetune_lora_{size}"
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

    config.tune.update(language_model="lora", projector="full")
    config.lora.update(rank=128, alpha=256.0, dropout=0.05, target="all")
    config.optimizer.learning_rate = 2e-4
    config.optimizer.projector_learning_rate = 2e-5
    config.export.layout = "peft"
    return config
