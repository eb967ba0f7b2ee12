"""Continues left-padded batches with a KV cache: all at once, or piece by piece.

Letters: B rows, T tokens of a prompt, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.models.llama import Cache
from llava_jax.models.llava import LLaVA
from llava_jax.sharding import replicated
from llava_jax.step import bind

PIECE = 8  # tokens that `continue_some` makes at most
READ = 128  # tokens that `read_on` reads at most


class Rows(NamedTuple):
    """Where rows stand that are being continued."""

    logits: jax.Array  # float32[B, V], of the next token
    cache: Cache
    position: jax.Array  # int32[B, 1], of the next token
    done: jax.Array  # bool[B]
    num_new: jax.Array  # int32[], tokens made since the prompt

    @property
    def num_slots(self) -> int:
        """Tokens per row for which the cache has room."""
        return self.cache.segment_ids.shape[1]


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "end_ids", "sample", "mesh"))
def continue_prompts(
    parameters, batch, key, temperature, top_p, *, graphdef, max_new_tokens, end_ids, sample, mesh=None
) -> jax.Array:
    """Continues a left-padded batch by max_new_tokens tokens or until every row has ended with one of end_ids.

    -> new tokens int32[B, max_new_tokens]; after a row's end token it holds only end_ids[0]. `sample` draws from
    the smallest set of probability top_p at the given temperature; otherwise the likeliest token is taken. With a
    mesh every device gets all of the tokens.
    """
    model = bind(graphdef, parameters)
    rows = _read(model, batch, batch["tokens"].shape[1] + max_new_tokens)
    choose = partial(_sample, temperature=temperature, top_p=top_p) if sample else _likeliest
    tokens, _ = _continue(model, rows, key, choose, max_new_tokens, size=max_new_tokens, end_ids=end_ids)
    return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "num_slots", "mesh"))
def read_prompts(parameters, batch, *, graphdef, num_slots, mesh) -> Rows:
    """What follows a left-padded batch, with room for num_slots tokens per row; whole on every device."""
    rows = _read(bind(graphdef, parameters), batch, num_slots)
    return jax.lax.with_sharding_constraint(rows, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="rows")
def read_on(parameters, rows, num_kept, tokens, count, *, graphdef, mesh) -> Rows:
    """What follows the first num_kept slots of `rows` and, after them, the first `count` of tokens int32[B, READ]."""
    model, cache = bind(graphdef, parameters), rows.cache
    is_kept = jnp.arange(cache.segment_ids.shape[1]) < num_kept
    rows = rows._replace(
        cache=cache._replace(segment_ids=jnp.where(is_kept, cache.segment_ids, 0), length=num_kept),
        position=rows.position - (cache.length - num_kept),
        done=jnp.zeros_like(rows.done),
        num_new=jnp.int32(0),
    )
    rows = jax.lax.fori_loop(0, count, lambda i, rows: _advance(model, rows, tokens[:, i]), rows)
    return jax.lax.with_sharding_constraint(rows, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "end_ids", "sample", "mesh"), donate_argnames="rows")
def continue_some(
    parameters, rows, key, temperature, top_p, limit, *, graphdef, end_ids, sample, mesh
) -> tuple[jax.Array, Rows]:
    """Continues rows by at most `limit` tokens, no more than PIECE: -> new tokens int32[B, PIECE], as
    `continue_prompts` gives them, and the rows after them."""
    model = bind(graphdef, parameters)
    choose = partial(_sample, temperature=temperature, top_p=top_p) if sample else _likeliest
    limit = jnp.minimum(limit, PIECE)
    found = _continue(model, rows, key, choose, limit, size=PIECE, end_ids=end_ids)
    return jax.lax.with_sharding_constraint(found, replicated(mesh))


def _read(model: LLaVA, batch: dict, num_slots: int) -> Rows:
    B = len(batch["tokens"])
    logits, cache = model.extend(
        batch["tokens"],
        batch["images"],
        batch["positions"],
        batch["segment_ids"],
        model.language_model.empty_cache(B, num_slots),
        batch.get("feature_ids"),
    )
    return Rows(logits, cache, batch["positions"][:, -1:] + 1, jnp.zeros(B, bool), jnp.int32(0))


def _continue(model: LLaVA, rows: Rows, key, choose, limit, *, size: int, end_ids) -> tuple[jax.Array, Rows]:
    """By at most `limit` tokens, of an array of `size`. choose: of logits and a key -> tokens int32[B]."""
    first = rows.num_new

    def unfinished(carry):
        _, rows = carry
        return (rows.num_new - first < limit) & ~rows.done.all()

    def step(carry):
        tokens, rows = carry
        token = choose(rows.logits, jax.random.fold_in(key, rows.num_new))
        token = jnp.where(rows.done, end_ids[0], token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], rows.num_new - first, axis=1)
        rows = _advance(model, rows, token)
        done = rows.done | jnp.isin(token, jnp.array(end_ids))
        return tokens, rows._replace(done=done, num_new=rows.num_new + 1)

    tokens = jnp.full((len(rows.done), size), end_ids[0], jnp.int32)
    return jax.lax.while_loop(unfinished, step, (tokens, rows))


def _advance(model: LLaVA, rows: Rows, token: jax.Array) -> Rows:
    """The rows with one token more, int32[B]."""
    size = model.config.vision.image_size
    no_images = jnp.zeros((len(token), 0, size, size, 3), jnp.uint8)
    ones = jnp.ones((len(token), 1), jnp.int32)
    logits, cache = model.extend(token[:, None], no_images, rows.position, ones, rows.cache)
    return rows._replace(logits=logits, cache=cache, position=rows.position + 1)


def _likeliest(logits: jax.Array, key: jax.Array) -> jax.Array:
    """logits float32[B, V] -> int32[B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _sample(logits: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """Nucleus sampling. logits float32[B, V] -> int32[B]."""
    logits = logits / temperature
    descending = jnp.sort(logits, axis=-1, descending=True)
    cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    kept = jnp.sum(cumulative < top_p, axis=-1, keepdims=True)  # the token that crosses top_p is kept too
    threshold = jnp.take_along_axis(descending, jnp.minimum(kept, logits.shape[-1] - 1), axis=-1)
    return jax.random.categorical(key, jnp.where(logits < threshold, -jnp.inf, logits)).astype(jnp.int32)
