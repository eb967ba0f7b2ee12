"""Continues left-padded batches with a KV cache: all at once, or piece by piece.

Letters: B rows, T tokens of a prompt, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.models.llama import Cache
from llava_jax.models.llava import IMAGE_TOKEN, LLaVA
from llava_jax.sharding import replicated
from llava_jax.step import bind

PIECE = 8  # tokens that `continue_some` makes at most
READ = 128  # tokens that `read_on` reads at most


class Sampling(NamedTuple):
    """How a token is chosen of its logits: what Hugging Face's generation calls the same, in its order."""

    temperature: float = 0.0  # 0: the likeliest is taken
    top_p: float = 1.0  # drawn is from the smallest set of this probability
    top_k: int = 0  # of so many of the likeliest; 0: of all
    # Of tokens in the prompt and behind it, positive logits are divided by it and negative ones multiplied.
    repetition_penalty: float = 1.0


GREEDY = Sampling()


class Rows(NamedTuple):
    """Where rows stand that are being continued."""

    logits: jax.Array  # float32[B, V], of the next token
    cache: Cache
    position: jax.Array  # int32[B, 1], of the next token
    seen: jax.Array  # bool[B, V], tokens that a row has
    done: jax.Array  # bool[B]
    num_new: jax.Array  # int32[], tokens made since the prompt

    @property
    def num_slots(self) -> int:
        """Tokens per row for which the cache has room."""
        return self.cache.segment_ids.shape[1]


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "end_ids", "sample", "mesh"))
def continue_prompts(
    parameters, batch, key, sampling, *, graphdef, max_new_tokens, end_ids, sample, mesh=None
) -> jax.Array:
    """Continues a left-padded batch by max_new_tokens tokens or until every row has ended with one of end_ids.

    -> new tokens int32[B, max_new_tokens]; after a row's end token it holds only end_ids[0]. sample: whether tokens are
    drawn, of a temperature above 0. With a mesh every device gets all of the tokens.
    """
    model = bind(graphdef, parameters)
    rows = _read(model, batch, batch["tokens"].shape[1] + max_new_tokens)
    how = dict(size=max_new_tokens, end_ids=end_ids, sample=sample)
    tokens, _ = _continue(model, rows, key, sampling, max_new_tokens, **how)
    return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "num_slots", "mesh"))
def read_prompts(parameters, batch, *, graphdef, num_slots, mesh) -> Rows:
    """What follows a left-padded batch, with room for num_slots tokens per row; whole on every device."""
    rows = _read(bind(graphdef, parameters), batch, num_slots)
    return jax.lax.with_sharding_constraint(rows, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="rows")
def read_on(parameters, rows, num_kept, tokens, count, seen, *, graphdef, mesh) -> Rows:
    """What follows the first num_kept slots of `rows` and, after them, the first `count` of tokens int32[B, READ].

    seen bool[B, V]: the tokens of all of these slots.
    """
    model, cache = bind(graphdef, parameters), rows.cache
    is_kept = jnp.arange(cache.segment_ids.shape[1]) < num_kept
    rows = rows._replace(
        cache=cache._replace(segment_ids=jnp.where(is_kept, cache.segment_ids, 0), length=num_kept),
        position=rows.position - (cache.length - num_kept),
        seen=seen,
        done=jnp.zeros_like(rows.done),
        num_new=jnp.int32(0),
    )
    rows = jax.lax.fori_loop(0, count, lambda i, rows: _advance(model, rows, tokens[:, i]), rows)
    return jax.lax.with_sharding_constraint(rows, replicated(mesh))


@partial(jax.jit, static_argnames=("graphdef", "end_ids", "sample", "mesh"), donate_argnames="rows")
def continue_some(
    parameters, rows, key, sampling, limit, *, graphdef, end_ids, sample, mesh
) -> tuple[jax.Array, Rows]:
    """Continues rows by at most `limit` tokens, no more than PIECE: -> new tokens int32[B, PIECE], as
    `continue_prompts` gives them, and the rows after them."""
    model = bind(graphdef, parameters)
    limit = jnp.minimum(limit, PIECE)
    found = _continue(model, rows, key, sampling, limit, size=PIECE, end_ids=end_ids, sample=sample)
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
    V = logits.shape[-1]
    is_text = (batch["segment_ids"] > 0) & (batch["tokens"] != IMAGE_TOKEN)
    seen = jnp.zeros((B, V), bool)
    seen = seen.at[jnp.arange(B)[:, None], jnp.where(is_text, batch["tokens"], V)].set(True, mode="drop")
    position = batch["positions"][:, -1:] + 1
    return Rows(logits, cache, position, seen, done=jnp.zeros(B, bool), num_new=jnp.int32(0))


def _continue(
    model: LLaVA, rows: Rows, key, sampling: Sampling, limit, *, size: int, end_ids, sample: bool
) -> tuple[jax.Array, Rows]:
    """By at most `limit` tokens, of an array of `size`."""
    first = rows.num_new

    def unfinished(carry):
        _, rows = carry
        return (rows.num_new - first < limit) & ~rows.done.all()

    def step(carry):
        tokens, rows = carry
        logits = _penalized(rows.logits, rows.seen, sampling.repetition_penalty)
        if sample:
            logits = _narrowed(logits, sampling)
            token = jax.random.categorical(jax.random.fold_in(key, rows.num_new), logits)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(rows.done, end_ids[0], token.astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], rows.num_new - first, axis=1)
        rows = _advance(model, rows, token)
        seen = rows.seen.at[jnp.arange(len(token)), token].set(True)
        done = rows.done | jnp.isin(token, jnp.array(end_ids))
        return tokens, rows._replace(seen=seen, done=done, num_new=rows.num_new + 1)

    tokens = jnp.full((len(rows.done), size), end_ids[0], jnp.int32)
    return jax.lax.while_loop(unfinished, step, (tokens, rows))


def _advance(model: LLaVA, rows: Rows, token: jax.Array) -> Rows:
    """The rows with one token more, int32[B]."""
    size = model.config.vision.image_size
    no_images = jnp.zeros((len(token), 0, size, size, 3), jnp.uint8)
    ones = jnp.ones((len(token), 1), jnp.int32)
    logits, cache = model.extend(token[:, None], no_images, rows.position, ones, rows.cache)
    return rows._replace(logits=logits, cache=cache, position=rows.position + 1)


def _penalized(logits: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """logits float32[B, V] with those of the tokens that are `seen` made smaller, if the penalty is above 1."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _narrowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """logits float32[B, V] at the temperature, -inf for what is not drawn."""
    logits = logits / sampling.temperature
    V = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    among = jnp.where(jnp.arange(V) < k, descending, -jnp.inf)
    cumulative = jnp.cumsum(jax.nn.softmax(among, axis=-1), axis=-1)
    # The token that crosses top_p is kept too. Rounded sums reach 1 too early.
    before = jnp.sum(cumulative < sampling.top_p, axis=-1, keepdims=True)
    last = jnp.minimum(jnp.where(sampling.top_p < 1, before, V), k - 1)
    return jnp.where(logits < jnp.take_along_axis(descending, last, axis=-1), -jnp.inf, logits)
