"""Our own model directory: config.json, orbax weights, the tensors set aside, the tokenizer."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llava_jax.config import ConfigError, ModelConfig
from llava_jax.config_values import from_json, to_json
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.json_files import read_json
from llava_jax.convert.matching import reading_axis
from llava_jax.convert.names import model_rows
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.orbax_weights import StoredArrays, save
from llava_jax.convert.progress import Progress, silent
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.convert.tensors import TensorFiles
from llava_jax.convert.tokenizer_files import copy_tokenizer, find_tokenizer

_FORMAT, _VERSION = "llava_jax", 1


def is_ours(path: Path) -> bool:
    """Whether `path` is a directory that `write_model` wrote."""
    file = path / "config.json"
    return path.is_dir() and file.exists() and read_json(file).get("format") == _FORMAT


def open_ours(path: Path) -> ModelSource:
    """A directory that `write_model` wrote. Raises ConversionError if it is incomplete or too new."""
    file = path / "config.json"
    fields = read_json(file)
    if fields.get("version") != _VERSION:
        raise ConversionError(
            f"{file}: version {fields.get('version')!r} of the format, but this program "
            f"reads {_VERSION}; update it."
        )
    try:
        model = from_json(ModelConfig, fields["model"])
        stored = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in fields["weights"].items()}
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{file} is damaged ({error}); convert the model again.") from error
    rows = {row.leaf: row for row in model_rows(model)}
    expected = {name: row.shape for name, row in rows.items()}
    if {name: shape for name, (shape, _) in stored.items()} != expected:
        wrong = [
            name for name in expected | stored if name not in stored or stored[name][0] != expected.get(name)
        ]
        raise ConversionError(
            f"{file}: weights and model disagree ({listing(wrong)}); convert the model again."
        )
    if not (path / "weights").is_dir():
        raise ConversionError(f"{path} has a config.json but no weights directory; convert the model again.")
    arrays = StoredArrays(path / "weights")
    leaves = {
        name: Leaf(shape, dtype, functools.partial(arrays.read, name), reading_axis(rows[name]))
        for name, (shape, dtype) in stored.items()
    }
    idle = {}
    if (path / "set_aside.safetensors").exists():
        files = TensorFiles(path / "set_aside.safetensors")
        idle = {
            name: Leaf(files.shape(name), files.dtype(name), lambda name=name: files.read(name))
            for name in files.names()
        }
    return ModelSource(
        "ours", model, leaves, idle, find_tokenizer(path), fields["template"], fields["image_aspect_ratio"]
    )


def write_model(directory, source: ModelSource, *, progress: Progress = silent) -> None:
    """Writes `source`, a whole model from anywhere, as our own model directory, a few layers at a time.

    `progress` is told of every part of a leaf that has been read. Raises ConversionError if `source` lacks
    leaves or `directory` exists and is not empty.
    """
    if not isinstance(source.config, ModelConfig):
        raise ConversionError(
            f"Only a whole model can be written, but this is one of layout {source.layout}."
        )
    names = [row.leaf for row in model_rows(source.config)]
    missing = sorted(set(names) - set(source.names()))
    if missing:
        raise ConversionError(f"The model lacks {len(missing)} arrays ({listing(missing)}).")
    with new_directory(directory) as partial:
        save(partial / "weights", {name: source.leaves[name] for name in names}, progress)
        set_aside = source.set_aside()
        if set_aside:
            save_file(set_aside, partial / "set_aside.safetensors")
        copy_tokenizer(source.tokenizer_path, partial, source.config.extra_tokens)
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": to_json(source.config),
            "template": source.template,
            "image_aspect_ratio": source.image_aspect_ratio,
            "weights": {name: [list(source.shape(name)), source.dtype(name).name] for name in names},
        }
        (partial / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
