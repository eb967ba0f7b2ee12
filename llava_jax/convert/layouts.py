"""Opens each foreign layout: llava-hf and original LLaVA models, CLIP towers, decoders, projectors."""

import re
from pathlib import Path

from llava_jax.config import VisionConfig
from llava_jax.convert.component_configs import read_text_config, read_vision_config, refuse
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.matching import Matching
from llava_jax.convert.model_configs import PUBLISHED_TOWERS, read_llava_config, read_llava_hf_config
from llava_jax.convert.names import (
    PROJECTOR,
    VISION,
    canonical,
    idle_vision_rows,
    model_rows,
    projector_rows,
    text_rows,
    vision_rows,
)
from llava_jax.convert.source import ModelSource
from llava_jax.convert.tensors import TensorFiles, read_json
from llava_jax.convert.tokenizer_files import find_tokenizer


def config_fields(path: Path) -> dict:
    """The config.json of a directory; empty for a single file or where there is none."""
    return read_json(path / "config.json") if (path / "config.json").exists() else {}


def detect_layout(files: TensorFiles, fields: dict) -> str:
    """The layout of some tensors and their config.json: see `ModelSource`."""
    names = files.names()
    decoder = any(re.search(r"(^|\.)layers\.\d+\.self_attn\.o_proj\.weight$", name) for name in names)
    if not decoder:
        if any(canonical(name, "projector") for name in names):
            return "projector"
        if any(name.endswith("embeddings.patch_embedding.weight") for name in names):
            return "clip"
        raise ConversionError(
            f"{files.path} holds no decoder, no CLIP tower and no projector under names that are known "
            f"(it begins with {', '.join(names[:3]) or 'no tensor at all'})."
        )
    if any("multi_modal_projector." in name for name in names) or "text_config" in fields:
        return "llava-hf"
    if any("mm_projector." in name for name in names) or "mm_vision_tower" in fields:
        return "llava"
    return "llama"


def open_llava_hf(path: Path, files: TensorFiles, fields: dict) -> ModelSource:
    """A LlavaForConditionalGeneration or LlavaNextForConditionalGeneration of any transformers version."""
    where = _where(path, fields)
    generation = path / "generation_config.json"
    model, file_vocabulary = read_llava_hf_config(
        fields, where, read_json(generation) if generation.exists() else {}
    )
    matching = Matching(files, "llava-hf")
    if model.text.tie_word_embeddings:
        matching.drop_tied_head()
    idle_rows = idle_vision_rows(model.vision, model.num_vision_layers_run)
    leaves, idle = matching.leaves(model_rows(model), idle_rows, file_vocabulary=file_vocabulary)
    default = "anyres" if model.image_grid_pinpoints else "pad"
    return _whole("llava-hf", path, fields, model, leaves, idle, default_aspect_ratio=default)


def open_llava(path: Path, files: TensorFiles, fields: dict, vision_tower) -> ModelSource:
    """An original LLaVA. Its tower may lie inside, in `vision_tower`, or where `mm_vision_tower` says."""
    where = _where(path, fields)
    matching = Matching(files, "llava")
    holds_tower = any(name.startswith(VISION) for name in matching.names())
    tower = _tower_directory(path, fields, vision_tower)
    if not holds_tower and tower is None:
        raise ConversionError(
            f"{path} holds no CLIP tower, and mm_vision_tower={fields.get('mm_vision_tower')!r} in "
            "its config.json is no directory here; give one (--vision-tower=DIR)."
        )
    vision = _tower_config(fields, tower, where)
    model = read_llava_config(fields, vision, where)
    if model.text.tie_word_embeddings:
        matching.drop_tied_head()
    idle_rows = idle_vision_rows(vision, model.num_vision_layers_run)
    rows = model_rows(model)
    if holds_tower:
        leaves, idle = matching.leaves(rows, idle_rows)
    else:
        leaves, _ = matching.leaves(row for row in rows if not row.leaf.startswith(VISION))
        clip = open_clip(tower, TensorFiles(tower), config_fields(tower), model.num_vision_layers_run)
        leaves = clip.leaves | leaves
        idle = clip.idle
    return _whole("llava", path, fields, model, leaves, idle, default_aspect_ratio="square")


