"""Whole models: the batched pass equals each member on its own, forms no dense noise, and gives a gradient.

Dimension letters: `N` members, `I`/`O` in/out features, `T` time steps or tokens, `E` experts.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import nesjax

N = 6
STD = 0.1
KEY = jax.random.key(3)


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


# ---- what all of them do

LOW_RANK, PERMUTED = nesjax.LowRank(), nesjax.Permuted("both")
BOTH = (
    linen_mlp, linen_mlp_antithetic, linen_cnn, linen_transformer_multi_head, linen_transformer_dense_general,
    linen_gru, linen_lstm, linen_scan, plain_transformer, plain_experts, stacked_experts,
    plain_scan, plain_custom_rules, equinox_mlp, equinox_gru, equinox_scan, nnx_mlp,
)  # fmt: skip
# Permuted reads a kernel's last two axes as in and out: Equinox's are window axes, and grouped outputs can't move.
LOW_RANK_ONLY = (linen_grouped_cnn, equinox_cnn)
LOW_RANK_CASES = [(build, LOW_RANK) for build in (*BOTH, *LOW_RANK_ONLY)]
ALIKE = (  # for Permuted, to others: slow tests
    linen_mlp_antithetic, linen_transformer_dense_general, linen_lstm, stacked_experts, plain_custom_rules,
    equinox_mlp, equinox_gru, equinox_scan, nnx_mlp,
)  # fmt: skip
CASES = LOW_RANK_CASES + [
    pytest.param((build, PERMUTED), marks=pytest.mark.slow if build in ALIKE else ()) for build in BOTH
]
# Every model's gradient once; a permutation's gradient, costly to compile, only plain and stacked.
GRADIENT_CASES = [*LOW_RANK_CASES, (linen_mlp, PERMUTED), (plain_scan, PERMUTED)]


def name(case) -> str:
    return f"{case[0].__name__}-{type(case[1]).__name__}"


@dataclasses.dataclass
class Reference:
    """A model, a generation's noise, the members' parameters and their outputs, each of a plain call of its own."""

    model: Model
    noise: nesjax.Noise
    members: list[Any]
    outputs: np.ndarray


@functools.lru_cache(1)
def referred(build: Callable, family: nesjax.NoiseFamily) -> Reference:
    model = build(family)
    noise = jax.jit(lambda params: nesjax.sample_noise(KEY, params, model.population))(model.params)
    materialise, fn = jax.jit(nesjax.materialise), jax.jit(model.fn)
    members = [materialise(model.params, noise, i) for i in range(N)]
    return Reference(model, noise, members, np.stack([fn(member, model.x) for member in members]))


@pytest.fixture(scope="module")  # parametrised by the tests: pytest then runs all of one model's together
def reference(request) -> Reference:
    return referred(*request.param)


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


@pytest.mark.parametrize("reference", CASES, ids=name, indirect=True)
def test_population_pass_is_every_member(reference):
    """Laws 1 and 8: the same outputs as the members' own parameters, and no `[N, I, O]` array on the way."""
    model, noise = reference.model, reference.noise
    traced = traced_pass(model, noise)
    outputs = np.asarray(traced.lower().compile()(model.params, noise, model.x))
    assert not dense_arrays(traced.jaxpr, noise)
    np.testing.assert_allclose(outputs, reference.outputs, rtol=1e-4, atol=1e-4)
    spread = np.abs(outputs[:, None] - outputs[None]).reshape(N, N, -1).max(-1)
    assert spread[~np.eye(N, dtype=bool)].min() > 0.03  # far above the tolerance: the members do differ


