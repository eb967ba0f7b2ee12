"""TinyLLaVA stage 1: a fresh projector between CLIP or SigLIP and TinyLlama-1.1B, on 558K captions.

Reproduces scripts/train/pretrain.sh of TinyLLaVA Factory with TinyLlama and CLIP-L/14 at 336 px or, as `:siglip`, SigLIP
so400m/14 at 384 px: the projector alone, learning rate 1e-3, global batch 256, one epoch, captions without questions. CLIP's
images are resized and center-cropped, SigLIP's squeezed into a square, whose first patch is left out (728 of 729 stay), as
there. There it is computed in float16, here in bfloat16. It gives no hours.

Needs, beside this directory or wherever the paths below point:
    checkpoints/TinyLlama-1.1B-Chat-v1.0        TinyLlama/TinyLlama-1.1B-Chat-v1.0, with tokenizer.model
    checkpoints/clip-vit-large-patch14-336      openai/clip-vit-large-patch14-336, or
    checkpoints/siglip-so400m-patch14-384       google/siglip-so400m-patch14-384
    playground/data/LLaVA-Pretrain              liuhaotian/LLaVA-Pretrain, images unpacked in images/

    python -m llava_jax.train --config=configs/tinyllava_pretrain.py --workdir=runs/tinyllava-pretrain
    python -m llava_jax.train --config=configs/tinyllava_pretrain.py:siglip --workdir=runs/tinyllava-siglip-pretrain
"""

from ml_collections import ConfigDict

from llava_jax.config import one_of
from llava_jax.recipe import default_config, siglip_so400m, tinyllama


def get_config(tower: str = "clip") -> ConfigDict:
    one_of("The recipe's tower", tower, ("clip", "siglip"))
    config = default_config()
    config.name = "tinyllava_pretrain"
    config.model.text = tinyllama()
    config.init.language_model = "checkpoints/TinyLlama-1.1B-Chat-v1.0"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14-336"
    if tower == "siglip":
        config.name = "tinyllava_siglip_pretrain"
        config.model.vision = siglip_so400m()
        config.init.vision_tower = "checkpoints/siglip-so400m-patch14-384"

    config.data.path = "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    config.data.image_folder = "playground/data/LLaVA-Pretrain/images"
    config.data.template = "plain"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 256

    config.tune.language_model = "frozen"
    config.optimizer.learning_rate = 1e-3
    return config
