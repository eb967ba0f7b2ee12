"""Our own model directory: config.json, orbax weights, the tensors set aside, the tokenizer."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llava_jax.config import ConfigError, ModelConfig, from_json, to_json
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.names import model_rows
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.convert.tensors import TensorFiles, read_json
from llava_jax.convert.tokenizer_files import copy_tokenizer, find_tokenizer

_FORMAT, _VERSION = "llava_jax", 1
# Arrays are stored in pieces of about this size, so that a part of a big one can be read alone.
_CHUNK_BYTES = 128 * 2**20


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
    expected = {row.leaf: row.shape for row in model_rows(model)}
    if {name: shape for name, (shape, _) in stored.items()} != expected:
        wrong = [
            name for name in expected | stored if name not in stored or stored[name][0] != expected.get(name)
        ]
        raise ConversionError(
            f"{file}: weights and model disagree ({listing(wrong)}); convert the model again."
        )
    if not (path / "weights").is_dir():
        raise ConversionError(f"{path} has a config.json but no weights directory; convert the model again.")
    leaves = {
        name: Leaf(shape, dtype, lambda name=name: _restore(path / "weights", name))
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


def write_model(directory, source: ModelSource) -> None:
    """Writes `source`, a whole model from anywhere, as our own model directory. Holds one leaf at a time.

    Raises ConversionError if `source` lacks leaves or `directory` exists and is not empty.
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
        weights = _save(partial / "weights", {name: lambda name=name: source.read(name) for name in names})
        set_aside = source.set_aside()
        if set_aside:
            save_file(set_aside, partial / "set_aside.safetensors")
        copy_tokenizer(source.tokenizer_path, partial)
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": to_json(source.config),
            "template": source.template,
            "image_aspect_ratio": source.image_aspect_ratio,
            "weights": weights,
        }
        (partial / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Stands for an array in the tree that orbax is given."""

    read: Callable[[], np.ndarray]


def _save(directory: Path, readers: dict[str, Callable[[], np.ndarray]]) -> dict[str, list]:
    """Saves {name: array} as an orbax PyTree checkpoint, one after the other -> {name: [shape, dtype]}."""
    import jax  # these two are slow to import, and only needed here
    import orbax.checkpoint as ocp

    written = {}

    class UnreadHandler(ocp.type_handlers.NumpyHandler):
        """Saves an _Unread as the numpy array it stands for; restoring needs nothing special."""

        async def serialize(self, values, infos, args=None):
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                array = value.read()
                written[info.name] = [list(array.shape), array.dtype.name]
                for done in await super().serialize([array], [info], [arg]):
                    done.result()
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Unread, UnreadHandler(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    tree = {name: _Unread(read) for name, read in readers.items()}
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tree}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))
    return {name: written[name] for name in tree}


def _restore(directory: Path, name: str) -> np.ndarray:
    """One array of what `_save` wrote."""
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(
        item={name: 0}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(directory.absolute(), args=args)[name]
    except (ValueError, OSError, KeyError) as error:
        raise ConversionError(
            f"{directory}: {name} cannot be read ({error}); convert the model again."
        ) from error
