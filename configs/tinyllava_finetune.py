"""TinyLLaVA stage 2: visual instruction tuning of projector and TinyLlama-1.1B on the 665K mix.

Reproduces scripts/train/finetune.sh of TinyLLaVA Factory with TinyLlama and CLIP-L/14 at 336 px: learning rate 2e-5, global
batch 128, one epoch, images resized and center-cropped, its template `llama`, which is `v1` here, steps grouped by modality
and length. There it is computed in float16, here in bfloat16. Its README's results for this model: VQAv2 73.7, GQA 58.0,
ScienceQA (images) 59.9, TextVQA 46.3, MM-Vet 23.2, POPE 85.5, MME 1284.6, MMMU-val 27.9.

Needs, beside this directory or wherever the paths below point:
    checkpoints/TinyLlama-1.1B-Chat-v1.0        TinyLlama/TinyLlama-1.1B-Chat-v1.0, with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336
    runs/tinyllava-pretrain                     the run of configs/tinyllava_pretrain.py, or a file with its projector
    playground/data                             llava_v1_5_mix665k.json and coco, gqa, ocr_vqa, textvqa, vg beside it

    python -m llava_jax.train --config=configs/tinyllava_finetune.py --workdir=runs/tinyllava
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, tinyllama


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "tinyllava_finetune"
    config.model.text = tinyllama()
    config.init.language_model = "checkpoints/TinyLlama-1.1B-Chat-v1.0"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14-336"
    config.init.projector = "runs/tinyllava-pretrain"

    config.data.path = "playground/data/llava_v1_5_mix665k.json"
    config.data.image_folder = "playground/data"
    config.data.template = "v1"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 128
    config.data.group_by_modality_length = True

    config.optimizer.learning_rate = 2e-5
    config.export.layout = "llava-hf"
    config.export.dtype = "bfloat16"
    return config
