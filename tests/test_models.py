"""Whole models: the batched pass equals each member on its own, forms no dense noise, and gives a gradient."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import (
    ALIKE,
    BOTH,
    KEY,
    LOW_RANK,
    LOW_RANK_ONLY,
    PERMUTED,
    STD,
    Model,
    N,
    dense_arrays,
    linen,
    linen_mlp,
    normal,
    plain_scan,
    population,
    traced_pass,
    weight,
)

import nesjax

LOW_RANK_CASES = [(build, LOW_RANK) for build in (*BOTH, *LOW_RANK_ONLY)]
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
