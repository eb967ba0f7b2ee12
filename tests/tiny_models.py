"""Models of a few thousand parameters in every layout, with other sizes on every axis."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from llava_jax.config import ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.export import write_hf
from llava_jax.convert.names import model_rows

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared/golden"
LLAMA_TOKENIZER = ROOT.parent / "shared/tokenizer/llama/tokenizer.model"

VISION = {
    "hidden_size": 16,
    "intermediate_size": 26,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DECODERS = {
    "gqa": LlamaConfig(**SIZES, head_dim=10, rope_theta=5000.0, rms_norm_eps=1e-5),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biased": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, bos_token_id=1, eos_token_id=2),
}


def randomized(model):
    """Every parameter drawn, norms and biases too, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model.eval()


def save_llava(directory: Path, decoder: str = "gqa", dtype=torch.float32, **changes) -> Path:
    fields = {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": DECODERS[decoder],
        "image_token_index": 90,
        "image_seq_length": 16,
    }
    model = LlavaForConditionalGeneration(LlavaConfig(**fields | changes))
    randomized(model).to(dtype).save_pretrained(directory)
    return directory


def copy_with(source: Path, destination: Path, change) -> Path:
    """A copy of a directory with one safetensors file whose tensors went through `change`."""
    shutil.copytree(source, destination)
    save_file(change(load_file(source / "model.safetensors")), destination / "model.safetensors")
    return destination


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_original(source: Path, destination: Path, *, tower: bool, **fields) -> Path:
    """What the original LLaVA would have saved, from a directory that transformers saved."""
    destination.mkdir()
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        name = name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        if name.startswith("vision_tower."):
            name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")
            if not tower:
                continue
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = tensor[:90].clone()
        renamed[name] = tensor
    save_file(renamed, destination / "model.safetensors")
    text = json.loads((source / "config.json").read_text())["text_config"]
    config = text | {
        "model_type": "llava_llama",
        "vocab_size": 90,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "clip",
        "image_aspect_ratio": "pad",
    }
    (destination / "config.json").write_text(json.dumps(config | fields))
    return destination


def save_clip(directory: Path, source: Path) -> Path:
    """The tower of a llava-hf directory as a CLIP directory of its own."""
    model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    tensors = load_file(source / "model.safetensors")
    prefix = "vision_tower."
    tower = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    model.load_state_dict(tower)
    model.save_pretrained(directory)
    return directory


def export(source, directory: Path, layout: str, **changes) -> Path:
    fields = {
        "model": source.config,
        "read": source.read,
        "set_aside": source.set_aside(),
        "tokenizer_path": source.tokenizer_path,
        "template": source.template,
        "image_aspect_ratio": source.image_aspect_ratio,
    }
    write_hf(directory, layout=layout, **fields | changes)
    return directory


def assert_same_leaves(first, second):
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert first.shape(name) == second.shape(name) and first.dtype(name) == second.dtype(name), name
        np.testing.assert_array_equal(first.read(name), second.read(name), err_msg=name)


def assert_same_tensors(first: Path, second: Path):
    a, b = load_numpy(first / "model.safetensors"), load_numpy(second / "model.safetensors")
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def random_source(**changes):
    """A small model that was never imported: leaves only, nothing set aside."""
    model = ModelConfig(
        vision=VisionConfig(**VISION),
        text=TextConfig(**SIZES | {"vocab_size": 90}, head_dim=10),
    )
    model = dataclasses.replace(model, **changes)
    generator = np.random.default_rng(0)
    return model, {row.leaf: generator.normal(size=row.shape).astype(np.float32) for row in model_rows(model)}
