"""LLaVA of Hugging Face transformers in torch: the model of ours' shapes, and the time and memory of its training step.

`python -m benchmarks.transformers_llava CASE WEIGHTS` measures in a process of its own; CASE is a `Case` in JSON.
"""

import argparse
import json
import time

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks.isolated import tell
from benchmarks.timing import torch_conditions
from benchmarks.training_step import GIB, WARM_UP, Case, draw_samples, rated, require_accelerator
from llava_jax.config import ModelConfig
from llava_jax.convert.model_configs import SpecialTokens, write_llava_hf_config
from llava_jax.convert.names import canonical, model_rows
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.models.vit import normalize
from llava_jax.step import abstract_model, random_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(config: ModelConfig, *, seed: int | None = None) -> LlavaForConditionalGeneration:
    """The model with random float32 weights: torch's own, or, for comparisons, those that ours draws from `seed`.

    The highest token of the vocabulary is its placeholder.
    """
    vocabulary = config.text.vocab_size
    tokens = SpecialTokens(image=vocabulary - 1, pad=0, bos=1, eos=2)
    fields = write_llava_hf_config(config, tokens, dtype="float32", vocab_size=vocabulary)
    with torch.device(DEVICE):
        model = LlavaForConditionalGeneration._from_config(
            LlavaConfig.from_dict(fields), attn_implementation="sdpa"
        )
    if seed is not None:
        _copy_parameters(model, config, seed)
    return model.float()


def _copy_parameters(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    drawn = random_parameters(config, seed, set(abstract_model(config)[1]))
    tensors = {}
    for row in model_rows(config):
        parts = np.asarray(drawn[row.leaf])
        parts = parts if row.stacked else [parts]
        tensors |= {name: row.to_theirs(part) for name, part in zip(row.tensors, parts, strict=True)}
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(canonical(name, "llava-hf"), None)
        if tensor is not None:  # CLIP's last layer and norm are not read
            parameter.data.copy_(torch.from_numpy(np.array(tensor)))
    assert not tensors, f"transformers has no {', '.join(tensors)}."


def batch_of(samples: dict[str, np.ndarray], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Samples (see `draw_samples`) as its arguments: a row for each, their pixels already normalised."""
    tokens = np.where(samples["tokens"] == IMAGE_TOKEN, config.text.vocab_size - 1, samples["tokens"])
    pixels = np.asarray(normalize(samples["images"], config.vision)).transpose(0, 3, 1, 2)
    batch = {"input_ids": tokens.astype(np.int64), "pixel_values": pixels}
    if "labels" in samples:
        batch["labels"] = samples["labels"].astype(np.int64)
    return {name: torch.from_numpy(np.array(x)).to(DEVICE) for name, x in batch.items()}


def prepare(model: LlavaForConditionalGeneration, case: Case, weights: torch.dtype) -> torch.nn.Module:
    """The model as its users train it: parts frozen and kept in the compute dtype, checkpoints in every layer."""
    if case.form == "lora":
        from peft import LoraConfig, get_peft_model

        lora = case.lora
        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        adapters = LoraConfig(
            r=lora.rank, lora_alpha=lora.effective_alpha, lora_dropout=lora.dropout, target_modules=targets
        )
        model = get_peft_model(model, adapters)
    for name, parameter in model.named_parameters():
        in_decoder = "language_model" in name or "lm_head" in name
        trains = {"stage1": False, "stage2": in_decoder, "lora": "lora_" in name}[case.form]
        parameter.requires_grad_(trains or "multi_modal_projector" in name)
        parameter.data = parameter.data.to(weights if parameter.requires_grad else getattr(torch, case.dtype))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def measure(case: Case, weights: str) -> None:
    """Tells the versions and a row of a step with trained weights of that dtype; float32 ones run under autocast."""
    import transformers

    require_accelerator(case.size, DEVICE)
    tell(conditions=torch_conditions() | {"transformers": transformers.__version__})
    seed = case.config.seed if case.size == "tiny" else None
    model = prepare(make_model(case.model, seed=seed), case, getattr(torch, weights))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = case.config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0, fused=DEVICE == "cuda")
    batch = batch_of(draw_samples(case), case.model)
    compute = getattr(torch, case.dtype)
    batch["pixel_values"] = batch["pixel_values"].to(compute)
    losses = []
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        mixed = compute != torch.float32 and weights == "float32"
        with torch.autocast(DEVICE, compute, enabled=mixed):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    for _ in range(WARM_UP):
        step()
    _wait()
    began = time.monotonic()
    for _ in range(case.steps):
        step()
    _wait()
    row = rated(case, (time.monotonic() - began) / case.steps)
    if DEVICE == "cuda":
        row["device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    tell(
        implementation=f"transformers, {weights} weights",
        losses=[loss.item() for loss in losses],
        **row,
    )


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("weights", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    measure(arguments.case, arguments.weights)


if __name__ == "__main__":
    main()
