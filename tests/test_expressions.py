"""Expressions of parameters: right, and formed, with a word or refused if strict, only where nothing else is known."""

import contextlib
import dataclasses
import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from models import KEY, LOW_RANK, PERMUTED, Model, N, dense_arrays, normal, population, traced_pass, weight

import nesjax

# The rules know no family, so a second one is a slow test.
each_kind = pytest.mark.parametrize(
    "family", [LOW_RANK, pytest.param(PERMUTED, marks=pytest.mark.slow)], ids=["LowRank", "Permuted"]
)


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


@each_kind
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


COLUMNS = {"weight normalisation"}  # whose squares are summed one by one, which permuted outputs don't allow
OTHERS = [pytest.param(name, PERMUTED, marks=() if name in COLUMNS else pytest.mark.slow) for name in LAZY]


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


@pytest.mark.parametrize("name, family", [*((name, LOW_RANK) for name in LAZY), *OTHERS])
def test_linear_expressions_are_right_without_a_warning(name, family):
    """Sums, scalings and concatenations: every member's value, and strict=True accepts them."""
    fn, strict = LAZY[name], family is LOW_RANK or name not in COLUMNS
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
