"""Writes a projector alone, as the original saves it after its first stage."""

import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llava_jax.config import ModelConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.model_configs import ORIGINAL_TOKENS, write_llava_config
from llava_jax.convert.names import PROJECTOR, projector_rows, spell
from llava_jax.convert.new_directory import new_directory
from llava_jax.convert.source import ModelSource

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def write_projector(destination, source: ModelSource, *, dtype: str | None = None) -> None:
    """Writes `*.safetensors`, `*.bin` (torch's format), or a directory with mm_projector.bin and config.json.

    Tensors are named as the original names them (`model.mm_projector.0.weight`); with <im_start> and <im_end> the
    embedding is one of them. The directory is what the
    original loads beside a base model (its --model-base). `dtype` None keeps each tensor's own. Raises
    ConversionError if `source` has no projector or the destination exists.
    """
    destination = Path(destination)
    tensors = _tensors(source, dtype)
    if destination.suffix not in (".safetensors", ".bin"):
        fields = _config(source, tensors)
        with new_directory(destination) as partial:
            write_torch(partial / "mm_projector.bin", tensors)
            (partial / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        return
    if destination.exists():
        raise ConversionError(f"{destination} exists; remove it or choose another name.")
    partial = destination.with_name(destination.name + ".incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if destination.suffix == ".bin":
        write_torch(partial, tensors)
    else:
        save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, destination)


def _tensors(source: ModelSource, dtype: str | None) -> dict[str, np.ndarray]:
    kernels = [name for name in source.names() if name.startswith(PROJECTOR) and name.endswith(".kernel")]
    if not kernels:
        raise ConversionError(f"A model of layout {source.layout} has no projector that could be written.")
    vision_width, text_width = source.shape(f"{PROJECTOR}linear_1.kernel")
    known = source.config.projector_type if isinstance(source.config, ModelConfig) else None
    kind = known or ("linear" if len(kernels) == 1 else f"mlp{len(kernels)}x_gelu")
    tensors = {}
    for row in projector_rows(vision_width, text_width, len(kernels)):
        array = source.read(row.leaf)
        tensor = np.ascontiguousarray(row.to_theirs(array.astype(dtype or array.dtype)))
        tensors[spell(row.tensors[0], "projector", kind)] = tensor
    if isinstance(source.config, ModelConfig) and source.config.use_im_start_end:
        # Trained with the projector; the original takes those of its two tokens (initialize_vision_tokenizer).
        embedding = source.read("language_model.embed_tokens.embedding")
        tensors["model.embed_tokens.weight"] = embedding.astype(dtype or embedding.dtype)
    return tensors


def _config(source: ModelSource, tensors: dict[str, np.ndarray]) -> dict:
    if not isinstance(source.config, ModelConfig):
        raise ConversionError(
            "The config.json beside a projector describes the whole model, but the source is a projector only; "
            "write to a file that ends with .safetensors or .bin instead."
        )
    (dtype, *_) = {tensor.dtype.name for tensor in tensors.values()}
    return write_llava_config(source.config, ORIGINAL_TOKENS, dtype=dtype) | {
        "tune_mm_mlp_adapter": True,
        "unfreeze_mm_vision_tower": False,
        "image_aspect_ratio": source.image_aspect_ratio,
        "conversation_template": source.template,
    }


def write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A zip as torch.save writes it: a pickle that names one storage per tensor, and the storages' bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", _pickle(tensors))
        file.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors.values()):
            file.writestr(f"archive/data/{number}", tensor.tobytes())
        file.writestr("archive/version", "3\n")


def _pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """{name: tensor} as a program of pickle's opcodes, which `pickletools.dis` shows."""
    program = b"\x80\x02}("  # protocol 2, an empty dict, the mark of its items
    for number, (name, tensor) in enumerate(tensors.items()):
        storage = f"ctorch\n{_STORAGES[tensor.dtype.name]}\n".encode()
        strides = [stride // tensor.itemsize for stride in tensor.strides]
        program += _string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        program += b"(" + _string("storage") + storage + _string(str(number)) + _string("cpu")
        program += (
            _integer(tensor.size) + b"tQ" + _integer(0)
        )  # the storage's persistent id; the offset in it
        program += _integers(tensor.shape) + _integers(strides)
        program += b"\x89ccollections\nOrderedDict\n)RtR"  # no gradient, no hooks; the call
    return program + b"u."


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _integers(values) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
