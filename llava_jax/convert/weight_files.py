"""Which files of a directory hold a model's weights: one file, or the shards that an index lists."""

from pathlib import Path

from llava_jax.convert.errors import ConversionError, listing
from llava_jax.convert.json_files import read_json

# In the order in which they are looked for; a directory may hold the same weights in both formats.
_NAMES = ("model.safetensors", "pytorch_model.bin")
# Pickles that trainers put beside the weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def weight_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files, and the names of the tensors that they must hold between them as far as an index says.

    `path` is a file, or a directory with, in this order: model.safetensors or its index, pytorch_model.bin
    or its index, a single .safetensors file, a single .bin file. Raises ConversionError.

    An index may name files in its own directory only. These may be links to anywhere, since the Hugging Face
    cache is made of links and an index cannot create one.
    """
    if not path.is_dir():
        return [_file(path)], []
    for name in _NAMES:
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [_file(path / name)], []
        if index.exists():
            weight_map = _weight_map(index)
            return [_shard(index, shard) for shard in sorted(set(weight_map.values()))], list(weight_map)
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(file for file in path.glob(pattern) if file.name not in _NO_WEIGHTS)
        if len(found) > 1:
            raise ConversionError(
                f"{path} holds {len(found)} {pattern[1:]} files ({listing(file.name for file in found)}) but no index "
                f"that says which belong together; add {_NAMES[pattern == '*.bin']}.index.json or name one file."
            )
        if found:
            return [_file(found[0])], []
    raise ConversionError(
        f"{path} holds no .safetensors or .bin file and no llava_jax model; is it the right directory? Of a run of ours "
        "give the run directory, not a checkpoint in it."
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map; fetch or write it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ConversionError(
                f"{index} points outside its directory for {name}, to {shard!r}; such an index is not followed."
            )
    return weight_map


def _shard(index: Path, name: str) -> Path:
    shard = index.parent / name
    if not shard.exists():
        raise ConversionError(f"{index} lists the shard {name}, which is not there; fetch or write it again.")
    return _file(shard)


def _file(path: Path) -> Path:
    """`path` if it is a regular file; opening a pipe or a device would hang or read without end."""
    if not path.is_file():
        raise ConversionError(f"{path} should be a file of tensors but is none; fetch or write it again.")
    return path
