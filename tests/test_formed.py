"""The warning of formed parameters: one a call, at the user's line."""

import inspect
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import nesjax

KEY = jax.random.key(0)
X = jnp.ones((2, 3, 4))


def sorts(w):
    return jnp.sort(w).sum()  # formed: jax.jit cuts the traceback here


def scans(w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), X, w)[0]  # formed: without Stacked


def branches(w):
    return X @ jax.lax.cond(X[0, 0, 0] > 9, jnp.zeros_like, lambda w: w, w[0])  # formed: by one branch only


def lstm(params):
    return LSTM.apply(params, X)


def layer(linear):
    return jax.vmap(linear)(X[0]).sum() + jnp.exp(linear.weight).sum()  # formed: elementwise


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
        read = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        kernels = [leaf for leaf in jax.tree.leaves(self.variables) if leaf.ndim > 1]
        return read, jax.tree.map(jnp.sort, kernels)  # formed: many parameters at one line


LSTM = Cell()
CASES = {
    "jit": (sorts, jnp.ones((3, 4)), sorts, 1),
    "scan": (scans, jnp.ones((3, 4, 4)), scans, 1),
    "cond": (branches, jnp.ones((1, 4, 4)), branches, 1),
    "LSTM": (lstm, LSTM.init(KEY, X), Cell, 8),
    "Equinox": (layer, eqx.nn.Linear(4, 3, key=KEY), layer, 1),
}


@pytest.mark.parametrize("fn, params, source, count", CASES.values(), ids=CASES)
def test_one_warning_a_call_at_the_users_line(fn, params, source, count):
    noise = nesjax.sample_noise(KEY, params, nesjax.Population(2, std=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(lambda params: nesjax.population_apply(fn, params, noise), params)
    (warning,) = [each for each in caught if each.category is nesjax.MaterialiseWarning]
    lines, first = inspect.getsourcelines(source)
    (at,) = [first + at for at, line in enumerate(lines) if "# formed" in line]
    assert (warning.filename, warning.lineno) == (__file__, at)
    assert str(warning.message).count(f"{__file__}:{at}") == str(warning.message).count("bytes each") == count
    with pytest.raises(ValueError, match=rf"{__file__}:{at}\)\. strict=True"):
        jax.eval_shape(lambda params: nesjax.population_apply(fn, params, noise, strict=True), params)


def test_a_bare_array_is_called_params():
    noise = nesjax.sample_noise(KEY, jnp.ones((3, 4)), nesjax.Population(2, std=0.1))
    with pytest.warns(nesjax.MaterialiseWarning, match=r"\n  params: sort .*\(48 bytes each"):
        nesjax.population_apply(sorts, jnp.ones((3, 4)), noise)
