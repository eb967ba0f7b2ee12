"""What each foreign layout is made of: whole models, vision towers, decoders, projectors, component directories."""

import dataclasses
import re
from pathlib import Path

from llava_jax.config import SIGLIP, VisionConfig
from llava_jax.convert.component_configs import read_text_config, read_vision_config, refuse
from llava_jax.convert.download import fetch
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.json_files import read_json
from llava_jax.convert.matching import Matching
from llava_jax.convert.model_configs import (
    PUBLISHED_TOWERS,
    read_llava_config,
    read_llava_hf_config,
    read_tinyllava_config,
)
from llava_jax.convert.names import (
    PROJECTOR,
    TOWERS,
    VISION,
    Row,
    canonical,
    has_head,
    idle_vision_rows,
    model_rows,
    projector_rows,
    text_rows,
    vision_rows,
)
from llava_jax.convert.reading import Part, Reading
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.tokenizer_files import find_tokenizer

# The folders in which TinyLLaVA Factory keeps the parts of a model apart.
COMPONENTS = ("language_model", "vision_tower", "connector")


def config_fields(path: Path) -> dict:
    """The config.json of a directory; empty for a single file or where there is none."""
    return read_json(path / "config.json") if (path / "config.json").exists() else {}


def has_components(path: Path) -> bool:
    """Whether `path` is a directory of component directories."""
    return all((path / name).is_dir() for name in COMPONENTS[:2])


def read_layout(path: Path, vision_tower="") -> Reading:
    """How a foreign directory or file is read. Opens headers only; raises ConversionError."""
    if has_components(path):
        return _components(path)
    files, fields = TensorFiles(path), config_fields(path)
    layout = detect_layout(files, fields)
    if layout == "llava":
        return _llava(path, files, fields, vision_tower)
    if layout == "projector":
        return read_projector(path, files)
    read = {"llava-hf": _llava_hf, "tinyllava": _tinyllava, "clip": read_tower, "siglip": read_tower}
    return read.get(layout, _llama)(path, files, fields)


def detect_layout(files: TensorFiles, fields: dict) -> str:
    """The layout of some tensors and their config.json: see `ModelSource`."""
    names = files.names()
    decoder = any(re.search(r"(^|\.)layers\.\d+\.self_attn\.o_proj\.weight$", name) for name in names)
    if not decoder:
        if any(canonical(name, "projector") for name in names):
            return "projector"
        if any(name.endswith("embeddings.patch_embedding.bias") for name in names):
            return "siglip"
        if any(name.endswith("embeddings.patch_embedding.weight") for name in names):
            return "clip"
        raise ConversionError(
            f"{files.path} holds no decoder, no CLIP or SigLIP tower and no projector under names that are known "
            f"(it begins with {', '.join(names[:3]) or 'no tensor at all'})."
        )
    if any("_vision_tower." in name or "_connector." in name for name in names):
        return "tinyllava"
    if any("multi_modal_projector." in name for name in names) or "text_config" in fields:
        return "llava-hf"
    if any("mm_projector." in name for name in names) or "mm_vision_tower" in fields:
        return "llava"
    return "llama"


def _llava_hf(path: Path, files: TensorFiles, fields: dict) -> Reading:
    """A LlavaForConditionalGeneration or LlavaNextForConditionalGeneration of any transformers version."""
    generation = path / "generation_config.json"
    model, file_vocabulary = read_llava_hf_config(
        fields, where(path, fields), read_json(generation) if generation.exists() else {}
    )
    matching = Matching(files, "llava-hf")
    part = Part(
        matching,
        model_rows(model),
        _idle_rows(matching, model.vision, model.num_vision_layers_run),
        tied=model.text.tie_word_embeddings,
        file_vocabulary=file_vocabulary,
    )
    default = "square" if model.vision.model_type == SIGLIP else "pad"
    default = "anyres" if model.image_grid_pinpoints else default
    return whole("llava-hf", path, fields, model, (part,), default_aspect_ratio=default)