@pytest.mark.parametrize("reference", CASES, ids=name, indirect=True)
def test_every_parameter_is_perturbed(reference):
    """The members that the pass is compared with: each parameter of each of them is its own."""
    trees = (reference.model.params, *reference.members)
    for path, *leaves in zip((leaf.path for leaf in reference.noise.leaves), *map(jax.tree.leaves, trees)):
        leaves = np.stack([np.asarray(leaf).ravel() for leaf in leaves])
        distance = np.sqrt(((leaves[:, None] - leaves[None]) ** 2).mean(-1))
        if leaves.shape[1] > 20:
            assert distance[0, 1:] == pytest.approx(STD, rel=0.6), path
            assert distance[1:, 1:][~np.eye(N, dtype=bool)].min() > 0.5 * STD, path


@pytest.mark.parametrize("reference", GRADIENT_CASES, ids=name, indirect=True)
def test_gradient_is_the_members_weighted_sum(reference):
    """Law 2 on a whole model: `sum_i (L_i - mean L) (member_i - params) / (N std^2)`, in the structure of params."""
    model = reference.model

    def loss_fn(params, x):
        return jnp.mean((model.fn(params, x) - 0.5) ** 2)

    es_grad = jax.jit(nesjax.value_and_grad(loss_fn, model.population, strict=True))
    loss, grads = es_grad(model.params, KEY, model.x)
    losses = ((reference.outputs.astype(np.float64) - 0.5) ** 2).reshape(N, -1).mean(-1)
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-4)
    weights = (losses - losses.mean()) / (N * STD**2)
    assert jax.tree.structure(grads) == jax.tree.structure(model.params)
    trees = (model.params, grads, *reference.members)
    paths = (leaf.path for leaf in reference.noise.leaves)
    for path, param, grad, *members in zip(paths, *map(jax.tree.leaves, trees)):
        assert (grad.shape, grad.dtype) == (param.shape, param.dtype), path
        assert jnp.isfinite(grad).all(), path
        moved = np.stack([np.asarray(member, np.float64) - param for member in members])
        expected = np.tensordot(weights, moved, 1)
        scale = np.abs(weights).sum() * STD
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-3 * scale, err_msg=path)


def test_dense_noise_is_seen():
    """The search for dense arrays finds those of a family that has them, and of a parameter that is materialised."""
    model = linen_mlp(nesjax.Gaussian())
    noise = nesjax.sample_noise(KEY, model.params, model.population)
    assert ((N, 96, 96), "float32") in dense_arrays(traced_pass(model, noise).jaxpr, noise)
    model = Model(lambda w, x: x @ jnp.sort(w), weight(0, 16, 24), normal(1, 2, 16), population(LOW_RANK))
    noise = nesjax.sample_noise(KEY, model.params, model.population)
    with pytest.warns(nesjax.MaterialiseWarning):
        traced = traced_pass(model, noise, strict=False)
    assert ((N, 16, 24), "float32") in dense_arrays(traced.jaxpr, noise)


def test_one_channel_convolution_gives_distinct_members():
    """A permutation of one channel does nothing: the family falls back, and no two members agree."""
    module = nn.Conv(16, (3, 3))
    model = linen(module, normal(0, 1, 6, 6, 1), nesjax.Permuted(axis="in"))
    noise = nesjax.sample_noise(KEY, model.params, model.population)
    outputs = jax.jit(lambda noise: nesjax.population_apply(model.fn, model.params, noise, model.x, strict=True))(noise)
    features = np.asarray(outputs).reshape(N, 36, 16)  # every output channel on its own
    distance = np.abs(features[:, None] - features[None]).max(2)
    assert distance[~np.eye(N, dtype=bool)].min() > 0.01
    without_bias = features - features.mean(1, keepdims=True)  # and not by their biases alone
    distance = np.abs(without_bias[:, None] - without_bias[None]).max(2)
    assert distance[~np.eye(N, dtype=bool)].min() > 0.01


# ---- what needs a parameter dense: right, said, and refused if strict


