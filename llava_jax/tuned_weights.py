"""A model's parameters in the form in which a stage trains them, and back again in the model's own."""

import dataclasses
import re
import zlib

import numpy as np

from llava_jax.config import Config
from llava_jax.convert.source import Index, Leaf, ModelSource, completed
from llava_jax.step import abstract_tuned_model
from llava_jax.tuning import LORA_A, LORA_B, MODULES, layer_spans, span_name


def tuned(weights: ModelSource, config: Config) -> ModelSource:
    """`weights` as the stage of this config starts from them: with new adapters, and with its stacks cut.

    Kernels that it keeps quantised are here as they were: `load` quantises them, and adapters are merged into these.
    """
    leaves = {}
    lora = dataclasses.replace(config.lora, quantization="none", double_quantization=True)
    for name, shape in abstract_tuned_model(dataclasses.replace(config, lora=lora))[1].items():
        if name in weights.leaves:
            leaves[name] = weights.leaves[name]
        elif name.endswith((f".{LORA_A}", f".{LORA_B}")):
            leaves[name] = _new_adapter(name, shape.shape, config.seed)
        else:
            begin, end = map(int, name.split(".")[2].split(":"))
            leaves[name] = _layers(weights.leaves[own_name(name)], begin, end)
    return dataclasses.replace(weights, leaves=leaves)


def restored(weights: ModelSource, config: Config) -> ModelSource:
    """The inverse of `tuned`: adapters are merged into their kernels in float32, and stacks are whole."""
    leaves, spans = {}, layer_spans(config)
    for name, leaf in weights.leaves.items():
        prefix, kind = name.rpartition(".")[::2]
        a, b = (weights.leaves.get(f"{prefix}.{side}") for side in (LORA_A, LORA_B))
        module = MODULES[name.partition(".")[0]]
        if kind in (LORA_A, LORA_B):
            continue
        if kind == "kernel" and a is not None:
            leaves[name] = _merged(leaf, a, b, config.lora.scale)
        elif module in spans and name.split(".")[1] == "layers":
            whole = own_name(name)
            parts = [weights.leaves[_with_span(whole, span_name(span))] for span in spans[module]]
            leaves[whole] = _joined(parts)
        else:
            leaves[name] = leaf
    return dataclasses.replace(weights, leaves=leaves)


def _new_adapter(name: str, shape: tuple[int, ...], seed: int) -> Leaf:
    """A drawn as PEFT draws it, B zero, so that the adapted network starts as the base."""

    def read() -> np.ndarray:
        if name.endswith(LORA_B):
            return np.zeros(shape, np.float32)
        # torch's kaiming_uniform_ with a=sqrt(5), in LoraLayer.reset_lora_parameters.
        bound = shape[-2] ** -0.5
        generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
        return (2 * bound * generator.random(shape, np.float32) - bound).astype(np.float32)

    return Leaf(shape, np.dtype(np.float32), read)


def own_name(name: str) -> str:
    """The model's own name of what a parameter of the trained form is part of: "m.layers.28:32.q_proj.lora_a" ->
    "m.layers.q_proj.kernel"."""
    layer, _, kind = name.rpartition(".")
    if kind in (LORA_A, LORA_B):
        name = f"{layer}.kernel"
    return re.sub(r"\.layers\.\d+:\d+\.", ".layers.", name)


def _with_span(name: str, span: str) -> str:
    module, layers, rest = name.split(".", 2)
    return f"{module}.{layers}.{span}.{rest}"


def _layers(leaf: Leaf, begin: int, end: int) -> Leaf:
    """Some layers of a stacked leaf."""
    shape = (end - begin, *leaf.shape[1:])

    def read(index: Index = ()) -> np.ndarray:
        layers, *rest = completed(index, shape)
        return leaf.part((slice(begin + layers.start, begin + layers.stop), *rest))

    return Leaf(shape, leaf.dtype, read, axis=0)


def _joined(parts: list[Leaf]) -> Leaf:
    """Stacked leaves as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = np.result_type(*(part.dtype for part in parts))

    def read(index: Index = ()) -> np.ndarray:
        layers, *rest = completed(index, shape)
        found, begin = [], 0
        for part in parts:
            end = begin + part.shape[0]
            first, last = max(layers.start, begin), min(layers.stop, end)
            if first < last:
                found.append(part.part((slice(first - begin, last - begin), *rest)))
            begin = end
        return np.concatenate(found).astype(dtype, copy=False)

    return Leaf(shape, dtype, read, axis=0)


def _merged(kernel: Leaf, a: Leaf, b: Leaf, scale: float) -> Leaf:
    """kernel + scale * A B, computed and kept in float32."""

    def read(index: Index = ()) -> np.ndarray:
        index = completed(index, kernel.shape)
        *stacked, rows, columns = index
        every = slice(0, a.shape[-1])
        change = a.part((*stacked, rows, every)).astype(np.float32) @ b.part((*stacked, every, columns))
        return kernel.part(index).astype(np.float32) + np.float32(scale) * change

    return Leaf(kernel.shape, np.dtype(np.float32), read, kernel.axis)