def open_clip(path: Path, files: TensorFiles, fields: dict, num_layers: int | None = None) -> ModelSource:
    """A CLIPModel or CLIPVisionModel, of which the first `num_layers` layers (default: all) become leaves."""
    config = read_vision_config(fields, _where(path, fields))
    num_layers = config.num_hidden_layers if num_layers is None else num_layers
    leaves, idle = Matching(files, "clip").leaves(
        vision_rows(config, num_layers), idle_vision_rows(config, num_layers)
    )
    return ModelSource("clip", config, leaves, idle)


def open_llama(path: Path, files: TensorFiles, fields: dict) -> ModelSource:
    """A LlamaForCausalLM, or a Mistral or Qwen2, whose tensors have the same names."""
    config = read_text_config(fields, _where(path, fields))
    matching = Matching(files, "llama")
    if config.tie_word_embeddings:
        matching.drop_tied_head()
    leaves, _ = matching.leaves(text_rows(config))
    return ModelSource("llama", config, leaves, tokenizer_path=find_tokenizer(path))


def open_projector(path: Path, files: TensorFiles) -> ModelSource:
    """The projector among some tensors; its sizes are those of the tensors."""
    matching = Matching(files, "projector", only=PROJECTOR)
    depth = sum(name.endswith(".weight") for name in matching.names())
    first = f"{PROJECTOR}linear_1.weight"
    if first not in matching.names() or len(matching.shape(first)) != 2:
        raise ConversionError(f"{path} holds no projector (no tensor named like mm_projector.0.weight).")
    text_width, vision_width = matching.shape(first)
    leaves, _ = matching.leaves(projector_rows(vision_width, text_width, depth))
    return ModelSource("projector", None, leaves)


def _where(path: Path, fields: dict) -> str:
    if not fields:
        raise ConversionError(f"{path} has no config.json, which says what its tensors mean; add it.")
    return str(path / "config.json")


def _whole(layout, path, fields, model, leaves, idle, *, default_aspect_ratio) -> ModelSource:
    aspect_ratio = fields.get("image_aspect_ratio") or default_aspect_ratio
    if aspect_ratio not in ("pad", "square", "anyres"):
        refuse(str(path / "config.json"), "image_aspect_ratio", aspect_ratio, "it is pad, square or anyres")
    template = fields.get("conversation_template", "v1")
    return ModelSource(layout, model, leaves, idle, find_tokenizer(path), template, aspect_ratio)


def _tower_directory(path: Path, fields: dict, vision_tower) -> Path | None:
    """The given directory; else what mm_vision_tower names, inside `path` or beside it if not absolute."""
    if vision_tower:
        if not Path(vision_tower).is_dir():
            raise ConversionError(f"--vision-tower={vision_tower} is no directory.")
        return Path(vision_tower)
    name = fields.get("mm_vision_tower") or fields.get("vision_tower") or ""
    folders = [path / name, path.parent / name, path / Path(name).name, path.parent / Path(name).name]
    return next((folder for folder in folders if name and (folder / "config.json").exists()), None)


def _tower_config(fields: dict, tower: Path | None, where: str) -> VisionConfig:
    if "vision_config" in fields:
        return read_vision_config(fields, where)
    if tower is not None:
        return read_vision_config(config_fields(tower), _where(tower, config_fields(tower)))
    name = fields.get("mm_vision_tower")
    if name in PUBLISHED_TOWERS:
        return PUBLISHED_TOWERS[name]
    raise ConversionError(
        f"{where} names the tower {name!r}, whose config is unknown; give its directory (--vision-tower=DIR)."
    )
