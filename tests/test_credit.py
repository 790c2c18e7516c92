"""Credit by inputs: against the projection of materialised members, in NumPy, and against the plain estimate."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nesjax
from nesjax import CreditWarning

STD, SIZE = 0.01, 8


class Log:
    """Products whose inputs are remembered: what the reference projects on, found without nesjax."""

    def __init__(self):
        self.inputs = {}

    def __call__(self, name, x, w):
        self.inputs.setdefault(name, []).append(np.asarray(x, np.float64).reshape(-1, w.shape[-2]))
        return x @ w


def plain(name, x, w):
    return x @ w


def mlp(params, x, dot=plain):
    return jnp.sum(jnp.tanh(dot("b", jnp.tanh(dot("a", x, params["a"])), params["b"])) ** 2)


def attention(params, x, dot=plain):
    """A transformer block on 8 tokens, `x: [8, 12]`."""
    q, k, v = (dot(name, x, params[name]) for name in "qkv")
    x = x + dot("o", jax.nn.softmax(q @ k.T / 2) @ v, params["o"])
    return jnp.sum(jnp.sin(x + dot("down", jax.nn.gelu(dot("up", x, params["up"])), params["down"])))


def gru(params, x, dot=plain):
    """A recurrent cell by `lax.scan` over `x: [T, 12]`, or by a Python loop where inputs are remembered."""

    def cell(h, row):
        z = jax.nn.sigmoid(dot("u", h, params["u"]) + dot("w", row, params["w"]))
        return z * h + (1 - z) * jnp.tanh(dot("v", row, params["v"])), None

    h = jnp.ones(12) / 3
    if dot is plain:
        h, _ = jax.jit(lambda h, x: jax.lax.scan(cell, h, x))(h, x)
    else:
        for row in x:
            h, _ = cell(h, row)
    return jnp.sum(h**2)


def residual(params, x, dot=plain):
    """Layers stacked along the first axis, by `lax.scan`; each is fed a sequence by a scan of its own."""

    def layer(x, w):
        _, y = jax.lax.scan(lambda h, row: (h + row, jnp.tanh(row @ w)), x[0], x)
        return x + y, None

    if dot is plain:
        x, _ = jax.lax.scan(layer, x, params["layers"])
    else:
        for at, w in enumerate(params["layers"]):
            x = x + jnp.tanh(dot(f"layers {at}", x, w))
    return jnp.sum(x**2)


def experts(params, x, dot=plain):
    """One product for a stack of matrices, each with inputs of its own."""
    x = jnp.stack([x, jnp.sin(x)])
    if dot is plain:
        return jnp.sum(jnp.einsum("eti,eio->eto", x, params["layers"]) ** 2)
    return sum(jnp.sum(dot(f"layers {at}", x[at], w) ** 2) for at, w in enumerate(params["layers"]))


def convolution(params, x, dot=plain):
    """A 3 x 3 convolution of a 4 x 4 image: 16 patches of 27 inputs."""
    x = x.reshape(1, 4, 4, 3)
    if dot is plain:
        dims = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=dims) ** 2)
    padded = jnp.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    patches = jnp.stack([padded[i : i + 3, j : j + 3].reshape(-1) for i in range(4) for j in range(4)])
    return jnp.sum(dot("k", patches, params["k"].reshape(27, -1)) ** 2)


def embedding(params, x, dot=plain):
    """Rows of a table, one of them twice."""
    rows = jnp.argsort(x)[jnp.array([0, 1, 1, 2])]
    if dot is plain:
        return jnp.sum(jnp.sin(params["table"][rows] * jnp.arange(1, 5)[:, None]))
    return jnp.sum(jnp.sin(dot("table", np.eye(12)[rows], params["table"]) * np.arange(1, 5)[:, None]))


def matrices(*shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {name: jax.random.normal(key, shape) / shape[-2] ** 0.5 for key, (name, *shape) in zip(keys, shapes)}


MODELS = {
    "mlp": (mlp, matrices(("a", 12, 7), ("b", 7, 5)), (12,)),
    "attention": (attention, matrices(*((n, 12, 12) for n in "qkvo"), ("up", 12, 20), ("down", 20, 12)), (8, 12)),
    "gru": (gru, matrices(*((n, 12, 12) for n in "uvw")), (5, 12)),
    "stacked": (residual, matrices(("layers", 3, 12, 12)), (4, 12)),
    "experts": (experts, matrices(("layers", 2, 12, 7)), (4, 12)),
    "convolution": (convolution, matrices(("k", 3, 3, 3, 6)), (48,)),
    "embedding": (embedding, matrices(("table", 12, 7)), (12,)),
}
STACKED = {"layers": nesjax.Stacked(axes=1)}


def projections(params, loss, x, noise):
    """Each member's `X^+ X (member - params)`, signed and in units of std: a tree like params, in float64."""
    member, log = jax.tree.map(np.asarray, noise), Log()
    loss(member, x, log)

    def project(name, theta):
        rows, e = np.concatenate(log.inputs[name]), np.asarray(theta, np.float64)
        return np.linalg.pinv(rows) @ rows @ e.reshape(rows.shape[1], -1)

    def of_leaf(name, w):
        e = (np.asarray(member[name], np.float64) - np.asarray(params[name], np.float64)) / STD
        if name == "layers":
            return np.stack([project(f"layers {at}", e[at]) for at in range(len(e))])
        return project(name, e).reshape(w.shape)

    return {name: of_leaf(name, w) for name, w in params.items()}


