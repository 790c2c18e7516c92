"""Law 7: what an estimate of the gradient is worth, for every family: unbiased, and as close as `max_cosine` says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, each_variant
from models import normal

import nesjax


@pytest.mark.parametrize("baseline", [None, "mean", "leave_one_out", "unperturbed"])
@pytest.mark.parametrize("family", [*FAMILIES, nesjax.Permuted("both")], ids=str)
def test_estimate_is_unbiased_on_a_quadratic(family, baseline):
    """The mean over keys is the gradient, (N - 1) / N of it with the mean baseline, within 5 standard errors."""
    w, y, size = 0.2 * normal(0, 12, 9), normal(1, 8, 9), 16

    def loss_fn(w, x, offset):
        return jnp.mean((x @ w - y) ** 2) - offset

    es_grad = nesjax.value_and_grad(loss_fn, nesjax.Population(size, std=0.1, noise=family), baseline=baseline)
    estimate = jax.jit(lambda keys, *args: jax.lax.map(lambda key: es_grad(w, key, *args)[1], keys))
    for x in (normal(2, 8, 12), jnp.abs(normal(2, 8, 12))):  # signed; never negative, as after a ReLU
        offset = 0.95 * loss_fn(w, x, 0.0) if baseline is None else 0.0  # or the loss itself would be most of the noise
        got = np.asarray(estimate(jax.random.split(jax.random.key(11), 600), x, offset), np.float64)
        right = np.asarray(jax.grad(loss_fn)(w, x, 0.0)) * ((size - 1) / size if baseline == "mean" else 1)
        error = got.std(0) / len(got) ** 0.5
        assert (np.abs(got.mean(0) - right) < 5 * error).all()
        along = (got * right).sum((1, 2)) / (right**2).sum()  # along the gradient, where there is little noise
        assert along.mean() == pytest.approx(1, abs=5 * along.std() / len(got) ** 0.5)
        assert along.std() / len(got) ** 0.5 < 0.05


def worth(family, shape: tuple[int, ...], size: int = 64, count: int = 8_000) -> tuple[float, float]:
    """The cosine that infinitely many members would reach on a linear loss, and the dimensions that few are up against.

    Both from second moments over random gradients `g` and keys. For estimates `a` and `b` by the two halves of a
    population, `E <a, b>` is the squared length of what their shared part lets them all see; what `|(a + b) / 2|^2` has
    beyond it falls as 1 / N.
    """
    population = nesjax.Population(size, std=1.0, noise=family)

    def moments(key):
        g = jax.random.normal(key, shape)
        noise = nesjax.sample_noise(jax.random.fold_in(key, 1), g, population)
        losses = nesjax.population_apply(lambda w: jnp.vdot(w, g), jnp.zeros(shape), noise)
        first = jnp.arange(size) < size // 2
        a, b = (nesjax.weighted_sum(noise, jnp.where(half, losses, 0)) / (size / 2) for half in (first, ~first))
        both = (a + b) / 2
        return jnp.stack([jnp.vdot(both, g), jnp.vdot(both, both), jnp.vdot(a, b), jnp.vdot(g, g)])

    keys = jax.random.split(jax.random.key(4), count)
    found = jax.jit(lambda keys: jax.lax.map(moments, keys, batch_size=100))(keys)
    along, length, seen, truth = np.asarray(found, np.float64).mean(0)
    return along / math.sqrt(seen * truth), size * (length - (1 - 1 / size) * seen) / truth


@each_variant
def test_quality_is_what_max_cosine_says(family):
    """The cosine is `(1 / max_cosine^2 + d / N)^(-1/2)` for d entries.

    `d` is a little more where the noise's own length varies, and `prod(1 + 2 / size)` times as much, over the axes, for
    products of normal factors: with rank r, the share 1 / r of them meet.
    """
    shape = (2, 5, 4)
    expected = family.for_shape(shape).max_cosine(shape)
    limit, dimensions = worth(family, shape)
    assert limit == pytest.approx(expected, abs=0.01)
    d = math.prod(shape)
    if family == nesjax.LowRank(2, "normal"):
        d *= 1 + (math.prod(1 + 2 / size for size in shape) - 1) / 2
    assert 0.97 * d < dimensions < 1.3 * d


def test_a_wrong_base_is_noticed():
    """The closed form at this tolerance tells a normal base from a base of signs, for one flipped side, too."""

    class Wrong(nesjax.SignFlip):
        def sample_shared(self, key, shape, dtype):
            return jax.random.normal(key, shape, dtype)

    with pytest.raises(AssertionError, match=r"± 0\.01"):
        test_quality_is_what_max_cosine_says(Wrong("out"))
