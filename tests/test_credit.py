"""Credit by inputs: against the projection of materialised members, in NumPy, and against the plain estimate."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nesjax

STD, SIZE = 0.01, 8


class Log:
    """Products whose inputs are remembered: what the reference projects on, found without nesjax."""

    def __init__(self):
        self.inputs = {}

    def __call__(self, name, x, w):
        self.inputs.setdefault(name, []).append(np.asarray(x, np.float64).reshape(-1, w.shape[0]))
        return x @ w


def plain(name, x, w):
    return x @ w


def mlp(params, x, dot=plain):
    return jnp.sum(jnp.tanh(dot("b", jnp.tanh(dot("a", x, params["a"])), params["b"])) ** 2)


def attention(params, x, dot=plain):
    """A transformer block on `x: [T, 12]`."""
    q, k, v = (dot(name, x, params[name]) for name in "qkv")
    x = x + dot("o", jax.nn.softmax(q @ k.T / 3) @ v, params["o"])
    return jnp.sum(jnp.sin(x + dot("down", jax.nn.gelu(dot("up", x, params["up"])), params["down"])))


def gru(params, x, dot=plain):
    """A recurrent cell by `lax.scan` over `x: [T, 12]`, or by a Python loop where inputs are remembered."""

    def cell(h, row):
        z = jax.nn.sigmoid(dot("u", h, params["u"]) + dot("w", row, params["w"]))
        return z * h + (1 - z) * jnp.tanh(dot("v", row, params["v"])), None

    h = jnp.ones(12) / 3
    if dot is plain:
        h, _ = jax.lax.scan(cell, h, x)
    else:
        for row in x:
            h, _ = cell(h, row)
    return jnp.sum(h**2)


def matrices(*shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, *shape) in zip(keys, shapes)}


MODELS = {
    "mlp": (mlp, matrices(("a", 12, 7), ("b", 7, 5)), (12,)),
    "attention": (attention, matrices(*((n, 12, 12) for n in "qkvo"), ("up", 12, 20), ("down", 20, 12)), (8, 12)),
    "gru": (gru, matrices(*((n, 12, 12) for n in "uvw")), (5, 12)),
}


def projected(params, loss, x, noise, weights):
    """`sum_i weights[i] X_i^+ X_i (member_i - params) / std` for each parameter, in float64."""
    total = {name: np.zeros(w.shape) for name, w in params.items()}
    for i, weight in enumerate(weights):
        member, log = nesjax.materialise(params, noise, i), Log()
        loss(member, x[i], log)
        for name, found in log.inputs.items():
            rows = np.concatenate(found)
            e = (np.asarray(member[name], np.float64) - np.asarray(params[name], np.float64)) / STD
            total[name] += weight * np.linalg.pinv(rows) @ (rows @ e)
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("antithetic", (False, True))
def test_the_gradient_is_the_projection(name, antithetic):
    loss, params, shape = MODELS[name]
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    population = nesjax.Population(size=SIZE, std=STD, antithetic=antithetic)
    x, key = jax.random.normal(jax.random.key(1), (SIZE, *shape)), jax.random.key(2)
    with jax.default_matmul_precision("highest"):
        es_grad = nesjax.value_and_grad(loss, population, credit="inputs", baseline=None, in_axes=0)
        value, grads = jax.jit(es_grad)(params, key, x)
        noise = nesjax.sample_noise(key, params, population)
        losses = nesjax.population_apply(loss, params, noise, x, in_axes=0)
        weights = np.asarray(losses, np.float64) / SIZE / STD
        if antithetic:
            weights = np.repeat((weights[::2] - weights[1::2]) / 2, 2) * np.tile([1, -1], SIZE // 2)
        expected = projected(params, loss, x, noise, weights)
    assert abs(float(value) - float(losses.mean())) < 1e-5
    for path, want in expected.items():
        np.testing.assert_allclose(grads[path], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=path)
