"""Frozen kernels in 4 or 8 bits, unpacked right before their products (QLoRA, https://arxiv.org/abs/2305.14314).

Letters: D inputs, F outputs, L layers, G blocks of 64 inputs. A kernel [L, D, F] is held as leaves under its name:

- `int8`: `int8` int8[L, D, F], and `scale` float32[L, F], by which an output's integers are multiplied.
- `nf4`: `nf4` uint8[L, G, 32, F], two values in a byte: the low half is of input i of its block, the high half of
  input 32 + i. A value is an index into NF4, to be multiplied by its block's `absmax` float32[L, G, F].
- `nf4` doubly quantised: `absmax` int8[L, G, F], and absmax = `absmax_offset` float32[L] + `absmax` times
  `absmax_scale` float32[L, F].

Blocks lie along the inputs, as bitsandbytes' do (its kernels are [F, D]), and are a dimension of their own, so that
no device can hold a part of one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.config import LoraConfig
from llava_jax.models.linear import Linear
from llava_jax.tuning import NF4_BLOCK as BLOCK
from llava_jax.tuning import kernel_name

# The values of bitsandbytes' NF4 (Appendix E of the paper).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a kernel is quantised."""

    method: str  # int8, nf4
    double: bool = True  # of nf4, its absmax too

    @classmethod
    def of(cls, lora: LoraConfig) -> "Quantization | None":
        """What the settings ask for; None: nothing is quantised."""
        return None if lora.quantization == "none" else cls(lora.quantization, lora.double_quantization)

    def leaves(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves of a kernel of this shape [..., D, F]."""
        *stacked, D, F = shape
        if self.method == "int8":
            shapes = {"int8": ((*stacked, D, F), np.int8), "scale": ((*stacked, F), np.float32)}
        else:
            assert D % BLOCK == 0, shape
            blocks = (*stacked, D // BLOCK, F)
            shapes = {
                "nf4": ((*blocks[:-1], BLOCK // 2, F), np.uint8),
                "absmax": (blocks, np.int8 if self.double else np.float32),
            }
            if self.double:
                shapes["absmax_scale"] = ((*stacked, F), np.float32)
                shapes["absmax_offset"] = (tuple(stacked), np.float32)
        return {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}

    def quantize(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        """The leaves of one layer's kernel float[D, F], on the host."""
        if self.method == "int8":
            codes, scale = _to_int8(kernel)
            return {"int8": codes, "scale": scale}
        codes, absmax = _to_nf4(kernel)
        if not self.double:
            return {"nf4": codes, "absmax": absmax}
        offset = absmax.mean(dtype=np.float64).astype(np.float32)
        codes_of_absmax, scale = _to_int8(absmax - offset)
        return {"nf4": codes, "absmax": codes_of_absmax, "absmax_scale": scale, "absmax_offset": offset}


def _to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float[D, F] -> int8[D, F] and the scale of each column float32[F]."""
    D, F = values.shape
    codes, scale = np.empty((D, F), np.int8), np.empty(F, np.float32)

    def fill(columns: slice) -> None:
        part = values[:, columns].astype(np.float32)
        scale[columns] = np.abs(part).max(axis=0) / np.float32(127)
        part /= _divisor(scale[columns])
        codes[:, columns] = np.rint(part, out=part)

    _on_threads(fill, _ranges(F, 256))
    return codes, scale


def _to_nf4(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float[D, F] -> uint8[G, 32, F] and absmax float32[G, F]."""
    D, F = kernel.shape
    codes = np.empty((D // BLOCK, BLOCK // 2, F), np.uint8)
    absmax = np.empty((D // BLOCK, F), np.float32)
    blocks = kernel.reshape(-1, BLOCK, F)
    borders = ((np.array(NF4[1:]) + NF4[:-1]) / 2).astype(np.float32)

    def fill(place: tuple[int, slice]) -> None:
        block, columns = place
        values = blocks[block, :, columns].astype(np.float32)
        absmax[place] = np.abs(values).max(axis=0)
        values /= _divisor(absmax[place])
        nearest = np.zeros(values.shape, np.uint8)
        for border in borders:
            nearest += values > border
        codes[block, :, columns] = nearest[: BLOCK // 2] | nearest[BLOCK // 2 :] << 4

    _on_threads(fill, itertools.product(range(D // BLOCK), _ranges(F, 4096)))
    return codes, absmax


def _ranges(size: int, step: int) -> list[slice]:
    """Parts of so many columns, few enough that what is computed of them stays in a core's cache."""
    return [slice(begin, begin + step) for begin in range(0, size, step)]


def _on_threads(call: Callable, places: Iterable) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(call, places))


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Zeros are divided by one: they stay zeros."""
    return np.where(scale == 0, np.float32(1), scale)


def _as_it_is(name: str, leaf: jax.Array) -> jax.Array:
    return leaf


class QuantizedKernel(nnx.Module):
    """A kernel [..., D, F] whose leaves are as `Quantization` says; `kernel[...]` is it in float32.

    `gather` is applied to the name and the value of each leaf before it is unpacked; `name` is the kernel's.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        quantization: Quantization,
        *,
        name: str = "",
        gather: Callable = _as_it_is,
    ):
        for kind, leaf in quantization.leaves(shape).items():
            setattr(self, kind, nnx.Param(jnp.zeros(leaf.shape, leaf.dtype)))
        self.shape = shape
        self.quantization = quantization
        self.name = name
        self.gather = gather

    def __getitem__(self, whole) -> jax.Array:
        """-> float32[D, F]; of one layer."""
        assert whole is Ellipsis
        if self.quantization.method == "int8":
            return self._leaf("int8").astype(jnp.float32) * self._leaf("scale")
        absmax, codes = self._leaf("absmax"), self._leaf("nf4")
        if self.quantization.double:
            absmax = self._leaf("absmax_offset") + absmax.astype(jnp.float32) * self._leaf("absmax_scale")
        halves = jnp.stack([codes & 15, codes >> 4], axis=1)  # [G, 2, 32, F]
        return (_from_nf4(halves) * absmax[:, None, None]).reshape(-1, codes.shape[-1])

    def _leaf(self, kind: str) -> jax.Array:
        return self.gather(f"{self.name}.{kind}", getattr(self, kind)[...])


def _from_nf4(codes: jax.Array) -> jax.Array:
    """uint8 -> float32, by choosing between two values for each bit: the TPU has no fast look-up."""
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class QuantizableLinear(Linear):
    """A linear layer, made of one, that never keeps what it unpacks of a quantised kernel for the backward pass."""

    def __init__(self, linear: nnx.Linear):
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)

    def product(self, x: jax.Array) -> jax.Array:
        """x W + bias: float[..., D] -> float[..., F]."""
        product = super().product
        if isinstance(self.kernel, QuantizedKernel):
            # The two passes are loops of their own, so that XLA cannot merge what they unpack.
            product = jax.checkpoint(product, prevent_cse=False)
        return product(x)


def quantized_kernels(names: Iterable[str], quantization: Quantization | None) -> dict[str, Quantization]:
    """The kernels of which some of a network's parameters of these names are leaves."""
    return {kernel: quantization for name in names if (kernel := kernel_name(name)) != name}


def quantize(
    model: nnx.Module,
    part: str,
    names: Collection[str],
    quantization: Quantization,
    *,
    gather: Callable[[str, jax.Array], jax.Array] = _as_it_is,
) -> nnx.Module:
    """Replaces, in place, the kernels of the linear layers of these names in a part of the model by empty ones.

    gather: see `QuantizedKernel`.
    """
    found = [
        path
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and path[0] == part and path[-1] in names
    ]
    for path in found:
        parent = model
        for attribute in path[:-1]:
            parent = getattr(parent, attribute)
        linear = QuantizableLinear(getattr(parent, path[-1]))
        name = ".".join((*path, "kernel"))
        linear.kernel = QuantizedKernel(linear.kernel.shape, quantization, name=name, gather=gather)
        setattr(parent, path[-1], linear)
    return model
