"""The one door to attention. Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head width."""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from llava_jax.config import ATTENTIONS
from llava_jax.errors import ConfigError
from llava_jax.kernels.attention_cpu import attention_cpu
from llava_jax.kernels.einsum_attention import CHUNK, chunked, reference


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh axes over which a call's rows and heads are spread; kernels run on each device's share of them.

    XLA partitions einsums by itself, but not kernels: without a placement they are for a single device.
    """

    mesh: Mesh
    rows: tuple[str, ...]  # of dimension B
    heads: str  # of dimensions N and K

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sm_scale: float | None = None,
    longest_segment: int | None = None,
    single_segment: bool = False,
    implementation: str = "auto",
    placement: Placement | None = None,
) -> jax.Array:
    """Softmax attention with grouped queries.

    q float[B, T, N, H], k and v float[B, S, K, H] with K dividing N, all of one dtype -> float[B, T, N, H].
    causal: query t sees keys 0..t. segment_ids int[B, T] and kv_segment_ids int[B, S] (None: the
    former): a query sees the keys of its own segment only; 0 is padding and sees nothing. A query that sees
    nothing gives 0 and has no gradient. "mosaic_gpu" wants segments as packing makes them: positive, and each a
    single run. sm_scale: a number; None means 1 / sqrt(H).

    Two promises about segment_ids of self-attention, which save work: no segment has more tokens than longest_segment;
    single_segment: a row is one segment and padding after it. Then causal attention needs no segments, and
    what padding gives is any finite number.

    implementation: one of ATTENTIONS; "auto" is `choose`'s. Outputs, and log-sum-exps of kernels, are named "attention"
    for remat policies; cuDNN's have names of JAX's own (models/stack.py). placement: how rows and heads lie on several
    devices.

    Raises ConfigError on an unknown implementation, on arrays that do not fit together, and where an implementation
    cannot honour an argument: none is ignored.
    """
    if implementation not in ATTENTIONS:
        raise ConfigError(f"implementation={implementation!r} is not one of {ATTENTIONS}.")
    if segment_ids is None and kv_segment_ids is not None:
        raise ConfigError("kv_segment_ids need segment_ids: queries without segments would see all keys.")
    _require_fitting(q, k, v, segment_ids, kv_segment_ids)
    itself = kv_segment_ids is None and q.shape[1] == k.shape[1]
    if single_segment and causal and itself:
        segment_ids = None  # no token sees the padding after it
    if implementation == "auto":
        implementation = choose(q, segmented=segment_ids is not None, itself=itself, placement=placement)
        if itself:
            _tell(implementation, q.shape[1], q.shape[3], causal, segment_ids is not None)
    how = dict(causal=causal, sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if implementation in EINSUMS:
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        if implementation == "xla" and itself:
            how["longest_segment"] = longest_segment
        return EINSUMS[implementation](q, k, v, segment_ids, kv_segment_ids, **how)
    if not itself:
        raise ConfigError(
            f"implementation={implementation!r} is for tokens that attend to themselves, not for keys of another "
            "length or with segments of their own; use 'auto', 'xla' or 'reference'."
        )
    return _on_each_device(partial(KERNELS[implementation], **how), q, k, v, segment_ids, placement)


def _require_fitting(q, k, v, segment_ids, kv_segment_ids) -> None:
    """Raises ConfigError on shapes and dtypes that some implementation would take for others."""
    if q.ndim != 4 or k.shape != v.shape or (*k.shape[:1], *k.shape[3:]) != (q.shape[0], q.shape[3]):
        raise ConfigError(
            f"q {q.shape}, k {k.shape} and v {v.shape} are not [B, T, N, H] and twice [B, S, K, H]."
        )
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads.")
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"q, k and v are of different dtypes: {q.dtype}, {k.dtype} and {v.dtype}.")
    if segment_ids is None:
        return
    of_keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    for ids, tokens, what in ((segment_ids, q, "queries"), (of_keys, k, "keys")):
        if ids.shape != tokens.shape[:2]:
            raise ConfigError(f"Segments {ids.shape} are not those of {what} {tokens.shape}.")


def choose(q: jax.Array, *, segmented: bool, itself: bool, placement: Placement | None) -> str:
    """The implementation for a call by its platform, shape and mask. itself: keys and queries are the same tokens.

    Nothing was timed on TPUs: there, the kernel is taken where it fills its lanes. cuDNN knows no segments. On one CPU
    `xla_cpu` is fastest while its scores stay small.
    """
    einsum = "xla" if q.shape[1] > CHUNK else "reference"
    if not itself or (placement is None and jax.device_count() > 1):
        return einsum
    platform = placement.platform if placement else jax.default_backend()
    if platform == "tpu" and q.shape[1] >= 128 and q.dtype in (jnp.bfloat16, jnp.float32):
        return "flash_tpu"
    if platform == "gpu" and not _cudnn_refuses(q, segmented):
        return "cudnn"
    if platform == "cpu" and einsum == "reference" and (placement is None or placement.mesh.size == 1):
        return "xla_cpu"
    return einsum


def check_platform(implementation: str, platform: str) -> None:
    """Raises ConfigError where the implementation was made for another platform (cpu, gpu or tpu)."""
    needed = PLATFORMS.get(implementation, platform)
    if needed != platform:
        raise ConfigError(
            f"train.attention={implementation!r} runs on a {needed}, and this is a {platform}; use 'auto'."
        )


@functools.cache
def _tell(implementation: str, length: int, head_dim: int, causal: bool, segmented: bool) -> None:
    mask = ", ".join(name for name, given in (("causal", causal), ("segments", segmented)) if given)
    print(
        f"attention: {implementation} for {length} tokens, head width {head_dim}, {mask or 'no mask'}",
        flush=True,
    )


def _on_each_device(kernel: Callable, q, k, v, segment_ids, placement: Placement | None) -> jax.Array:
    if placement is None or placement.mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    sizes = placement.mesh.shape
    num_row_shards = math.prod(sizes[axis] for axis in placement.rows)
    for count, parts, what in (
        (q.shape[0], num_row_shards, "rows"),
        (q.shape[2], sizes[placement.heads], "query heads"),
        (k.shape[2], sizes[placement.heads], "key/value heads"),
    ):
        if count % parts:
            raise ConfigError(
                f"Attention over {count} {what} cannot be cut into {parts} equal parts, as the mesh "
                f"{dict(sizes)} asks; change mesh.*, or set train.attention='xla'."
            )
    heads = PartitionSpec(placement.rows, None, placement.heads)
    rows = PartitionSpec(placement.rows)
    # Of a kernel's outputs JAX cannot know over which axes they vary.
    return jax.shard_map(
        kernel, mesh=placement.mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(q, k, v, segment_ids)


# Kernels are imported when they are called, for importing Pallas takes long.


def _flash_tpu(q, k, v, segment_ids, **how) -> jax.Array:
    from llava_jax.kernels.flash_tpu import flash_attention

    return flash_attention(q, k, v, segment_ids, **how)


def _splash(q, k, v, segment_ids, **how) -> jax.Array:
    from llava_jax.kernels.splash import splash_attention

    return splash_attention(q, k, v, segment_ids, **how)


def _mosaic_gpu(q, k, v, segment_ids, **how) -> jax.Array:
    from llava_jax.kernels.flash_gpu import HEAD_WIDTHS, flash_attention

    if q.dtype != jnp.bfloat16 or q.shape[3] not in HEAD_WIDTHS:
        raise ConfigError(
            f"implementation='mosaic_gpu' takes bfloat16 and heads of width {' or '.join(map(str, HEAD_WIDTHS))}, not "
            f"{q.dtype} and {q.shape[3]}; use 'auto'."
        )
    return flash_attention(q, k, v, segment_ids, **how)


def _xla_cpu(q, k, v, segment_ids, **how) -> jax.Array:
    return checkpoint_name(attention_cpu(q, k, v, segment_ids, **how), "attention")


def _cudnn(q, k, v, segment_ids, *, causal: bool, sm_scale: float) -> jax.Array:
    refusal = _cudnn_refuses(q, segment_ids is not None)
    if refusal:
        raise ConfigError(f"implementation='cudnn' cannot do {refusal}; use 'auto'.")
    return jax.nn.dot_product_attention(q, k, v, scale=sm_scale, is_causal=causal, implementation="cudnn")


def _cudnn_refuses(q: jax.Array, segmented: bool) -> str:
    """What of a call cuDNN cannot do, through JAX's public door; "" where it can."""
    if segmented:
        return "segments without a mask of tokens by tokens"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return str(q.dtype)
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"heads of width {q.shape[3]}"
    return ""


EINSUMS = {"reference": reference, "xla": chunked}
KERNELS = {
    "flash_tpu": _flash_tpu,
    "splash": _splash,
    "mosaic_gpu": _mosaic_gpu,
    "cudnn": _cudnn,
    "xla_cpu": _xla_cpu,
}
PLATFORMS = {"flash_tpu": "tpu", "splash": "tpu", "mosaic_gpu": "gpu", "cudnn": "gpu", "xla_cpu": "cpu"}
assert set(ATTENTIONS) == {"auto", *EINSUMS, *KERNELS}
