"""LLaVA-1 (2023) stage 1: a fresh linear projector learns to speak to the decoder, on 558K captions.

Reproduces scripts/pretrain.sh of the original: CLIP-L/14 at 224 px (256 tokens per image), one linear layer as projector,
which alone trains, learning rate 2e-3, global batch 128, one epoch, images resized and center-cropped, template
`v0_plain`. For LLaVA-Lightning, the same with 80K conversations in its second stage, the original tells 2 hours on eight
GPUs (scripts/train_lightning.sh, which also wraps images in tokens of their own; their embeddings then train too):
    --config.model.use_im_start_end=True --config.model.text.vocab_size=32002
    --config.tune.language_model=partial --config.tune.language_model_modules=embed_tokens

Needs, beside this directory or wherever the paths below point:
    checkpoints/vicuna-7b-v1.3                  lmsys/vicuna-7b-v1.3 (or -13b-), with tokenizer.model
    checkpoints/clip-vit-large-patch14          openai/clip-vit-large-patch14
    playground/data/LLaVA-Pretrain              liuhaotian/LLaVA-Pretrain, images unpacked in images/

    python -m llava_jax.train --config=configs/llava_v1_pretrain.py:7b --workdir=runs/llava-v1-7b-pretrain
"""

from ml_collections import ConfigDict

from llava_jax.recipe import default_config, vicuna_v1_3


def get_config(size: str = "7b") -> ConfigDict:
    config = default_config()
    config.name = f"llava_v1_pretrain_{size}"
    config.model.text = vicuna_v1_3(size)
    config.model.vision.image_size = 224
    config.model.projector_type = "linear"
    config.init.language_model = f"checkpoints/vicuna-{size}-v1.3"
    config.init.vision_tower = "checkpoints/clip-vit-large-patch14"

    config.data.path = "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    config.data.image_folder = "playground/data/LLaVA-Pretrain/images"
    config.data.template = "v0_plain"
    config.data.image_aspect_ratio = "square"
    config.data.batch_size = 128

    config.tune.language_model = "frozen"
    config.optimizer.learning_rate = 2e-3
    return config
