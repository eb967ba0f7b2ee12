"""Instruction tuning of a decoder on text alone, of all its weights (:full) or by LoRA (:lora).

Reproduces examples/train_full/llama3_full_sft.yaml of LLaMA-Factory: Llama-3-8B-Instruct, learning rate 1e-5 with a warmup
over a tenth of three epochs, gradients clipped at 1, samples of up to 2048 tokens, two per device and step, so 16 on
eight; and examples/train_lora/llama3_lora_sft.yaml: rank 8 on all linear layers, learning rate 1e-4, eight samples per step.

Needs, beside this directory or wherever the paths below point:
    checkpoints/Meta-Llama-3-8B-Instruct        meta-llama/Meta-Llama-3-8B-Instruct, with tokenizer.json
    data/dataset_info.json                      LLaMA-Factory's, with the files of the data sets named below

    python -m llava_jax.train --config=configs/sft.py:full --workdir=runs/sft

Its export is a Llama again, for init.language_model of any other recipe.
"""

from ml_collections import ConfigDict

from llava_jax.config import one_of
from llava_jax.recipe import default_config, llama_3, without_images


def get_config(tuning: str = "full") -> ConfigDict:
    one_of("The recipe's tuning", tuning, ("full", "lora"))
    config = default_config()
    config.name = f"sft_{tuning}"
    config.model.text = llama_3()
    without_images(config)
    config.init.language_model = "checkpoints/Meta-Llama-3-8B-Instruct"

    config.data.dataset = "identity,alpaca_en_demo"
    config.data.template = "llama_3"
    config.data.max_length = 2048
    config.data.batch_size = 8 if tuning == "lora" else 16

    config.tune.language_model = tuning
    if tuning == "lora":
        config.lora.update(rank=8, dropout=0.0)
    config.optimizer.learning_rate = 1e-4 if tuning == "lora" else 1e-5
    config.optimizer.update(warmup_ratio=0.1, max_grad_norm=1.0)
    config.train.num_epochs = 3.0
    config.export.dtype = "bfloat16"
    return config