def undeclared_scan(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def fast_weights(params, x):
    return x @ jax.lax.fori_loop(0, 2, lambda _, w: w - 0.1 * x.T @ jnp.tanh(x @ w), params["w"])


def branch(params, x):
    return x @ jax.lax.cond(x[0, 0] > 9, jnp.zeros_like, lambda w: w, params["w"])


def quantised(w):
    return w.astype(jnp.float8_e4m3fn).astype(jnp.float32)


def two_parameters(w):
    return convolved(w[None, :, :, None], w[:3, :3, None, None])


IMAGE, FROZEN = normal(5, 1, 5, 5, 4), weight(6, 24, 40)
UNSUPPORTED = {
    "scan": (undeclared_scan, "layers", (3, 24, 24), "scan"),
    "sort": (lambda params, x: x @ jnp.sort(params["w"]), "w", (24, 40), "sort"),
    "abs": (lambda params, x: x @ jnp.abs(params["w"]), "w", (24, 40), "abs"),
    "cube": (lambda params, x: x @ params["w"] ** 3, "w", (24, 40), "integer_pow"),
    "squares": (lambda params, x: x @ params["w"] ** 2, "w", (24, 40), "dot_general"),
    "mask": (lambda params, x: x @ (params["w"] * (FROZEN > 0)), "w", (24, 40), "mul"),
    "fast weights": (fast_weights, "w", (24, 24), "a loop that changes it"),
    "branch": (branch, "w", (24, 40), "a loop .* or a branch"),
    "quantised": (lambda params, x: x @ quantised(params["w"]), "w", (24, 40), "convert_element_type"),
    "convolution of two": (lambda params, x: two_parameters(params["w"]), "w", (24, 40), "conv_general_dilated of two"),
    "take columns": (lambda params, x: x @ params["w"][:, jnp.array([3, 1])], "w", (24, 40), "gather"),
}  # fmt: skip


@pytest.mark.parametrize("family", [LOW_RANK, PERMUTED], ids=["LowRank", "Permuted"])
@pytest.mark.parametrize("fn, path, shape, operation", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_operation_is_right_and_said(fn, path, shape, operation, family):
    params, x = {path: weight(0, *shape)}, normal(1, 2, 24)
    noise = nesjax.sample_noise(KEY, params, population(family))

    def run(strict):
        return jax.jit(lambda params: nesjax.population_apply(fn, params, noise, x, strict=strict))

    text = rf"(?s)\b{path}: ({operation}).*\b{4 * math.prod(shape):,} bytes"
    with pytest.warns(nesjax.MaterialiseWarning, match=text):
        outputs = run(strict=False)(params)
    each = jax.jit(lambda i: fn(nesjax.materialise(params, noise, i), x))
    np.testing.assert_allclose(outputs, np.stack([each(i) for i in range(N)]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=text + r".*\bstrict=True"):
        run(strict=True)(params)


def centred(kernel):
    return kernel - kernel.mean((0, 1, 2))


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


LAZY = {
    "frozen + W": lambda p, x: x @ (FROZEN + p["w"]),
    "identity + W": lambda p, x: x @ (jnp.eye(24) + p["square"]),
    "1 - W": lambda p, x: x @ (1 - p["w"]),
    "W - V": lambda p, x: x @ (p["w"] - p["v"]),
    "transposed sum": lambda p, x: (FROZEN + p["w"]).T @ x.T,
    "gain of the outputs": lambda p, x: x @ (p["w"] * p["gain"]),
    "gain of the inputs": lambda p, x: x @ (p["w"] / (2 + x[0] ** 2)[:, None]),
    "weight normalisation": lambda p, x: x @ (p["w"] * p["gain"] / jnp.linalg.norm(p["w"], axis=0)),
    "spectral scale": lambda p, x: x @ p["w"] / jnp.linalg.norm(p["w"]),
    "centred kernel": lambda p, x: convolved(IMAGE, centred(p["kernel"])),
    "convolution with a sum": lambda p, x: convolved(IMAGE, p["kernel"] + 0.5),
    "convolution with a concatenation": lambda p, x: convolved(IMAGE, jnp.concatenate([p["kernel"], p["kernel"]], -1)),
    "fused outputs": lambda p, x: jnp.split(x @ jnp.concatenate([p["w"], p["v"], FROZEN], 1), 3, 1)[1],
    "fused inputs": lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], p["v"]]),
    "slice of a concatenation": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1)[:, 20:70],
    "complex": lambda p, x: jnp.abs(x @ (p["w"] + 1j * p["v"])),
    "penalty": lambda p, x: (p["w"] ** 2).sum() + (p["v"] * p["v"]).sum() + p["v"].mean() + (x @ p["w"]).sum(),
    "named": lambda p, x: x @ checkpoint_name(p["w"], "kernel"),
    "tiled": lambda p, x: x @ jnp.tile(p["w"], (1, 2)),
    "unstacked": lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), jnp.unstack(p["layers"]), x),
    "class token": lambda p, x: jnp.tanh(jnp.concatenate([p["token"], x])) @ p["w"],
    "position": lambda p, x: jnp.tanh((x + p["position"]) @ p["w"]),
}  # fmt: skip


