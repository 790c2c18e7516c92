"""Small whole models of every library, each a function of a noise family: for test_models.py and test_expressions.py.

Dimension letters: `N` members, `I`/`O` in/out features, `T` time steps or tokens, `E` experts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nesjax

N = 6
STD = 0.1
KEY = jax.random.key(3)
LOW_RANK, PERMUTED = nesjax.LowRank(), nesjax.Permuted("both")


@dataclasses.dataclass
class Model:
    """`fn(params, x)`, what to call it with, and its population."""

    fn: Callable
    params: Any
    x: Any
    population: nesjax.Population


def population(noise, **options) -> nesjax.Population:
    return nesjax.Population(size=N, std=STD, noise=noise, **options)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(seed: int, *shape: int, fan_in: int | None = None) -> jax.Array:
    return normal(seed, *shape) / math.sqrt(fan_in or shape[-2])


def filled(params: Any) -> Any:
    """Parameters of the shapes of `params`, none of them constant: quicker than running each library's initialisers."""
    leaves, structure = jax.tree.flatten(params)
    drawn = [normal(seed, *leaf.shape) * math.prod(leaf.shape[:-1] or (9,)) ** -0.5 for seed, leaf in enumerate(leaves)]
    return structure.unflatten(drawn)


def linen(module: nn.Module, x: jax.Array, noise, **options) -> Model:
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return Model(lambda params, x: module.apply({"params": params}, x), params, x, population(noise, **options))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotary(x: jax.Array) -> jax.Array:
    """Rotary positions: `[..., T, heads, K]` with pairs (k, k + K / 2) turned by the position."""
    length, half = x.shape[-3], x.shape[-1] // 2
    angle = jnp.arange(length)[:, None, None] * 100.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`[T, heads, K]` each."""
    scores = jnp.einsum("qhk,shk->hqs", rotary(q), rotary(k)) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((len(q), len(q)), bool)), scores, -jnp.inf)
    return jnp.einsum("hqs,shk->qhk", jax.nn.softmax(scores), v)


# ---- Flax Linen


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.elu(nn.Dense(96)(x))
        x = nn.LayerNorm()(x + nn.gelu(nn.Dense(96)(x)))
        return nn.Dense(10)(x)


def linen_mlp(family):
    return linen(MLP(), normal(0, 2, 40), family)


def linen_mlp_antithetic(family):
    return linen(MLP(), normal(0, 2, 40), family, antithetic=True, chunk_size=2)


class CNN(nn.Module):
    """Residual blocks with GroupNorm; a grouped and a depthwise convolution where `grouped`."""

    grouped: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(48, (3, 3), padding="SAME")(x)))
        x = x + nn.relu(nn.GroupNorm(4)(nn.Conv(48, (3, 3), padding="CIRCULAR")(x)))
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(48, (3, 2), strides=(2, 1), padding=((1, 0), (0, 2)), use_bias=False)(x)))
        if self.grouped:
            x = x + nn.GroupNorm(4)(nn.Conv(48, (3, 3), padding="SAME", feature_group_count=4)(x))
            x = nn.GroupNorm(4)(nn.Conv(96, (3, 3), strides=2, feature_group_count=48)(x))
        x = nn.relu(nn.Conv(40, (2, 2), kernel_dilation=2, padding="SAME")(x))
        return nn.Dense(10)(x.mean((1, 2)))


def linen_cnn(family):
    return linen(CNN(grouped=False), normal(0, 1, 5, 6, 3), family)


def linen_grouped_cnn(family):
    return linen(CNN(grouped=True), normal(0, 1, 5, 6, 3), family)


class Block(nn.Module):
    """Pre-norm attention, by `MultiHeadDotProductAttention` or by `DenseGeneral`, and a gated MLP."""

    multi_head: bool

    @nn.compact
    def __call__(self, x):
        y, heads = nn.RMSNorm()(x), (4, 16)
        if self.multi_head:

            def attention(q, k, v, mask=None, **_):
                return nn.dot_product_attention(rotary(q), rotary(k), v, mask=mask)

            mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
            x = x + nn.MultiHeadDotProductAttention(4, attention_fn=attention)(y, mask=mask)
        else:
            q, k, v = (nn.DenseGeneral(heads, name=name, use_bias=False)(y) for name in ("q", "k", "v"))
            x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(jax.vmap(causal_attention)(q, k, v))
        y = nn.RMSNorm()(x)
        return x + nn.Dense(64, use_bias=False)(nn.silu(nn.Dense(144)(y)) * nn.Dense(144)(y))


class Transformer(nn.Module):
    multi_head: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(200, 64)
        x = Block(self.multi_head)(embed(tokens))
        return embed.attend(nn.RMSNorm()(x))


def linen_transformer_multi_head(family):
    return linen(Transformer(True), jnp.array([[3, 0, 199, 3, 7]]), family)


def linen_transformer_dense_general(family):
    return linen(Transformer(False), jnp.array([[3, 0, 199, 3, 7]]), family)


def linen_gru(family):
    return linen(nn.RNN(nn.GRUCell(48)), normal(0, 2, 4, 24), family)


def linen_lstm(family):
    return linen(nn.RNN(nn.LSTMCell(48)), normal(0, 2, 4, 24), family)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(80, name="wide")(nn.LayerNorm()(x))
        return x + nesjax.Dense(x.shape[-1], name="back", noise=nesjax.SignFlip())(nn.relu(y)), None


class Scanned(nn.Module):
    """Four layers stacked by `nn.scan`, each rematerialised, between two plain ones."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(48)(x)
        layers = nn.scan(nn.remat(Residual), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(10)(layers()(x, None)[0])


def linen_scan(family):
    model = linen(Scanned(), normal(0, 2, 24), family)
    found = model.population.for_model(Scanned(), model.x)
    axes = {layer.path: layer.axes for layer in found.layers}
    assert {axes.pop(path) for path in list(axes) if "Residual" in path} == {1}
    assert set(axes.values()) == {0}
    return dataclasses.replace(model, population=found)


# ---- a plain dict


def plain_transformer(family):
    """Grouped-query attention, rotary positions, tied embeddings, fused query/key/value and gate/up kernels."""
    params = {
        "embed": 0.3 * normal(0, 200, 64),
        "qkv": weight(1, 64, 3, 4, 16, fan_in=64),
        "o": weight(2, 4, 16, 64, fan_in=64),
        "gate_up": weight(3, 64, 2 * 144),
        "down": weight(4, 144, 64),
        "norm": [jnp.ones(64)] * 3,
    }

    def fn(params, tokens):
        x = params["embed"][tokens]
        q, k, v = jnp.moveaxis(jnp.einsum("td,dshk->tshk", rms_norm(x, params["norm"][0]), params["qkv"]), 1, 0)
        x = x + jnp.einsum("thk,hkd->td", causal_attention(q, k, v), params["o"])
        gate, up = jnp.split(rms_norm(x, params["norm"][1]) @ params["gate_up"], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ params["down"]
        return rms_norm(x, params["norm"][2]) @ params["embed"].T

    return Model(fn, params, jnp.array([3, 0, 199, 3, 7]), population(family))


def experts(params, x):
    gates = jax.nn.softmax(x @ params["gate"])
    y = jax.nn.relu(jnp.einsum("bi,eio->beo", x, params["up"]) + params["bias"][:, 0])
    return jnp.einsum("beo,eoi,be->bi", y, params["down"], gates)


def plain_experts(family):
    params = {"gate": weight(0, 32, 3), "up": weight(1, 3, 32, 72), "down": weight(2, 3, 72, 32)}
    bias = normal(3, 72)

    def fn(params, x):
        return experts({**params, "bias": jnp.broadcast_to(bias, (3, 1, 72))}, x)

    return Model(fn, params, normal(4, 2, 32), population(family))


def stacked_experts(family):
    params = {
        "gate": weight(0, 32, 3), "up": weight(1, 3, 32, 72), "bias": normal(3, 3, 1, 72), "down": weight(2, 3, 72, 32),
    }  # fmt: skip
    rules = {"^bias$": nesjax.Stacked(family, axes=2), "up|down": nesjax.Stacked(family), "gate": family}
    return Model(experts, params, normal(4, 2, 32), population(rules))


def plain_scan(family):
    params = {
        "layers": {"w": weight(0, 4, 40, 72), "b": normal(1, 4, 72), "back": weight(2, 4, 72, 40)},
        "head": weight(3, 40, 10),
    }

    def fn(params, x):
        def layer(x, p):
            return x + jnp.tanh(x @ p["w"] + p["b"]) @ p["back"], None

        return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]

    return Model(fn, params, normal(4, 2, 40), population({"layers/": nesjax.Stacked(family), "head": family}))


@jax.custom_vjp
def straight_through(x, w):
    return jnp.sign(x) @ w


straight_through.defvjp(lambda x, w: (jnp.sign(x) @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def clipped(x, w):
    return jnp.clip(x @ w, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0] @ primals[1]))


def plain_custom_rules(family):
    """`jax.checkpoint`, and custom derivative rules that take activations and the parameter itself."""
    params = [weight(seed, 56, 56) for seed in range(5)]

    def fn(params, x):
        block = jax.checkpoint(lambda w, x: x + jax.nn.relu(x @ w))
        x = block(params[1], block(params[0], x))
        x = x + straight_through(x, params[2])
        x = x + jax.checkpoint(clipped)(x, params[3])
        return jax.jit(lambda w, x: jax.nn.silu(x @ w))(params[4], x)

    return Model(fn, params, normal(9, 2, 56), population(family))


# ---- Equinox and NNX


def equinox(module, call, x, noise) -> Model:
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Model(lambda params, x: call(eqx.combine(params, static), x), filled(params), x, population(noise))


def equinox_mlp(family):
    module = eqx.nn.MLP(40, 10, 72, 2, key=jax.random.key(0))
    return equinox(module, lambda module, x: jax.vmap(module)(x), normal(0, 2, 40), family)


class EquinoxCNN(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.first = eqx.nn.Conv2d(3, 48, 3, padding=1, key=keys[0])
        self.second = eqx.nn.Conv2d(48, 40, 3, stride=2, groups=4, key=keys[1])
        self.head = eqx.nn.Linear(40, 10, key=keys[2])

    def __call__(self, x):
        x = self.second(jax.nn.relu(self.first(x)))
        return self.head(x.mean((1, 2)))


def equinox_cnn(family):
    return equinox(EquinoxCNN(), lambda module, x: jax.vmap(module)(x), normal(0, 2, 3, 5, 6), family)


def equinox_gru(family):
    def call(cell, x):
        return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, jnp.zeros(40), x)[1]

    return equinox(eqx.nn.GRUCell(24, 40, key=jax.random.key(0)), call, normal(0, 4, 24), family)


class EquinoxScanned(eqx.Module):
    layers: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self):
        key, *keys = jax.random.split(jax.random.key(0), 5)
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.MLP(40, 40, 72, 1, key=key))(jnp.stack(keys))
        self.head = eqx.nn.Linear(40, 10, key=key)

    def __call__(self, x):
        params, static = eqx.partition(self.layers, eqx.is_array)
        return self.head(jax.lax.scan(lambda x, layer: (x + eqx.combine(layer, static)(x), None), x, params)[0])


