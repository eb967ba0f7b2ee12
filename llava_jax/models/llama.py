"""The decoder: Llama, and its relatives that differ by biases, grouped queries, tied embeddings or rotary scaling.

Letters: B batch, T tokens, S cache slots, D width, N query heads, K key/value heads, H head width, L layers, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from llava_jax.config import RopeScaling, TextConfig
from llava_jax.kernels.attention import attention
from llava_jax.models.linear import Embed, Linear
from llava_jax.models.stack import run_stack, stack


class Cache(NamedTuple):
    """Keys and values of earlier tokens. All rows of a batch write the same slots (prompts are left-padded)."""

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]
    segment_ids: jax.Array  # int32[B, S]; 0 marks padding and slots not yet written
    length: jax.Array  # int32[]; slots written so far


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 up to the scale (HF's LlamaRMSNorm)."""

    def __init__(self, size: int, epsilon: float, dtype):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return _scaled(y.astype(self.dtype), self.scale.astype(self.dtype))


@jax.custom_vjp
def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """y * scale, float[..., D]; the scale's gradient is summed in float32 whatever they are."""
    return y * scale


def _save_scaled(y, scale):
    return y.value * scale.value, (y.value if scale.perturbed else None, scale.value)


def _differentiate_scaled(saved, grad):
    y, scale = saved
    if isinstance(grad, SymbolicZero):
        return None, None
    if y is None:  # the scale is frozen
        return grad * scale, None
    products = grad.astype(jnp.float32) * y.astype(jnp.float32)
    return grad * scale, products.sum(axis=range(y.ndim - 1)).astype(scale.dtype)


_scaled.defvjp(_save_scaled, _differentiate_scaled, symbolic_zeros=True)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle per position for each pair of features, float32[H / 2] (HF's modeling_rope_utils).

    In numpy: a compiler would rewrite such arithmetic, and the last bit of a frequency shows in the angles of far
    positions.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / (theta ** exponents.astype(np.float64)).astype(np.float32)
    if scaling.rope_type == "default":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    # llama3: long wavelengths are stretched, short ones kept, with a ramp in between.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clip(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


class Rotation(NamedTuple):
    """What positions do to queries and keys, computed once for all layers and heads."""

    cos: jax.Array  # float32[B, T, 1, H / 2]
    sin: jax.Array  # float32[B, T, 1, H / 2]


def rotation_at(config: TextConfig, positions: jax.Array) -> Rotation:
    """positions int[B, T] -> their Rotation."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    positions = positions.astype(jnp.float32)
    return jax.lax.platform_dependent(positions, frequencies, default=_rotation, cpu=_rotation_in_loop)


def _rotation(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    angles = positions[..., None, None] * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _rotation_in_loop(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    """The same as a loop's result. XLA's CPU compiler computes it again for every head and layer otherwise."""
    rotation = jax.lax.map(lambda position: _rotation(position, frequencies), positions.T)
    return Rotation(*(each.swapaxes(0, 1) for each in rotation))


def apply_rope(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates feature i together with feature i + H/2. x float[B, T, N, H] -> like x."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention within segments, with rotary positions and grouped queries."""

    def __init__(
        self, config: TextConfig, *, attention: Callable, constrain: Callable, dtype, rngs: nnx.Rngs
    ):
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        self.q_proj = linear(D, N * H, use_bias=config.attention_bias != "none")
        self.k_proj = linear(D, K * H, use_bias=config.attention_bias != "none")
        self.v_proj = linear(D, K * H, use_bias=config.attention_bias != "none")
        self.o_proj = linear(N * H, D, use_bias=config.attention_bias == "qkvo")
        self.config = config
        self.attention = attention
        self.constrain = constrain

    def __call__(self, x, rotation, segment_ids, cache=None):
        """x float[B, T, D] -> float[B, T, D], and with a layer's cache (keys, values, kv_segment_ids, slot)
        the updated (keys, values)."""

        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        q = apply_rope(heads(self.q_proj(x)), rotation)  # [B, T, N, H]
        k = apply_rope(heads(self.k_proj(x)), rotation)  # [B, T, K, H]
        v = heads(self.v_proj(x))
        if cache is None:
            out = self.attention(q, k, v, causal=True, segment_ids=segment_ids)
            return self.o_proj(out.reshape(*x.shape[:2], -1)), None
        keys, values, kv_segment_ids, slot = cache
        q, k, v = map(self.constrain, (q, k, v))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, slot, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, slot, axis=1)
        # A prompt starts at slot 0, so query t may see slots 0..t; a single new token sees all that is written.
        out = attention(
            q, keys, values, causal=x.shape[1] > 1, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (keys, values)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        linear = partial(Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to the stream."""

    def __init__(
        self, config: TextConfig, *, attention: Callable, constrain: Callable, dtype, rngs: nnx.Rngs
    ):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, attention=attention, constrain=constrain, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, rotation, segment_ids, cache=None):
        attended, cache = self.self_attn(self.input_layernorm(x), rotation, segment_ids, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """Embeddings, blocks, final norm and head. Callers embed tokens first, because images enter there."""

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype,
        remat: str,
        unroll: int,
        attention: Callable,
        constrain,
        rngs: nnx.Rngs,
    ):
        D, V = config.hidden_size, config.vocab_size
        self.embed_tokens = Embed(
            V, D, embedding_init=nnx.initializers.normal(D**-0.5), dtype=dtype, rngs=rngs
        )
        self.layers = stack(
            lambda rngs: Block(config, attention=attention, constrain=constrain, dtype=dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(D, V, use_bias=False, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.unroll = unroll
        self.constrain = constrain

    def __call__(self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """embeddings float[B, T, D], positions and segment_ids int[B, T] -> hidden float[B, T, D]."""
        rotation = rotation_at(self.config, positions)

        def call(block, x, _):
            x, _ = block(x, rotation, segment_ids)
            return self.constrain(x), None

        x = self.constrain(embeddings)
        x, _ = run_stack(call, self.layers, x, remat=self.remat, unroll=self.unroll)
        return self.norm(x)

    def extend(self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache):
        """The same for tokens that follow those in the cache -> (hidden float[B, T, D], Cache)."""
        kv_segment_ids = jax.lax.dynamic_update_slice_in_dim(
            cache.segment_ids, segment_ids, cache.length, axis=1
        )
        rotation = rotation_at(self.config, positions)

        def call(block, x, layer_cache):
            return block(x, rotation, segment_ids, (*layer_cache, kv_segment_ids, cache.length))

        x, (keys, values) = run_stack(
            call,
            self.layers,
            embeddings,
            per_layer=(cache.keys, cache.values),
            remat="none",
            unroll=self.unroll,
        )
        return self.norm(x), Cache(keys, values, kv_segment_ids, cache.length + embeddings.shape[1])

    def empty_cache(self, batch_size: int, num_slots: int) -> Cache:
        """A cache with room for `num_slots` tokens per row."""
        config = self.config
        shape = (config.num_hidden_layers, batch_size, num_slots, config.num_key_value_heads, config.head_dim)
        return Cache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            segment_ids=jnp.zeros((batch_size, num_slots), jnp.int32),
            length=jnp.int32(0),
        )

    def head(self) -> jax.Array:
        """The matrix from hidden states to logits, [D, V], in the compute dtype."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T.astype(self.dtype)
        return self.lm_head.kernel[...].astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden float[..., D] -> float32[..., V]."""
        return jnp.einsum("...D,DV->...V", hidden, self.head(), preferred_element_type=jnp.float32)