def reference(params, loss, x, population, key, weights):
    """`sum_i weights[i] P_i`, with weights `[N]` or `[N, K]` of the members' calls."""
    noise = nesjax.sample_noise(key, params, population)
    total = {name: np.zeros(w.shape) for name, w in params.items()}
    weights = weights.reshape(SIZE, -1)
    group = SIZE // len(x)
    for i in range(SIZE):
        theta = nesjax.materialise(params, noise, i)
        for k in range(weights.shape[1]):
            mine = x[i // group] if weights.shape[1] == 1 else x[i // group][k]
            for name, p in projections(params, loss, mine, theta).items():
                total[name] += weights[i, k] * p
    return total


def pairs(weights):
    """Partners share their weights' difference: their noise is opposite, and so is the sign that it has here."""
    half = (weights[0::2] - weights[1::2]) / 2
    return np.stack([half, -half], 1).reshape(weights.shape)


def assert_close(grads, expected, bound=1e-5):
    for name, want in expected.items():
        np.testing.assert_allclose(grads[name], want, rtol=0, atol=bound * np.abs(want).max(), err_msg=name)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def losses_of(params, loss, x, population, key):
    noise = nesjax.sample_noise(key, params, population)
    return np.asarray(nesjax.population_apply(loss, params, noise, x, in_axes=0), np.float64)


@pytest.mark.parametrize("antithetic", (False, True))
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_projection(name, antithetic):
    loss, params, shape = MODELS[name]
    noise = STACKED if "layers" in params else nesjax.LowRank()
    population = nesjax.Population(size=SIZE, std=STD, antithetic=antithetic, noise=noise)
    x, key = jax.random.normal(jax.random.key(1), (SIZE, *shape)), jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, population, credit="inputs", baseline=None, in_axes=0)
    value, grads = jax.jit(es_grad)(params, key, x)
    losses = losses_of(params, loss, x, population, key)
    weights = pairs(losses) if antithetic else losses
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    assert_close(grads, reference(params, loss, x, population, key, weights / SIZE / STD), 3e-5)


def mean(losses):
    return losses - losses.mean(0)


OPTIONS = {
    "mean": ({"baseline": "mean"}, {}, mean),
    "leave one out": ({"baseline": "leave_one_out"}, {}, lambda losses: mean(losses) * SIZE / (SIZE - 1)),
    "leave one out, pairs": (
        {"baseline": "leave_one_out"}, {"antithetic": True}, lambda losses: pairs(mean(losses) * SIZE / (SIZE - 1)),
    ),
    "groups": (
        {"baseline": "mean"}, {"group_size": 4},
        lambda losses: (losses.reshape(2, 4, -1) - losses.reshape(2, 4, -1).mean(1, keepdims=True)).reshape(losses.shape),
    ),
    "groups of pairs": ({"baseline": "mean"}, {"group_size": 4, "antithetic": True}, pairs),
    "ranks": ({"shaping": nesjax.centered_rank}, {}, None),
    "ranks, pairs": ({"shaping": nesjax.centered_rank}, {"antithetic": True}, None),
    "signs of pairs": ({"shaping": nesjax.pair_sign}, {"antithetic": True}, None),
    "unperturbed": ({"baseline": "unperturbed"}, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("chunk_size", (None, 4, 6))
@pytest.mark.parametrize("samples", (None, 3))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, samples, chunk_size):
    """Baselines, shapings, pairs, groups and several samples, whole or in chunks (of which one needn't divide)."""
    options, settings, weigh = OPTIONS[name]
    population = nesjax.Population(size=SIZE, std=STD, chunk_size=chunk_size, **settings)
    loss, params, _ = MODELS["mlp"]
    slices = SIZE // population.group_size
    x = jax.random.normal(jax.random.key(1), (slices, *(() if samples is None else (samples,)), 12))
    key = jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, population, credit="inputs", samples=samples, in_axes=0, **options)
    value, grads = jax.jit(es_grad)(params, key, x)
    calls = loss if samples is None else jax.vmap(loss, (None, 0))
    losses = losses_of(params, calls, x, population, key)
    if name == "unperturbed":
        weights = losses - np.asarray(jax.vmap(calls, (None, 0))(params, x), np.float64)
    elif weigh is not None:
        weights = weigh(losses)
    else:  # sample by sample
        columns = jnp.asarray(losses.reshape(SIZE, -1).T)
        weights = np.asarray(jax.vmap(options["shaping"])(columns), np.float64).T.reshape(losses.shape) * STD
        weights = pairs(weights) if population.antithetic else weights
    expected = reference(params, loss, x, population, key, weights / SIZE / STD / (samples or 1))
    assert_close(grads, expected, 1e-4)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
