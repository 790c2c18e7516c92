"""Dense layers in a program: what is taken for one, and that it stays what it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import KEY, normal
from jax.extend.core import jaxpr_as_fun

import nesjax
from nesjax import LowRank
from nesjax.dense import dense_p, in_float32
from nesjax.primal import primal_jaxpr

W, B, X = normal(0, 8, 8), normal(1, 8), normal(2, 8, 8)  # square, so that axes can be mistaken for others
PARAMS = {"w": W, "b": B}


def layers(fn, *args):
    """The equations of `fn`'s dense layers, checked to compute what it does; and how many products are in none."""
    closed, _ = primal_jaxpr(fn, *args, layers=True)
    np.testing.assert_array_equal(jaxpr_as_fun(closed)(*args)[0], fn(*args))
    names = [eqn.primitive.name for eqn in closed.eqns]
    return [eqn for eqn in closed.eqns if eqn.primitive is dense_p], names.count("dot_general")


@pytest.mark.parametrize(
    "fn, follow, biased",
    [
        (lambda x, w, b: nn.relu(x @ w + b), "add relu", True),
        (lambda x, w, b: b + x @ w, "add", True),
        (lambda x, w, b: jnp.tanh(x @ w), "tanh", False),
        (lambda x, w, b: jnp.tanh(x @ w) * b, "tanh", False),  # no activation has numbers of its own
        (lambda x, w, b: nn.relu(x @ w + b) + x, "add relu", True),  # nor another array
        (lambda x, w, b: x @ w + b[:, None], "", False),  # a number a row
        (lambda x, w, b: x @ w + b[::-1], "", False),
        (lambda x, w, b: jnp.tanh((x @ w).T), "", False),
        (lambda x, w, b: jnp.round(x @ w + b), "add", True),
        (lambda x, w, b: jnp.concatenate([y := x @ w, jnp.tanh(y)]), "", False),  # both are used
        (lambda x, w, b: jnp.tanh(y := x @ w + b) + y.sum(), "add", True),
        (lambda x, w, b: (x @ w + b).astype(jnp.int8).astype(jnp.float32), "add", True),
        (lambda x, w, b: jnp.tanh(x @ w + b).astype(jnp.bfloat16), "add tanh", True),
    ],
)
def test_what_a_layer_is(fn, follow, biased):
    found, others = layers(fn, X, W, B)
    assert others == (not follow)
    for eqn in found:
        names = [eqn.params.get("name", eqn.primitive.name) for eqn in eqn.params["tail"].eqns]
        assert len(eqn.invars) == 2 + biased
        assert [name for name in names if name not in ("reshape", "broadcast_in_dim")] == [
            {"relu": "jaxpr_as_fun"}.get(name, name) for name in follow.split()
        ]


ACTIVATIONS = (
    nn.relu, nn.gelu, nn.elu, nn.silu, nn.softplus, nn.sigmoid, nn.leaky_relu, nn.celu, nn.selu, jnp.tanh, jnp.square
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda fn: fn.__name__)
def test_activations_in_float32(activation):
    """Whole activations belong to a layer, and are computed of arrays of another shape; bfloat16 is no different."""
    y, bias = 3 * normal(3, 4, 5), normal(4, 4, 5)
    for dtype, precision in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):  # of an activation's numbers
        (layer,), _ = layers(lambda x, w, b: activation(x @ w + b), *(z.astype(dtype) for z in (X, W, B)))
        found = in_float32(layer.params["tail"], y, bias)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, activation(y + bias), rtol=precision, atol=0.1 * precision)


SUM_OF_PARAMETERS = lambda p, x: x @ (p["w"] + p["b"]) + jnp.concatenate([p["b"], p["w"][0]])[:8]  # not for Node


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: nn.relu(x @ p["w"] + p["b"]),
        lambda p, x: nn.gelu(x @ p["w"] + 0.1 * p["b"]) @ p["w"].T,
        SUM_OF_PARAMETERS,
        lambda p, x: jax.lax.scan(lambda y, _: (jnp.tanh(y @ p["w"] + p["b"]), p["b"]), x, None, length=2),
        lambda p, x: jax.lax.scan(lambda y, b: (y + b, None), 0.0, p["b"])[0] + x @ p["w"],
        lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda b: b, jnp.tanh, p["b"]) + jax.jit(jnp.dot)(x, p["w"]),
        lambda p, x: jax.checkpoint(lambda b: nn.relu(jax.vmap(lambda x: x @ p["w"] + b)(x)))(p["b"]),
        lambda p, x: (p["b"], jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: jnp.abs(y @ p["w"] + p["b"]) + y, x)),
    ],
)  # fmt: skip
def test_by_xla_it_is_what_it_was(fn):
    """To the bit, whatever becomes of a bias."""

    def run(fused, family):
        population = nesjax.Population(size=6, std=0.1, noise={"w": family(fused=fused), "b": LowRank(fused=fused)})
        return nesjax.population_apply(fn, PARAMS, nesjax.sample_noise(KEY, PARAMS, population), X)

    for family in (LowRank, nesjax.Node)[: 1 if fn is SUM_OF_PARAMETERS else 2]:
        jax.tree.map(np.testing.assert_array_equal, run(True, family), run(False, family))
