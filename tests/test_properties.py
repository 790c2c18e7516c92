"""Thirty cases of `properties.py`: a right result, or an error of ours that names what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import properties
import pytest

import nesjax


def test_right_or_refused():
    found = properties.many(30, seed=100)
    assert found["right"] > 12 and found["refused"] > 5


def case(**changes):
    population = {"size": 4, "std": 0.5, "noise": {}, **changes}
    return {
        "params": {"p0": jnp.ones((3, 2))}, "uses": {"p0": "matmul"}, "in_axes": 0, "slices": 4, "wrong": None,
        "numbers": np.random.default_rng(0), "weights": np.ones(4, np.float32), "key": jax.random.key(0),
        "population": population,
    }  # fmt: skip


def test_the_check_notices_what_is_not_right(monkeypatch):
    assert properties.check(case()) == "right" and properties.check({**case(size=0), "wrong": "size 0"}) == "refused"
    with pytest.raises(AssertionError, match="nothing was wrong, but: size must be"):
        properties.check(case(size=0))
    with pytest.raises(AssertionError, match="was not noticed"):
        properties.check({**case(), "wrong": "size 0"})
    with pytest.raises(AssertionError, match="weights is not named by: size"):
        properties.check({**case(size=0), "wrong": "weights"})
    monkeypatch.setitem(properties.USES, "misfit", (lambda w, x: jnp.ones((2, 7)) @ w, range(2, 3)))
    with pytest.raises(AssertionError, match="not an error of ours"):
        properties.check({**case(), "uses": {"p0": "misfit"}})
    right = nesjax.weighted_sum
    monkeypatch.setattr(nesjax, "weighted_sum", lambda *args: jax.tree.map(lambda x: 1.01 * x, right(*args)))
    with pytest.raises(AssertionError, match="law 2"):
        properties.check(case())
    monkeypatch.setattr(nesjax, "materialise", lambda params, noise, i: params)
    with pytest.raises(AssertionError, match="law 1"):
        properties.check(case())
