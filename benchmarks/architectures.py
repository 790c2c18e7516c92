"""Whole models as people build them in Flax, small or of any width: what `models` measures and the tests check.

Each function gives `(params, fn, x)`: `fn(params, x)` is the model's outputs for inputs `x: [count, ...]`.
"""

from collections.abc import Callable
from typing import Any

import brax.training.agents.ppo.networks as ppo
import flax.linen as nn
import jax
import jax.numpy as jnp

KEY = jax.random.key(0)


class Block(nn.Module):
    """A transformer's layer: attention and an MLP, each on a norm of what it adds to."""

    attend: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attend()(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Patches by a convolution, a class token in front, learned positions."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (4, 4), (4, 4))(images).reshape(len(images), -1, self.width)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], 1)
        x = x + self.param("place", nn.initializers.normal(1.0), x.shape[1:])
        for _ in range(self.layers):
            x = Block(lambda: nn.MultiHeadDotProductAttention(4))(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class CausalAttention(nn.Module):
    """Causal attention with one projection to queries, keys and values, as GPT-2 has it."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = jnp.split(nn.Dense(3 * x.shape[-1])(x), 3, -1)
        q, k, v = (part.reshape(*x.shape[:-1], self.heads, -1) for part in parts)
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        return nn.Dense(x.shape[-1])(y.reshape(x.shape))


class GPT2(nn.Module):
    """A decoder with a table of learned positions and a tied embedding."""

    width: int
    layers: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width)
        places = self.param("places", nn.initializers.normal(1.0), (64, self.width))
        x = embed(tokens) + places[: tokens.shape[1]]
        for _ in range(self.layers):
            x = Block(CausalAttention)(x)
        return embed.attend(nn.LayerNorm()(x))


class ResNet(nn.Module):
    """Three stages of residual blocks, with group norms."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv = lambda features, window, stride, x: nn.GroupNorm(4)(
            nn.Conv(features, (window, window), stride, use_bias=False)(x)
        )
        x = nn.relu(conv(self.width, 3, 1, images))
        for stage in range(3):
            for layer in range(self.layers):
                features, stride = self.width * 2**stage, 1 + (stage > 0 and layer == 0)
                y = conv(features, 3, 1, nn.relu(conv(features, 3, stride, x)))
                x = nn.relu(y + (x if x.shape == y.shape else conv(features, 1, stride, x)))
        return nn.Dense(10)(x.mean((1, 2)))


class Classifier(nn.Module):
    """An LSTM over embedded tokens, its last state classified (as Flax's sst2 example)."""

    width: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        lstm = nn.RNN(nn.OptimizedLSTMCell(self.width), return_carry=True)
        (_, last), _ = lstm(nn.Embed(self.vocabulary, self.width)(tokens))
        return nn.Dense(1)(jnp.tanh(nn.Dense(self.width)(last)))


class Seq2Seq(nn.Module):
    """An LSTM that reads tokens, and one that goes on from its state (as Flax's seq2seq example, the answer given)."""

    width: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.one_hot(tokens, self.vocabulary)
        carry, _ = nn.RNN(nn.LSTMCell(self.width), return_carry=True)(x)
        return nn.Dense(self.vocabulary)(nn.RNN(nn.LSTMCell(self.width))(x, initial_carry=carry))


def _linen(model: nn.Module, x: jax.Array) -> tuple[Any, Callable, jax.Array]:
    return jax.jit(model.init)(KEY, x[:1]), model.apply, x


def _images(count: int, size: int) -> jax.Array:
    return jax.random.normal(KEY, (count, size, size, 3))


def _tokens(count: int, length: int, vocabulary: int) -> jax.Array:
    return jax.random.randint(KEY, (count, length), 0, vocabulary)


def vit(count: int, *, width: int = 128, layers: int = 2, size: int = 32) -> tuple[Any, Callable, jax.Array]:
    return _linen(ViT(width, layers), _images(count, size))


def resnet(count: int, *, width: int = 16, layers: int = 1, size: int = 32) -> tuple[Any, Callable, jax.Array]:
    return _linen(ResNet(width, layers), _images(count, size))


def brax_ppo(count: int, *, width: int = 32) -> tuple[Any, Callable, jax.Array]:
    """brax's policy for PPO, with an ant's observations and actions."""
    network = ppo.make_ppo_networks(87, 8, policy_hidden_layer_sizes=(width,) * 4).policy_network
    return network.init(KEY), lambda p, x: network.apply(None, p, x), jax.random.normal(KEY, (count, 87))


def gpt2(count: int, *, width: int = 128, layers: int = 2, length: int = 32) -> tuple[Any, Callable, jax.Array]:
    return _linen(GPT2(width, layers, 512), _tokens(count, length, 512))


def lstm(count: int, *, width: int = 256, length: int = 32) -> tuple[Any, Callable, jax.Array]:
    return _linen(Classifier(width, 512), _tokens(count, length, 512))


def seq2seq(count: int, *, width: int = 256, length: int = 10) -> tuple[Any, Callable, jax.Array]:
    return _linen(Seq2Seq(width, 16), _tokens(count, length, 16))


MODELS = {
    "ViT": vit, "ResNet": resnet, "brax PPO": brax_ppo, "GPT-2": gpt2, "LSTM classifier": lstm, "seq2seq": seq2seq,
}  # fmt: skip
