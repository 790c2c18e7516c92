"""Whatever is passed: a right result (laws 1 and 2), or a ValueError or TypeError of ours that names what is wrong.

`check` draws one case by hypothesis: parameters' shapes and dtypes, what is done with them, families, rules, the
population, mapped axes; in every third case one thing is wrong. `python -m benchmarks properties` runs 10,000.
"""

import collections
import math
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import families
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import nesjax
from benchmarks.measure import quickly

PACKAGE = str(pathlib.Path(nesjax.__file__).parent)
SIZES = st.sampled_from((1, 2, 3, 5, 8))
DTYPES = st.sampled_from(("float32", "float32", "float32", "bfloat16", "float16"))
SETTINGS = {  # of a family that isn't here: the defaults
    nesjax.LowRank: st.builds(nesjax.LowRank, st.integers(1, 3), st.sampled_from(("rademacher", "normal"))),
    nesjax.SignFlip: st.builds(
        nesjax.SignFlip, st.sampled_from(("in", "out", "both")), st.sampled_from(("rademacher", "normal"))
    ),
    nesjax.Permuted: st.builds(
        nesjax.Permuted, st.sampled_from(("auto", "in", "out", "both")), st.sampled_from((None, 1, 2, 0.5)),
        st.sampled_from((None, 1, 3, 0.3)), st.booleans(),
    ),
    nesjax.Sparse: st.builds(nesjax.Sparse, st.integers(1, 3)),
}  # fmt: skip
FAMILIES = st.one_of(*(SETTINGS.get(type(family), st.just(family)) for family in families.FAMILIES))


def contract(axis: int) -> Callable:
    return lambda w, x: jnp.tensordot(vector(x, w.shape[axis]), w, ((1,), (axis,)))


def vector(x: jax.Array, size: int) -> jax.Array:
    """`[2, size]` of the numbers in `x: [16]`."""
    return jnp.resize(x, (2, size)).astype(x.dtype)


def convolve(w: Any, x: jax.Array) -> jax.Array:
    rank = w.ndim - 2
    image = jnp.resize(x, (1, *(4,) * rank, w.shape[-2])).astype(x.dtype)
    numbers = ((0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank)), (0, rank + 1, *range(1, rank + 1)))
    numbers = jax.lax.ConvDimensionNumbers(*numbers)
    return jax.lax.conv_general_dilated(image, w, (1,) * rank, "SAME", dimension_numbers=numbers)


def scanned(w: Any, x: jax.Array) -> jax.Array:
    """A loop in which `w` stays, over steps."""
    return jax.lax.scan(lambda total, at: (total + (at * vector(x, w.shape[0]) @ w).sum(), at), jnp.zeros((), x.dtype),
                        jnp.arange(3).astype(x.dtype))[0]  # fmt: skip


def layers(w: Any, x: jax.Array) -> jax.Array:
    """A loop over the layers that `w` stacks."""
    return jax.lax.scan(lambda total, layer: (total + (vector(x, layer.shape[0]) @ layer).sum(), None),
                        jnp.zeros((), x.dtype), w)[0]  # fmt: skip


# What is done with a parameter `w`, given numbers `x: [16]`, and for which dimensions.
USES: dict[str, tuple[Callable, range]] = {
    "elementwise": (lambda w, x: jnp.tanh(w) * x[0], range(0, 5)),
    "rows": (lambda w, x: w[jnp.arange(4) % w.shape[0]] * x[0], range(1, 5)),
    "contract first": (contract(0), range(1, 5)),
    "contract last": (contract(-1), range(1, 5)),
    "matmul": (lambda w, x: vector(x, w.shape[-2]) @ w, range(2, 5)),
    "transposed": (lambda w, x: vector(x, w.shape[-1]) @ jnp.swapaxes(w, -1, -2), range(2, 5)),
    "reshaped": (lambda w, x: vector(x, math.prod(w.shape[:-1])) @ w.reshape(-1, w.shape[-1]), range(2, 5)),
    "convolution": (convolve, range(3, 5)),
    "scanned": (scanned, range(2, 3)),
    "layers": (layers, range(3, 4)),
}


# What may be wrong, and what the message must then name.
WRONG: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "size 0": ("size", lambda case: case["population"].update(size=0)),
    "size 2.5": ("size", lambda case: case["population"].update(size=2.5)),
    "odd size": ("size", lambda case: case["population"].update(size=7, antithetic=True, group_size=1)),
    "group_size": ("group_size", lambda case: case["population"].update(group_size=5 * 8 * 3)),
    "std 0": ("std", lambda case: case["population"].update(std=0.0)),
    "std nan": ("std", lambda case: case["population"].update(std=math.nan)),
    "std rule": ("std", lambda case: case["population"].update(std={"nowhere": 0.1})),
    "std schedule": ("std", lambda case: case["population"].update(std=lambda step: 0.1)),
    "chunk_size 0": ("chunk_size", lambda case: case["population"].update(chunk_size=0)),
    "noise": ("noise", lambda case: case["population"].update(noise="LowRank")),
    "noise rule": ("noise", lambda case: case["population"].update(noise={"nowhere": nesjax.LowRank()})),
    "stack axes": ("p0", lambda case: case["population"].update(noise={"p0": nesjax.Stacked(axes=6)})),
    "integers": (
        "p0",
        lambda case: (
            case["params"].update(p0=np.ones((2, 3), np.int32)),
            case["population"].update(noise=nesjax.LowRank()),
        ),
    ),
    "no params": ("params", lambda case: case.update(params={}, uses={})),
    "in_axes": ("in_axes", lambda case: case.update(in_axes=(7,))),
    "slices": ("in_axes", lambda case: case.update(in_axes=(0,), slices=13)),
    "weights": ("weights", lambda case: case.update(weights=np.ones((3, 2), np.float32))),
    "key": ("key", lambda case: case.update(key=np.ones(5, np.float32))),
}