OF_SIGNS = {"weight normalisation", "spectral scale", "penalty"}  # sums of squares: only those of signs are known


@functools.cache
def parameters_of_expressions(family):
    """The parameters, their noise, and those of each member."""
    params = {
        "w": weight(0, 24, 40), "v": weight(1, 24, 40), "square": weight(2, 24, 24), "gain": normal(3, 40),
        "kernel": weight(4, 3, 3, 4, 40, fan_in=36), "token": normal(7, 1, 24), "position": normal(8, 2, 24),
        "layers": weight(10, 2, 24, 24),
    }  # fmt: skip
    noise = nesjax.sample_noise(KEY, params, population(family))
    materialise = jax.jit(nesjax.materialise)
    return params, noise, [materialise(params, noise, i) for i in range(N)]


@pytest.mark.parametrize("family", [LOW_RANK, PERMUTED], ids=["LowRank", "Permuted"])
@pytest.mark.parametrize("name", LAZY)
def test_linear_expressions_are_right_without_a_warning(name, family):
    """Sums, scalings and concatenations: every member's value, and strict=True accepts them."""
    fn, strict = LAZY[name], family is LOW_RANK or name not in OF_SIGNS
    (params, noise, members), x = parameters_of_expressions(family), normal(9, 2, 24)
    run = jax.jit(lambda noise: nesjax.population_apply(fn, params, noise, x, strict=strict))
    with contextlib.nullcontext() if strict else pytest.warns(nesjax.MaterialiseWarning, match="square"):
        outputs = run(noise)
    each = jax.jit(lambda member: fn(member, x))
    expected = np.stack([each(member) for member in members])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(outputs, axis=0).max() > 0.03


@pytest.mark.parametrize("name", ["frozen + W", "identity + W", "W - V", "gain of the outputs", "fused outputs"])
def test_linear_expressions_have_no_dense_array(name):
    params = {key: weight(0, 24, 40) for key in ("w", "v")} | {"square": weight(2, 24, 24), "gain": normal(3, 40)}
    model = Model(LAZY[name], params, normal(9, 2, 24), population(LOW_RANK))
    noise = nesjax.sample_noise(KEY, params, model.population)
    assert not dense_arrays(traced_pass(model, noise).jaxpr, noise)