def _llava(path: Path, files: TensorFiles, fields: dict, vision_tower) -> Reading:
    """An original LLaVA. Its tower may lie inside, in `vision_tower`, or where `mm_vision_tower` says."""
    matching = Matching(files, "llava")
    holds_tower = any(name.startswith(VISION) for name in matching.names())
    tower = tower_directory(path, fields, vision_tower)
    lacks = ""
    if not holds_tower and tower is None:
        lacks = _without_tower(path, fields)
        if fields.get("mm_vision_tower") not in PUBLISHED_TOWERS and "vision_config" not in fields:
            raise ConversionError(lacks)
    vision = _tower_config(fields, tower, where(path, fields))
    model = read_llava_config(fields, vision, where(path, fields))
    rows, tied = model_rows(model), model.text.tie_word_embeddings
    if holds_tower:
        idle_rows = _idle_rows(matching, vision, model.num_vision_layers_run)
        parts = (Part(matching, rows, idle_rows, tied=tied),)
    else:
        parts = (Part(matching, [row for row in rows if not row.leaf.startswith(VISION)], tied=tied),)
    if not holds_tower and tower is not None:
        alone = read_tower(tower, TensorFiles(tower), config_fields(tower), model.num_vision_layers_run)
        parts = (*alone.parts, *parts)
    reading = whole("llava", path, fields, model, parts, default_aspect_ratio="square")
    return dataclasses.replace(reading, lacks=lacks)


def _tinyllava(path: Path, files: TensorFiles, fields: dict) -> Reading:
    """A TinyLlavaForConditionalGeneration saved whole."""
    missing = [key for key in ("text_config", "vision_config") if key not in fields]
    if missing:
        raise ConversionError(f"{where(path, fields)} has no {' and no '.join(missing)}; fetch it again.")
    model = read_tinyllava_config(fields, fields["text_config"], fields["vision_config"], where(path, fields))
    matching = Matching(files, "tinyllava")
    part = Part(
        matching,
        model_rows(model),
        _idle_rows(matching, model.vision, model.num_vision_layers_run),
        tied=model.text.tie_word_embeddings,
    )
    return whole("tinyllava", path, fields, model, (part,), default_aspect_ratio="square")


def _components(path: Path) -> Reading:
    """A model whose decoder, tower and connector lie in directories of their own, with a config.json beside."""
    fields = config_fields(path)
    decoder, tower, connector = (path / name for name in COMPONENTS)
    text = config_fields(decoder) or fields.get("text_config") or {}
    vision = config_fields(tower) or fields.get("vision_config") or {}
    model = read_tinyllava_config(fields, text, vision, where(path, fields))
    alone = read_tower(tower, TensorFiles(tower), vision, model.num_vision_layers_run)
    parts = [
        *alone.parts,
        Part(
            Matching(TensorFiles(decoder), "llama"),
            text_rows(model.text),
            tied=model.text.tie_word_embeddings,
        ),
    ]
    if model.projector_depth:
        rows = projector_rows(model.vision.hidden_size, model.text.hidden_size, model.projector_depth)
        parts.append(Part(Matching(TensorFiles(connector), "projector"), rows))
    return whole("components", path, fields, model, tuple(parts), default_aspect_ratio="square")


def read_tower(path: Path, files: TensorFiles, fields: dict, num_layers: int | None = None) -> Reading:
    """A CLIPModel, a SiglipModel or the vision half of one; its first `num_layers` layers (default: all) become leaves."""
    config = read_vision_config(fields, where(path, fields))
    num_layers = config.num_hidden_layers if num_layers is None else num_layers
    layout = TOWERS[config.model_type]
    matching = Matching(files, layout)
    rows, idle_rows = vision_rows(config, num_layers), _idle_rows(matching, config, num_layers)
    return Reading(layout, config, (Part(matching, rows, idle_rows),))


def _idle_rows(matching: Matching, config: VisionConfig, num_layers: int) -> list[Row]:
    """The rows of a tower's tensors above its first `num_layers` layers, with SigLIP's head where the files hold one."""
    head = config.model_type == SIGLIP and has_head(matching.names())
    return idle_vision_rows(config, num_layers, head=head)


