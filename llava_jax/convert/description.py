"""What a model is, as text, from headers alone."""

import dataclasses
import math

from llava_jax.config import ModelConfig
from llava_jax.convert.source import ModelSource


def describe(source: ModelSource) -> str:
    """Layout, config, every leaf's shape and dtype, and parameter counts per module. Reads no weights."""
    lines = [f"layout: {source.layout}"]
    if isinstance(source.config, ModelConfig):
        lines += [
            f"template: {source.template}",
            f"image_aspect_ratio: {source.image_aspect_ratio}",
            f"tokenizer: {source.tokenizer_path or 'none'}",
        ]
    lines += _config_lines(source.config)
    width = max((len(name) for name in source.names()), default=0)
    for name in source.names():
        lines.append(f"{name:{width}}  {source.dtype(name).name:8}  {list(source.shape(name))}")
    counts = {}
    for name in source.names():
        module = name.split(".")[0]
        counts[module] = counts.get(module, 0) + math.prod(source.shape(name))
    lines += [f"{module}: {count:,} parameters" for module, count in counts.items()]
    lines.append(f"total: {sum(counts.values()):,} parameters")
    if source.idle:
        count = sum(math.prod(leaf.shape) for leaf in source.idle.values())
        lines.append(f"set aside: {count:,} parameters in {len(source.idle)} tensors that are not run")
    return "\n".join(lines)


def _config_lines(config, prefix: str = "") -> list[str]:
    if config is None:
        return []
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines += _config_lines(value, f"{prefix}{field.name}.")
        else:
            lines.append(f"{prefix}{field.name}: {value}")
    return lines