@pytest.mark.parametrize("strict", [True, False])
def test_shard_map_in_the_loss(strict):
    """Activations may go through it; a parameter that does is formed, and it is said."""
    mesh, spec = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec()

    def reduced(x):
        return jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=spec, out_specs=spec)(x)

    def fn(w, x):
        return reduced(x @ w) if strict else x @ reduced(w)

    w, x = weight(0, 24, 40), normal(1, 2, 24)
    noise = nesjax.sample_noise(KEY, w, population(LOW_RANK))
    run = jax.jit(lambda w: nesjax.population_apply(fn, w, noise, x, strict=strict))
    if strict:
        outputs = run(w)
    else:
        with pytest.warns(nesjax.MaterialiseWarning, match="shard_map"):
            outputs = run(w)
    expected = np.stack([x @ nesjax.materialise(w, noise, i) for i in range(N)])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_layers_stacked_along_their_second_axis():
    """As T5X and MaxText keep them: found by `for_model`, or said by a rule; nothing is formed."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(24)(x)), None

    model = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()
    x = normal(1, 2, 24)
    params = model.init(KEY, x, None)
    settings = population(LOW_RANK)
    by_rule = dataclasses.replace(settings, noise={"": nesjax.Stacked(LOW_RANK, first=1)})
    results = []
    for found in (settings.for_model(model, x, None), by_rule):
        noise = nesjax.sample_noise(KEY, params, found)
        outputs = nesjax.population_apply(lambda p, x: model.apply(p, x, None)[0], params, noise, x, strict=True)
        expected = np.stack([model.apply(nesjax.materialise(params, noise, i), x, None)[0] for i in range(N)])
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
        total = nesjax.weighted_sum(noise, jnp.arange(1.0, N + 1))
        each = [jax.tree.map(jnp.subtract, nesjax.materialise(params, noise, i), params) for i in range(N)]
        expected = jax.tree.map(lambda *members: sum((i + 1) * m for i, m in enumerate(members)), *each)
        chex.assert_trees_all_close(total, expected, rtol=1e-3, atol=1e-4)
        results.append(outputs)
    np.testing.assert_array_equal(*results)


def test_a_raveled_tree_is_formed_and_said():
    """One vector of all parameters, cut and reshaped by the loss: what becomes a matrix is said, what stays is not."""
    params = {"w": weight(0, 24, 40), "b": normal(1, 40)}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    noise = nesjax.sample_noise(KEY, flat, population(LOW_RANK))

    def fn(flat, x):
        return x @ unravel(flat)["w"] + unravel(flat)["b"]

    x = normal(2, 2, 24)
    with pytest.warns(nesjax.MaterialiseWarning, match="reshape of a vector"):
        outputs = nesjax.population_apply(fn, flat, noise, x)
    expected = np.stack([fn(nesjax.materialise(flat, noise, i), x) for i in range(N)])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    nesjax.population_apply(lambda flat: jnp.sum(jnp.exp(flat)), flat, noise, strict=True)


def test_undeclared_scan_names_the_remedy_which_works():
    params, x = {"layers": weight(0, 3, 24, 24)}, normal(1, 2, 24)

    def run(noise_rules):
        noise = nesjax.sample_noise(KEY, params, population(noise_rules))
        return jax.jit(lambda params: nesjax.population_apply(undeclared_scan, params, noise, x))(params)

    with pytest.warns(nesjax.MaterialiseWarning, match=r"nesjax\.Stacked"):
        run(LOW_RANK)
    assert run({"layers": nesjax.Stacked(LOW_RANK)}).shape == (N, 2, 24)


def test_gradient_with_an_unsupported_operation():
    """value_and_grad warns by default, refuses if strict, and gives the same gradient as an equal supported loss."""
    w, x = weight(0, 24, 40), normal(1, 2, 24)
    settings = population(LOW_RANK)

    def shuffled(w, x):
        return jnp.mean((x @ w[:, (jnp.arange(40) + 3) % 40]) ** 2)

    def plain(w, x):
        return jnp.mean((x @ w) ** 2)

    with pytest.warns(nesjax.MaterialiseWarning, match=r"\bgather\b"):
        loss, grads = jax.jit(nesjax.value_and_grad(shuffled, settings))(w, KEY, x)
    expected_loss, expected = jax.jit(nesjax.value_and_grad(plain, settings, strict=True))(w, KEY, x)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-3)
    np.testing.assert_allclose(grads, expected, rtol=1e-2, atol=1e-2 * float(jnp.abs(expected).max()))
    with pytest.raises(ValueError, match=r"\bgather\b.*strict=True"):
        nesjax.value_and_grad(shuffled, settings, strict=True)(w, KEY, x)