def equinox_scan(family):
    rules = {"^layers": nesjax.Stacked(family), "^head": family}
    return equinox(EquinoxScanned(), lambda module, x: jax.vmap(module)(x), normal(0, 2, 40), rules)


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(40, 96, rngs=rngs)
        self.norm = nnx.LayerNorm(96, rngs=rngs)
        self.last = nnx.Linear(96, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def nnx_mlp(family):
    graph, params = nnx.split(NNXMLP(nnx.Rngs(0)), nnx.Param)
    return Model(lambda params, x: nnx.merge(graph, params)(x), params, normal(0, 2, 40), population(family))


# ---- all of them

BOTH = (
    linen_mlp, linen_mlp_antithetic, linen_cnn, linen_transformer_multi_head, linen_transformer_dense_general,
    linen_gru, linen_lstm, linen_scan, plain_transformer, plain_experts, stacked_experts,
    plain_scan, plain_custom_rules, equinox_mlp, equinox_gru, equinox_scan, nnx_mlp,
)  # fmt: skip
# Permuted reads a kernel's last two axes as in and out: Equinox's are window axes, and grouped outputs can't move.
LOW_RANK_ONLY = (linen_grouped_cnn, equinox_cnn)
ALIKE = (  # for Permuted, to others: slow tests
    linen_mlp_antithetic, linen_transformer_dense_general, linen_lstm, stacked_experts, plain_custom_rules,
    equinox_mlp, equinox_gru, equinox_scan, nnx_mlp,
)  # fmt: skip

# ---- what a pass forms


def largest_kernel(noise: nesjax.Noise) -> int:
    """Numbers in the largest parameter; of one entry where parameters are stacked."""
    return max(math.prod(leaf.noise_shape) for leaf in noise.leaves)


def arrays(jaxpr: Any):
    """The abstract values of everything a jaxpr computes, in its inner ones too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


def dense_arrays(jaxpr: Any, noise: nesjax.Noise) -> set:
    """The arrays as large as N dense parameters: the largest kernel's size, or any kernel's shape with N in front.

    A bias, be it of several axes, is no larger than the activation it is added to.
    """
    limit = N * largest_kernel(noise)
    shapes = {(N, *leaf.noise_shape) for leaf in noise.leaves if len(leaf.noise_shape) > 1 and "bias" not in leaf.path}
    found = ((getattr(aval, "shape", ()), str(getattr(aval, "dtype", ""))) for aval in arrays(jaxpr))
    return {(shape, dtype) for shape, dtype in found if math.prod(shape) >= limit or shape in shapes}


def traced_pass(model: Model, noise: nesjax.Noise, strict: bool = True):
    def run(params, noise, x):
        return nesjax.population_apply(model.fn, params, noise, x, strict=strict)

    return jax.jit(run).trace(model.params, noise, model.x)