def _llama(path: Path, files: TensorFiles, fields: dict) -> Reading:
    """A LlamaForCausalLM, or a Mistral or Qwen2, whose tensors have the same names."""
    config = read_text_config(fields, where(path, fields))
    part = Part(Matching(files, "llama"), text_rows(config), tied=config.tie_word_embeddings)
    return Reading("llama", config, (part,), find_tokenizer(path))


def read_projector(path: Path, files: TensorFiles) -> Reading:
    """The projector among some tensors; its sizes are those of the tensors."""
    matching = Matching(files, "projector", only=PROJECTOR)
    depth = sum(name.endswith(".weight") for name in matching.names())
    first = f"{PROJECTOR}linear_1.weight"
    if first not in matching.names() or len(matching.shape(first)) != 2:
        raise ConversionError(f"{path} holds no projector (no tensor named like mm_projector.0.weight).")
    text_width, vision_width = matching.shape(first)
    part = Part(matching, projector_rows(vision_width, text_width, depth))
    return Reading("projector", None, (part,))


def where(path: Path, fields: dict) -> str:
    """The config.json of a directory, for messages. Raises ConversionError if there is none."""
    if not fields:
        raise ConversionError(f"{path} has no config.json, which says what its tensors mean; add it.")
    return str(path / "config.json")


def whole(layout, path, fields, model, parts, *, default_aspect_ratio) -> Reading:
    """A whole LLaVA, with what the config.json in `path` says of its use."""
    aspect_ratio = fields.get("image_aspect_ratio") or default_aspect_ratio
    if aspect_ratio not in ("pad", "square", "anyres"):
        refuse(str(path / "config.json"), "image_aspect_ratio", aspect_ratio, "it is pad, square or anyres")
    template = fields.get("conversation_template", "v1")
    return Reading(layout, model, parts, find_tokenizer(path), template, aspect_ratio)


def tower_directory(path: Path, fields: dict, vision_tower) -> Path | None:
    """The given directory or repository; else what mm_vision_tower names, inside `path` or beside it if not absolute."""
    if vision_tower:
        return fetch(vision_tower)
    name = fields.get("mm_vision_tower") or fields.get("vision_tower") or ""
    folders = [path / name, path.parent / name, path / Path(name).name, path.parent / Path(name).name]
    return next((folder for folder in folders if name and (folder / "config.json").exists()), None)


def fetched_tower(path: Path, fields: dict) -> Path:
    """The published CLIP that a model without a tower names, from the hub; raises ConversionError if it names another."""
    name = fields.get("mm_vision_tower")
    if name not in PUBLISHED_TOWERS:
        raise ConversionError(_without_tower(path, fields))
    try:
        return fetch(name)
    except ConversionError as error:
        raise ConversionError(f"{_without_tower(path, fields)} Fetching it failed: {error}") from error


def _without_tower(path: Path, fields: dict) -> str:
    name = fields.get("mm_vision_tower")
    beside = (
        f"Put the CLIP directory at {path.absolute().parent / Path(name).name}, or convert"
        if name
        else "Convert"
    )
    return (
        f"{path} holds no CLIP tower, and mm_vision_tower={name!r} in its config.json is no directory here. {beside} with "
        f"the tower named: tools/convert_weights.py from-hf --vision-tower=DIR {path} DST."
    )


def _tower_config(fields: dict, tower: Path | None, file: str) -> VisionConfig:
    if "vision_config" in fields:
        return read_vision_config(fields, file)
    if tower is not None:
        return read_vision_config(config_fields(tower), where(tower, config_fields(tower)))
    name = fields.get("mm_vision_tower")
    if name in PUBLISHED_TOWERS:
        return PUBLISHED_TOWERS[name]
    raise ConversionError(
        f"{file} names the tower {name!r}, whose config is unknown; convert with its directory named: "
        f"tools/convert_weights.py from-hf --vision-tower=DIR {Path(file).parent} DST."
    )
