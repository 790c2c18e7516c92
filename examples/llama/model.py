"""A Llama as an ordinary Flax Linen module with a key-value cache, and the generation of text with it.

Nothing here knows of noise or populations. The same module is Qwen2, whose queries, keys and values have biases.

Letters: `B` sequences, `T` tokens of a call, `S` positions of the cache, `H` heads, `G` key-value heads, `K` numbers a
head, `L` layers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, as its weights have them."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # numbers a head
    context: int  # tokens at most
    rope_base: float
    epsilon: float
    tied: bool = True  # the embedding's rows are the output layer
    bias: bool = False  # of queries, keys and values
    dtype: Any = jnp.float32  # that is computed in


def rotated(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary positions (arXiv:2104.09864) of `[B, T, H, K]`: numbers k and k + K / 2 are a pair, turned by an angle."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * base ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1).astype(x.dtype)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, layer, cache, at, first):
        """`x: [B, T, width]` after this layer, and its new keys and values; those before position `at` are cached."""
        c = self.config
        norm = lambda name: nn.RMSNorm(epsilon=c.epsilon, dtype=c.dtype, name=name)
        dense = lambda size, name, bias=False: nn.Dense(size, use_bias=bias, dtype=c.dtype, name=name)
        positions = at + jnp.arange(x.shape[1])
        y = norm("attention_norm")(x)
        q, k, v = (
            dense(heads * c.head, name, c.bias)(y).reshape(*x.shape[:2], heads, c.head)
            for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        )
        q, k = rotated(q, positions, c.rope_base), rotated(k, positions, c.rope_base)
        keys, values = (
            jax.lax.dynamic_update_slice(jax.lax.dynamic_index_in_dim(old, layer, keepdims=False), new, (0, at, 0, 0))
            for old, new in zip(cache, (k, v))
        )
        x = x + dense(c.width, "out")(attend(q, keys, values, positions, first))
        y = norm("feed_forward_norm")(x)
        return x + dense(c.width, "down")(nn.silu(dense(c.hidden, "gate")(y)) * dense(c.hidden, "up")(y)), (k, v)


def attend(q, keys, values, positions, first):
    """What `q: [B, T, H, K]` reads of `[B, S, G, K]`: each head of its group's, from the sequence's first token on."""
    groups = keys.shape[2]
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
    scores = jnp.einsum("btghk,bsgk->bghts", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    at = jnp.arange(keys.shape[1])
    seen = (at <= positions[:, None]) & (at >= first[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30)).astype(values.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, values).reshape(*q.shape[:2], -1)


class Llama(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens, cache, at=0, first=None, last=False):
        """The logits of what follows each token, and the cache with the tokens in it.

        Args:
          tokens: `[B, T]`, which stand at positions `at`, `at + 1` ...
          cache: from `empty_cache`, or from the call before.
          at: the position of the first of `tokens`.
          first: `[B]`, the position at which each sequence begins, if not at 0: those before are filling.
          last: only the logits of the last token, `[B, 1, vocabulary]`.
        """
        c = self.config
        first = jnp.zeros(len(tokens), int) if first is None else first
        embed = nn.Embed(c.vocabulary, c.width, dtype=c.dtype, name="embed")
        # A layer cuts its own out of the cache: to scan over it, members' caches would be transposed in every step.
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, *[nn.broadcast] * 3),
            length=c.layers,
        )(c, name="blocks")  # fmt: skip
        x, new = blocks(embed(tokens), jnp.arange(c.layers), cache, at, first)
        cache = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, at, 0, 0)), cache, new)
        x = nn.RMSNorm(epsilon=c.epsilon, dtype=c.dtype, name="norm")(x[:, -1:] if last else x)
        return embed.attend(x) if c.tied else nn.Dense(c.vocabulary, use_bias=False, dtype=c.dtype, name="head")(
            x
        ), cache


def empty_cache(config: Config, sequences: int, positions: int):
    """Keys and values, `[L, B, S, G, K]` each."""
    shape = config.layers, sequences, positions, config.kv_heads, config.head
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def as_computed(config: Config, params):
    """Parameters in the dtype that is computed in, cast once and not in every layer of every call."""
    return jax.tree.map(lambda x: x.astype(config.dtype), params)


@jax.custom_batching.custom_vmap
def all_done(done):
    """Whether all sequences are: those of all members where members are vmapped, so that their loop is one loop."""
    return done.all()


@all_done.def_vmap
def _(size, batched, done):
    return all_done(done), False


def generate(config: Config, params, prompts, first, key, *, length: int, end: int, temperature: float = 0.0):
    """What a model says to each prompt, until all have said `end`: `[B, length]`, filled up with `end`.

    Args:
      config, params: of the model; the parameters are cast to the config's dtype once.
      prompts: `[B, T]`, filled up in front to one length.
      first: `[B]`, where each prompt begins.
      key: of the samples; not used at temperature 0, where the likeliest token is said.
      length: tokens at most.
      end: the token that ends an answer.
    """
    prompt, context = prompts.shape[1], config.context
    if prompt + length > context:
        raise ValueError(f"prompts of {prompt} tokens and answers of {length} must fit the context, {context} tokens.")
    params = as_computed(config, params)
    model = Llama(config)

    def said(logits, step):
        logits = logits[:, 0].astype(jnp.float32)
        if temperature == 0:
            return logits.argmax(-1)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)

    def goes_on(carry):
        step, _, _, done = carry[:4]
        return (step < length) & ~all_done(done)

    def following(carry):
        step, token, answers, done, cache = carry
        logits, cache = model.apply(params, token[:, None], cache, prompt + step - 1, first, last=True)
        token = jnp.where(done, end, said(logits, step))
        answers = jax.lax.dynamic_update_slice(answers, token[:, None], (0, step))
        return step + 1, token, answers, done | (token == end), cache

    cache = empty_cache(config, len(prompts), prompt + length)
    logits, cache = model.apply(params, prompts, cache, 0, first, last=True)
    token = said(logits, 0)
    answers = jnp.full((len(prompts), length), end).at[:, 0].set(token)
    return jax.lax.while_loop(goes_on, following, (1, token, answers, token == end, cache))[2]
