"""LLaVA-1.5 stage 2 by QLoRA: the decoder in 4 bits, adapters beside it, the projector in full, on the 665K mix.

The original has a QLoRA script for LLaVA-1 alone. Here are the values of that one, scripts/finetune_qlora.sh (NF4 with
double quantisation, rank 64, alpha 16, dropout 0.05, learning rate 2e-5, global batch 128, one epoch), with tower,
projector and data of LLaVA-1.5: steps grouped by modality and length, images padded to square, template `v1`. For the
adapters of its LoRA recipe add
    --config.lora.rank=128 --config.lora.alpha=256 --config.optimizer.learning_rate=2e-4
    --config.optimizer.projector_learning_rate=2e-5

The decoder's linear layers take 3.3 GB (7b) where bfloat16 takes 13; weights, gradients and moments together 7.3 GB.
The export is an adapter for the original's loader; "llava-hf" in its place writes the merged model.

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.5                  lmsys/vicuna-7b-v1.5 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336
    runs/llava15-7b-pretrain                    the run of configs/llava15_pretrain.py, or a file with its projector
    playground/data                             llava_v1_5_mix665k.json and coco, gqa, ocr_vqa, textvqa, vg beside it

    python -m llava_jax.train --config=configs/llava15_finetune_qlora.py:7b --workdir=runs/llava15-7b-qlora
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava15_finetune_qlora_{size}"
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
    config.lora.update(rank=64, alpha=16.0, dropout=0.05, target="all")
    config.lora.update(quantization="nf4", double_quantization=True)
    config.optimizer.learning_rate = 2e-5
    config.export.layout = "peft"
    return config