@st.composite
def inputs(draw: Callable) -> dict[str, Any]:
    """One case, as what `run` takes; `wrong` names what a message must name, or is None."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    params, uses, rules = {}, {}, {}
    for at in range(draw(st.integers(1, 2))):
        shape = tuple(draw(st.lists(SIZES, max_size=4)))
        params[f"p{at}"] = jnp.asarray(numbers.normal(size=shape), draw(DTYPES))
        name = draw(st.sampled_from([name for name, (_, dimensions) in USES.items() if len(shape) in dimensions]))
        uses[f"p{at}"] = name
        rule = draw(st.one_of(st.none(), FAMILIES, st.just(nesjax.Frozen())))
        if shape and (name == "layers" or draw(st.integers(0, 4)) == 0):
            axes = 1 if name == "layers" else draw(st.integers(1, len(shape)))
            rule = nesjax.Stacked(rule if isinstance(rule, nesjax.NoiseFamily) else None, axes)
        if rule is not None:
            rules[f"^p{at}$"] = rule
    pairs = draw(st.booleans())
    group = draw(st.sampled_from((1, 2, 4) if pairs else (1, 2, 3)))
    size = group * draw(st.integers(1, 4)) * (2 if pairs and group == 1 else 1)
    in_axes = draw(st.sampled_from((None, 0, (0,), (1,), (-1,))))
    case = {
        "params": params, "uses": uses, "in_axes": in_axes, "slices": size // group, "numbers": numbers,
        "weights": numbers.normal(size=size).astype(np.float32), "key": jax.random.key(draw(st.integers(0, 9))),
        "population": {
            "size": size, "std": draw(st.sampled_from((0.5, {"p": 0.25}))), "antithetic": pairs, "group_size": group,
            "noise": rules or draw(FAMILIES), "chunk_size": draw(st.sampled_from((None, 1, 2, 3, 100))),
        },
    }  # fmt: skip
    wrong = draw(st.sampled_from((None,) * (2 * len(WRONG)) + tuple(WRONG)))
    if wrong is not None:
        WRONG[wrong][1](case)
    return {**case, "wrong": wrong}


def run(case: dict[str, Any]) -> None:
    """Laws 1 and 2 on one case.

    Raises:
      AssertionError: a wrong result.
      ValueError, TypeError: bad input.
    """
    population = nesjax.Population(**case["population"])
    in_axes, slices = case["in_axes"], case["slices"]
    axis = in_axes[0] if isinstance(in_axes, tuple) else in_axes
    x = jnp.asarray(case["numbers"].normal(size=(slices, 16)), jnp.float32)
    x = x[0] if axis is None else x.T if axis in (1, -1) else x
    fns = {name: USES[use][0] for name, use in case["uses"].items()}

    def fn(params, x):
        return {name: use(params[name], x.astype(params[name].dtype)) for name, use in fns.items()}

    @jax.jit
    def both(params, key, x, weights):
        noise = nesjax.sample_noise(key, params, population)
        outputs = nesjax.population_apply(fn, params, noise, x, in_axes=in_axes)
        members = jax.vmap(lambda i: nesjax.materialise(params, noise, i))(jnp.arange(population.size))
        own = x if axis is None else jnp.repeat(x, population.group_size, axis)
        expected = jax.vmap(fn, (0, axis))(members, own)
        return outputs, expected, members, nesjax.weighted_sum(noise, weights)

    outputs, expected, members, total = both(case["params"], case["key"], x, case["weights"])
    for name, param in case["params"].items():
        eps = float(jnp.finfo(param.dtype).eps)
        f32 = lambda x: np.asarray(x, np.float32)
        assert outputs[name].shape == expected[name].shape and outputs[name].dtype == expected[name].dtype
        size = 1 + np.abs(f32(expected[name])).max() + np.abs(f32(members[name])).sum(0).max()
        np.testing.assert_allclose(f32(outputs[name]), f32(expected[name]), atol=30 * eps * size, err_msg="law 1")
        assert total[name].shape == param.shape and total[name].dtype == param.dtype
        summed = np.tensordot(case["weights"], f32(members[name]) - f32(param), 1)
        size = np.abs(case["weights"]).sum() * (1 + np.abs(f32(members[name])).max())
        np.testing.assert_allclose(f32(total[name]), summed, atol=10 * eps * size, err_msg="law 2")


def check(case: dict[str, Any]) -> str:
    """Runs a case; what came of it: "right" or "refused".

    Raises:
      AssertionError: neither.
    """
    named = case["wrong"] and WRONG[case["wrong"]][0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nesjax.MaterialiseWarning)
            run(case)
    except (ValueError, TypeError) as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        assert frame.tb_frame.f_code.co_filename.startswith(PACKAGE), f"not an error of ours: {error!r}"
        by_chance = r"sparsity|Sparse k|freezes every parameter"  # a family that doesn't fit, or rules for nothing
        expected = f"{re.escape(named)}|{by_chance}" if named else by_chance
        found = re.search(expected, str(error))
        assert found, f"{named} is not named by: {error}" if named else f"nothing was wrong, but: {error}"
        return "refused"
    assert named is None, f"wrong {case['wrong']} was not noticed"
    return "right"


def many(count: int, seed: int = 0) -> dict[str, int]:
    """How many of `count` cases came out how; raises AssertionError, with the smallest case, if any came out wrong."""
    found = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(inputs())
    def one(case):
        found[check(case)] += 1
        if sum(found.values()) % 200 == 0:
            jax.clear_caches()  # thousands of programs

    with quickly():
        one()
    return dict(found)
