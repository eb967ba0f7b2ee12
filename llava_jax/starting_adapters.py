"""Adapters that were there before a run: merged into what it starts from, or trained further."""

import dataclasses

import numpy as np

from llava_jax.config import Config, ConfigError, split_names
from llava_jax.convert.adapters import Adapter, LowRank, open_adapter
from llava_jax.convert.merging import merge
from llava_jax.convert.names import Row, model_rows
from llava_jax.convert.source import Leaf, ModelSource
from llava_jax.tuning import LORA_A, LORA_B, PREFIXES, lora_targets


def with_adapters(source: ModelSource, config: Config) -> ModelSource:
    """`source` with the adapters of `init.adapters`, one after another; nothing is read yet.

    All are merged, but for the last if the run trains it further: its pairs are then leaves of their own beside the
    kernels. Raises ConfigError if that one is not what the run's `lora` asks for, ConversionError if one does not fit.
    """
    merged, continued = split_adapters(config)
    for path in merged:
        source = merge(source, open_adapter(path))
    if continued:
        adapter = open_adapter(continued)
        source = merge(source, dataclasses.replace(adapter, low_rank={}))
        source = source.with_leaves(_pairs(adapter, config, model_rows(source.config)))
    return source


def split_adapters(config: Config) -> tuple[tuple[str, ...], str]:
    """The adapters of `init.adapters` that are merged, and the one that is trained further ("" for none)."""
    paths = split_names(config.init.adapters)
    if not paths or config.lora.create_new_adapter or not lora_targets(config):
        return paths, ""
    return paths[:-1], paths[-1]


def _pairs(adapter: Adapter, config: Config, rows: list[Row]) -> dict[str, Leaf]:
    """The adapter's A and B as a run of this config trains them."""
    targets = {PREFIXES[module]: names for module, names in lora_targets(config).items()}
    leaves, left = {}, dict(adapter.low_rank)
    for row in rows:
        *path, layer, kind = row.leaf.split(".")
        if kind != "kernel" or layer not in targets.get((*path, layer)[0], ()):
            continue
        changes = [left.pop(name, None) for name in row.tensors]
        _check_changes(adapter, row.leaf, changes, config)
        for name, side in ((LORA_A, "a"), (LORA_B, "b")):
            leaves[f"{row.leaf.removesuffix(kind)}{name}"] = _stacked(changes, side, row.stacked)
    if left:
        raise ConfigError(
            f"The adapter {adapter.path} changes {next(iter(left))} and {len(left) - 1} more, which lora.*target does not "
            "name; name their layers too, or set lora.create_new_adapter=True to merge it and train a new one."
        )
    return leaves


def _check_changes(adapter: Adapter, name: str, changes: list[LowRank | None], config: Config) -> None:
    wanted = (config.lora.rank, config.lora.scale)
    for change in changes:
        found = "nothing"
        if change is not None:
            rank = change.files.shape(change.a)[0]
            if (rank, change.scale) == wanted:
                continue
            found = f"rank {rank} and scale {change.scale:g}"
        raise ConfigError(
            f"The adapter {adapter.path} has {found} for {name}, but this run trains rank {wanted[0]} and scale "
            f"{wanted[1]:g}; change lora.rank, lora.alpha or lora.target to its, or set lora.create_new_adapter=True to "
            "merge it and train a new one."
        )


def _stacked(changes: list[LowRank], side: str, stacked: bool) -> Leaf:
    rows, columns = changes[0].files.shape(getattr(changes[0], side))
    shape = (len(changes), columns, rows) if stacked else (columns, rows)

    def read() -> np.ndarray:
        layers = [change.files.read(getattr(change, side)).T.astype(np.float32) for change in changes]
        return np.stack(layers) if stacked else layers[0]

    return Leaf(shape, np.dtype(np.float32), read)
