"""Continued pretraining of a decoder on plain documents, by LoRA (:lora) or of all its weights (:full).

Reproduces examples/train_lora/llama3_lora_pretrain.yaml of LLaMA-Factory: Llama-3-8B-Instruct, rows of 2048 tokens, eight
per step, rank 8 on all linear layers, learning rate 1e-4 with a warmup over a tenth of three epochs, gradients clipped at 1.
For :full it has no example; the rate is that of its examples/train_full. Documents are records {"text": ...}. Every token
of theirs and an end is learnt; long ones are cut into rows and short ones packed, but none sees another, as they do there.

Needs, beside this directory or wherever the paths below point:
    checkpoints/Meta-Llama-3-8B-Instruct        meta-llama/Meta-Llama-3-8B-Instruct, with tokenizer.json
    data/c4_demo.jsonl                          your documents; that file is LLaMA-Factory's demonstration

    python -m llava_jax.train --config=configs/pt.py:lora --workdir=runs/pt

Its export is a Llama again, for init.language_model of any other recipe.
"""

from ml_collections import ConfigDict

from llava_jax.config import one_of
from llava_jax.recipe import default_config, llama_3, without_images


def get_config(tuning: str = "lora") -> ConfigDict:
    one_of("The recipe's tuning", tuning, ("lora", "full"))
    config = default_config()
    config.name = f"pt_{tuning}"
    config.model.text = llama_3()
    without_images(config)
    config.init.language_model = "checkpoints/Meta-Llama-3-8B-Instruct"

    config.data.path = "data/c4_demo.jsonl"
    config.data.template = (
        "llama_3"  # documents are written without it, but a later stage asks what the model knows
    )
    config.data.max_length = 2048
    config.data.update(packing=True, row_length=2048, batch_size=8)

    config.tune.language_model = tuning
    if tuning == "lora":
        config.lora.update(rank=8, dropout=0.0)
    config.optimizer.learning_rate = 1e-4 if tuning == "lora" else 1e-5
    config.optimizer.update(warmup_ratio=0.1, max_grad_norm=1.0)
    config.train.num_epochs = 3.0
    config.export.dtype = "bfloat16"
    return config
