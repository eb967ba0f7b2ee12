"""Opens LoRA adapters as PEFT writes them, with what the original trained beside them."""

import dataclasses
import re
from pathlib import Path

from llava_jax.convert.adapter_names import AdapterTensor, adapter_layout, parse
from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.json_files import read_json
from llava_jax.convert.names import is_ignorable
from llava_jax.convert.tensors import TensorFiles

# What of an adapter_config.json changes how it is merged (see `_read_settings`), and what only matters for training.
# `fan_in_fan_out` means nothing for the layers of our models; PEFT sets it back for them (peft/tuners/lora/layer.py).
_MERGING = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}
_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# The others change the base's weights too, and the adapter belongs to the changed ones.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of one tensor, scale * (B @ A), or its transpose for an embedding."""

    files: TensorFiles
    a: str  # [r, in]
    b: str  # [out, r]
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the change."""
        shape = (self.files.shape(self.b)[0], self.files.shape(self.a)[1])
        return shape[::-1] if self.transposed else shape


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter directory does to a model's tensors, by canonical name.

    `replaced` maps a tensor to the file and the name of the one that takes its place.
    """

    path: Path
    layout: str  # of the model that was wrapped
    base: str  # base_model_name_or_path
    low_rank: dict[str, LowRank]
    replaced: dict[str, tuple[TensorFiles, str]]


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory that holds an adapter."""
    return (path / "adapter_config.json").is_file()


def open_adapter(path) -> Adapter:
    """Reads headers only. Raises ConversionError for adapters of other kinds than LoRA, and incomplete ones."""
    path = Path(path)
    if not is_adapter(path):
        raise ConversionError(f"{path} holds no adapter_config.json; it is no PEFT adapter.")
    settings = read_json(path / "adapter_config.json")
    _check_settings(settings, path / "adapter_config.json")
    files = [_file(path, "adapter_model"), _file(path, "non_lora_trainables")]
    if files[0] is None:
        raise ConversionError(
            f"{path} holds an adapter_config.json but no adapter_model.safetensors or .bin; fetch it again."
        )
    files = [TensorFiles(file) for file in files if file]
    layout = adapter_layout([name for some in files for name in some.names()])
    factors, replaced, strange = {}, {}, []
    for some in files:
        for name in some.names():
            found = parse(name, layout)
            if is_ignorable(name, layout):
                continue
            if found is None:
                strange.append(name)
            elif found.side:
                factors.setdefault(found.tensor, {})[found.side] = (some, name, found)
            else:
                replaced[found.tensor] = (some, name)
    if strange:
        raise ConversionError(
            f"{path} holds {len(strange)} tensors that are no part of a LoRA adapter ({listing(strange)}); adapters of "
            "other kinds are not merged."
        )
    low_rank = {tensor: _low_rank(path, sides, settings) for tensor, sides in factors.items()}
    if not low_rank:
        raise ConversionError(f"{path} holds no LoRA tensors (named like ...q_proj.lora_A.weight).")
    return Adapter(path, layout, settings.get("base_model_name_or_path") or "", low_rank, replaced)


def _file(path: Path, stem: str) -> Path | None:
    files = [path / f"{stem}{suffix}" for suffix in (".safetensors", ".bin")]
    return next((file for file in files if file.exists()), None)


def _check_settings(settings: dict, file: Path) -> None:
    if settings.get("peft_type", "LORA") != "LORA":
        raise ConversionError(
            f"{file}: peft_type={settings['peft_type']!r} is not merged, only 'LORA'; merge it with PEFT first."
        )
    other = sorted(key for key, value in settings.items() if value and key not in _MERGING | _TRAINING)
    if other:
        raise ConversionError(
            f"{file}: {', '.join(f'{key}={settings[key]!r}' for key in other)}: plain LoRA has no such setting, and "
            "what it does to the weights is not built here; merge the adapter with PEFT first."
        )
    init = settings.get("init_lora_weights", True)
    if init not in _INITS:
        raise ConversionError(
            f"{file}: init_lora_weights={init!r} also changed the base's weights in training, so the adapter does not "
            "fit the base as it was published; save it with PEFT's path_initial_model_for_weight_conversion first."
        )


def _low_rank(
    path: Path, sides: dict[str, tuple[TensorFiles, str, AdapterTensor]], settings: dict
) -> LowRank:
    if sides.keys() != {"A", "B"}:
        ((_, name, _),) = sides.values()
        raise ConversionError(f"{path} holds {name} without its other half; fetch the adapter again.")
    (files, a, found), (_, b, _) = sides["A"], sides["B"]
    for name in (a, b):
        shape = files.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise ConversionError(
                f"{path}: {name} has shape {list(shape)} instead of two sizes. Convolutions are not merged; an empty "
                "tensor was saved by DeepSpeed ZeRO-3 before its pieces were gathered, and holds nothing."
            )
    rank = _pattern(settings, "rank_pattern", found.module, settings.get("r"))
    if files.shape(a)[0] != rank or files.shape(b)[1] != rank:
        raise ConversionError(
            f"{path}: {a} {list(files.shape(a))} and {b} {list(files.shape(b))} do not have the rank {rank} that "
            "adapter_config.json says; the files do not belong together."
        )
    alpha = _pattern(settings, "alpha_pattern", found.module, settings.get("lora_alpha"))
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return LowRank(files, a, b, scale, found.of_embedding)


def _pattern(settings: dict, key: str, module: str, default):
    """The value of the first pattern that fits a module's whole name or its end (peft/utils/other.py)."""
    for pattern, value in (settings.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    if default is None:
        raise ConversionError(
            "adapter_config.json says neither r nor lora_alpha for every layer; fetch it again."
        )
    return default
