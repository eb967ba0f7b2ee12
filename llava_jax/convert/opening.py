"""Opens any model directory or file; what it is follows from its content, never from its name."""

import dataclasses
from pathlib import Path

from llava_jax.config import ConfigError, ModelConfig
from llava_jax.convert import layouts, ours
from llava_jax.convert.component_configs import read_vision_config
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.names import PROJECTOR, projector_rows
from llava_jax.convert.source import ModelSource
from llava_jax.convert.tensors import TensorFiles


def open_model(path, *, vision_tower="") -> ModelSource:
    """Opens a whole model, a CLIP tower, a decoder, or a file of projector weights. Reads headers only.

    `vision_tower`: a CLIP directory for an original LLaVA that holds no tower and names none that is here.
    A tower inside the checkpoint wins over it. Raises ConversionError.
    """
    path = _existing(path)
    if ours.is_ours(path):
        return ours.open_ours(path)
    files, fields = TensorFiles(path), layouts.config_fields(path)
    layout = layouts.detect_layout(files, fields)
    if layout == "llava":
        return layouts.open_llava(path, files, fields, vision_tower)
    if layout == "llava-hf":
        return layouts.open_llava_hf(path, files, fields)
    if layout == "clip":
        return layouts.open_clip(path, files, fields)
    if layout == "llama":
        return layouts.open_llama(path, files, fields)
    return layouts.open_projector(path, files)


def open_projector(path) -> ModelSource:
    """Opens only the projector of a file, a directory or a whole model; the rest need not be complete."""
    path = _existing(path)
    if not ours.is_ours(path):
        return layouts.open_projector(path, TensorFiles(path))
    leaves = ours.open_ours(path).leaves
    return ModelSource(
        "projector", None, {name: leaf for name, leaf in leaves.items() if name.startswith(PROJECTOR)}
    )


def open_parts(model: ModelConfig, *, vision_tower="", language_model="", projector="") -> ModelSource:
    """Puts a model together from component directories, each optional.

    The result has layout "parts", the leaves of the components given, and as config `model` with their own
    configs put in. Raises ConversionError where a component is none, or where they do not fit together.
    """
    leaves, idle, tokenizer_path = {}, {}, ""
    if language_model:
        decoder = open_model(language_model)
        _expect(decoder, "llama", language_model, "a decoder")
        model = _replace(model, text=decoder.config)
        leaves |= decoder.leaves
        tokenizer_path = decoder.tokenizer_path
    if vision_tower:
        path = _existing(vision_tower)
        files, fields = TensorFiles(path), layouts.config_fields(path)
        if layouts.detect_layout(files, fields) == "clip":
            model = _replace(model, vision=read_vision_config(fields, str(path / "config.json")))
        clip = layouts.open_clip(path, files, fields, model.num_vision_layers_run)
        leaves |= clip.leaves
        idle |= clip.idle
    if projector:
        connector = open_projector(projector)
        _expect_projector(connector, model, projector)
        leaves |= connector.leaves
    return ModelSource("parts", model, leaves, idle, tokenizer_path)
