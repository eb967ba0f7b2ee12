"""TinyLLaVA stage 2: visual instruction tuning of projector and TinyLlama-1.1B on the 665K mix.

Reproduces scripts/train/finetune.sh of TinyLLaVA Factory with TinyLlama and CLIP-L/14 at 336 px or, as `:siglip`, SigLIP
so400m/14 at 384 px: learning rate 2e-5, global batch 128, one epoch, its template `llama`, which is `v1` here, steps grouped
by modality and length. CLIP's images are resized and center-cropped, SigLIP's squeezed into a square, whose first patch is
left out (728 of 729 stay), as there. There it is computed in float16, here in bfloat16. Its README's results:

          VQAv2  GQA   ScienceQA (images)  TextVQA  MM-Vet  POPE  MME     MMMU-val
    CLIP   73.7  58.0        59.9           46.3     23.2   85.5  1284.6    27.9
    SigLIP 75.5  58.6        64.0           49.6     23.5   86.3  1256.5    28.3

Needs, beside this directory or wherever the paths below point:
    checkpoints/TinyLlama-1.1B-Chat-v1.0        TinyLlama/TinyLlama-1.1B-Chat-v1.0, with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336, or
    checkpoints/siglip-so400m-patch14-384       google/siglip-so400m-patch14-384
    runs/tinyllava-pretrain                     the run of configs/tinyllava_pretrain.py, or a file with its projector;
                                                with SigLIP runs/tinyllava-siglip-pretrain
    playground/data                             llava_v1_5_mix665k.json and coco, gqa, ocr_vqa, textvqa, vg beside it

    python -m llava_jax.train --config=configs/tinyllava_finetune.py --workdir=runs/tinyllava
    python -m llava_jax.train --config=configs/tinyllava_finetune.py:siglip --workdir=runs/tinyllava-siglip
"""

from ml_collections import ConfigDict

from llava_jax.config import one_of
from llava_jax.recipe import default_config, siglip_so400m, tinyllama


def get_config(tower: str = "clip") -> ConfigDict:
    one_of("The recipe's tower", tower, ("clip", "siglip"))
    config = default_config()
    config.name = "tinyllava_finetune"
    config.model.text = tinyllama()
    config.init.language_model = "checkpoints/TinyLlama-1.1B-Chat-v1.0"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14-336"
    config.init.projector = "runs/tinyllava-pretrain"
    if tower == "siglip":
        config.name = "tinyllava_siglip_finetune"
        config.model.vision = siglip_so400m()
        config.init.vision_tower = "checkpoints/siglip-so400m-patch14-384"
        config.init.projector = "runs/tinyllava-siglip-pretrain"

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
