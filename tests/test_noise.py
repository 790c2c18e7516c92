"""Laws 1, 2 and 3 for every family and variant: fast paths, weighted sums, moments; and the contract of a family.

`E_i` is member i's noise and `materialise` its definition; everything is compared with it in float32.
"""

import dataclasses
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, VARIANTS, Unable, Uniform, each_family, each_variant
from models import normal

import nesjax
from nesjax import Permuted, SignFlip, Sparse
from nesjax.noise.low_rank import BLOCK, product_of_factors, sum_of_columns

N = 6
STD = 0.5


def conv(w, x, *, kernel_dims=None, groups=1, stride=1, dilation=1, padding="VALID"):
    rank = w.ndim - 2
    numbers = (
        (0, rank + 1, *range(1, rank + 1)),
        kernel_dims or (rank + 1, rank, *range(rank)),
        (0, rank + 1, *range(1, rank + 1)),
    )
    return jax.lax.conv_general_dilated(
        x, w, (stride,) * rank, padding, rhs_dilation=(dilation,) * rank, feature_group_count=groups,
        dimension_numbers=jax.lax.ConvDimensionNumbers(*numbers),
    )  # fmt: skip


def circular(w, x):
    module = nn.Conv(w.shape[-1], w.shape[:-2], padding="CIRCULAR", use_bias=False)
    return module.apply({"params": {"kernel": w}}, x)


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), with_jvp(*primals)))

X = normal(99, 5, 40)
ROWS = jnp.array([[3, 39, 0], [3, 3, 17]])
# A parameter's shape, and what is done with it. Uses of one shape are uses of one parameter.
USES = {
    "matmul": ((40, 24), lambda w: X @ w),
    "matmul, transposed": ((24, 40), lambda w: X @ w.T),
    "matmul from the left": ((24, 40), lambda w: w @ X.T),
    "vector": ((40, 24), lambda w: X[0] @ w),
    "batched einsum": ((3, 40, 24), lambda w: jnp.einsum("bi,eio->beo", X, w)),
    "batch axis of both": ((5, 40, 24), lambda w: jnp.einsum("bi,bio->bo", X, w)),
    "many outputs": ((40, 4, 6), lambda w: jnp.einsum("bi,ihk->bhk", X, w)),
    "many inputs": ((5, 8, 24), lambda w: jnp.einsum("bhk,hko->bo", X.reshape(5, 5, 8), w)),
    "reversed": ((40, 24), lambda w: X @ w[::-1, ::-1]),
    "squeezed": ((40, 24), lambda w: X @ w[:, None].squeeze(1)),
    "reshape": ((40, 24), lambda w: jnp.einsum("bi,ihk->bhk", X, w.reshape(40, 4, 6))),
    "reshape of both axes": ((40, 24), lambda w: X @ w.reshape(5, 8, 24).reshape(40, 24)),
    "transpose": ((4, 40, 6), lambda w: X @ w.transpose(1, 0, 2).reshape(40, 24)),
    "slice": ((50, 30), lambda w: X @ w[3:43, 1:29:2]),
    "split": ((40, 24), lambda w: (X @ jnp.split(w, 3, 1)[1]) * 2),
    "squeeze": ((1, 40, 24), lambda w: X @ w[0]),
    "broadcast": ((40, 24), lambda w: jnp.einsum("bi,eio->beo", X, jnp.broadcast_to(w, (2, 40, 24)))),
    "cast": ((40, 24), lambda w: X @ (0.5 * w.astype(jnp.bfloat16).astype(jnp.float32))),
    "lookup": ((40, 24), lambda w: w[ROWS]),
    "lookup, filled": ((40, 24), lambda w: jnp.take(w, ROWS + 20, axis=0, mode="fill", fill_value=0.0)),
    "lookup, vmapped": ((40, 24), lambda w: jax.vmap(lambda row: w[row])(ROWS)),
    "lookup of matrices": ((40, 6, 4), lambda w: w[ROWS]),
    "one row": ((40, 24), lambda w: jax.lax.dynamic_index_in_dim(w, ROWS[0, 0], keepdims=False)),
    "tied": ((24, 40), lambda w: (w[ROWS % 24] @ w.T)),
    "conv 1-D": ((3, 8, 6), lambda w: conv(w, X.reshape(5, 5, 8), padding="SAME")),
    "conv 2-D": ((3, 2, 10, 6), lambda w: conv(w, X.reshape(5, 2, 2, 10), padding="SAME", stride=2)),
    "conv 3-D": ((1, 2, 2, 10, 6), lambda w: conv(w, X.reshape(5, 1, 2, 2, 10), padding="SAME")),
    "conv of one pixel": ((1, 1, 10, 6), lambda w: conv(w, X.reshape(5, 2, 2, 10))),
    "conv, dilated": ((3, 4, 8), lambda w: conv(w, X.reshape(5, 10, 4), dilation=2)),
    "conv, circular": ((3, 3, 10, 6), lambda w: circular(w, X.reshape(5, 2, 2, 10))),
    "conv, grouped": ((3, 4, 6), lambda w: conv(w, X.reshape(5, 5, 8), groups=2)),
    "conv, channels first": ((6, 8, 3), lambda w: conv(w, X.reshape(5, 5, 8), kernel_dims=(0, 1, 2))),
    "quotient, negative": ((40, 24), lambda w: X @ (-w / 3)),
    "of integers": ((40, 24), lambda w: jnp.arange(40) @ jax.lax.stop_gradient(w)),
    "sum of squares": ((40, 24), lambda w: (w**2).sum()),
    "norms of rows and columns": ((24, 40), lambda w: [jnp.linalg.norm(w, axis=axis) for axis in (0, 1)]),
    "bias": ((40,), lambda w: X + w),
    "bias of two axes": ((5, 8), lambda w: X.reshape(5, 5, 8) + w),
    "scalar": ((), lambda w: X * w),
    "scan": ((40, 40), lambda w: jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), X, jnp.ones((3, 1, 1)))[1]),
    "while": ((40, 40), lambda w: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), X)),
    "while, unbounded": ((40, 40), lambda w: jax.lax.while_loop(lambda h: h[0, 0] < 9, lambda h: h**2 + 9 + X @ w, X)),
    "carried": ((40, 40), lambda w: jax.lax.fori_loop(0, 2, lambda _, c: (c[0], jnp.tanh(c[1] @ c[0])), (w, X))[1]),
    "cond": ((40, 24), lambda w: jax.lax.cond(X[0, 0] > 9, lambda w: 0 * (X @ w), lambda w: X @ w, w)),
    "jit": ((40, 24), lambda w: jax.jit(lambda w: X @ w)(w)),
    "vmap": ((40, 24), lambda w: jax.vmap(lambda x: x @ w)(X)),
    "remat": ((40, 24), lambda w: jax.checkpoint(lambda w: jnp.tanh(X @ w))(w)),
    "custom_vjp": ((40, 24), lambda w: with_vjp(X, w)),
    "custom_jvp": ((40, 24), lambda w: with_jvp(X, w)),
}  # fmt: skip


def run_uses(params):
    return {use: fn(params[str(shape)]) for use, (shape, fn) in USES.items()}


uses_of_all = jax.jit(jax.vmap(run_uses))  # of members' own parameters: one program for every family


def not_structural(family) -> set[tuple[str, str]]:
    """The parameters that a family must form, and the operations that ask for it: to be said, and only these."""
    dense = set()
    if isinstance(family, Permuted | SignFlip | Sparse):
        dense.add(("(6, 8, 3)", "conv_general_dilated"))  # these read a kernel's last two axes as in and out
    if isinstance(family, Sparse):
        dense |= {("(3, 4, 6)", "conv_general_dilated"), ("(40, 6, 4)", "gather")}
    permutes_inputs_alone = family in (Permuted("in"), Permuted(in_sparsity=0.5, with_replacement=True))
    if isinstance(family, Permuted) and not permutes_inputs_alone:
        dense.add(("(3, 4, 6)", "conv_general_dilated"))  # an output would leave its group
    if isinstance(family, Permuted) and family.with_replacement:
        dense |= {("(40, 24)", "gather"), ("(40, 24)", "dynamic_slice"), ("(24, 40)", "gather")}
    entries_are_sums = (isinstance(family, Permuted) and family.with_replacement) or family == Sparse(3)
    if entries_are_sums or isinstance(family, Uniform):
        dense |= {("(40, 24)", "square"), ("(24, 40)", "square")}
    elif isinstance(family, Permuted) and not permutes_inputs_alone:
        dense.add(("(24, 40)", "square"))  # no column's product alone
    return dense


@each_variant
def test_uses_and_weighted_sum_are_the_materialised_ones(family):
    """Laws 1 and 2: every use of a parameter, and `sum_i w_i (member_i - params)`."""
    shapes = {shape for shape, _ in USES.values()}
    params = {str(shape): 0.3 * normal(len(shape), *shape) for shape in sorted(shapes)}
    weights = normal(7, N)

    @jax.jit
    def run(params, key):
        noise = nesjax.sample_noise(key, params, nesjax.Population(N, std=STD, noise=family))
        members = jax.vmap(lambda i: nesjax.materialise(params, noise, i))(jnp.arange(N))
        return nesjax.population_apply(run_uses, params, noise), nesjax.weighted_sum(noise, weights), members

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nesjax.MaterialiseWarning)
        outputs, raw, members = run(params, jax.random.key(1))
    expected = uses_of_all(members)
    said = (line.strip().partition(": ") for warning in caught for line in str(warning.message).splitlines()[1:])
    assert {(path, operation.partition(" ")[0]) for path, _, operation in said} == not_structural(family)
    for use in USES:
        for got, right in zip(jax.tree.leaves(outputs[use]), jax.tree.leaves(expected[use]), strict=True):
            atol = 0.05 if use == "cast" else 3e-4  # the weight is rounded, the noise is not
            np.testing.assert_allclose(got, right, rtol=2e-4, atol=atol, err_msg=use)
    for path in params:
        moved = np.asarray(members[path]) - params[path]
        np.testing.assert_allclose(raw[path], np.tensordot(weights, moved, 1), rtol=1e-4, atol=1e-4, err_msg=path)
        assert np.ptp(moved, 0).max() > STD, path  # the members do differ


@each_family
def test_bfloat16_keeps_noise_that_rounding_would_lose(family):
    """Law 1 in bfloat16: the difference to the unperturbed output is the noise's product, summed in float32."""
    params = {"dense": jnp.ones((64, 32), jnp.bfloat16), "conv": jnp.ones((3, 3, 8, 16), jnp.bfloat16)}
    x, image = normal(0, 4, 64).astype(jnp.bfloat16), normal(1, 2, 6, 6, 8).astype(jnp.bfloat16)

    def fn(params):
        return {
            "dense": jnp.matmul(x, params["dense"], preferred_element_type=jnp.float32),
            "conv": jax.lax.conv_general_dilated(
                image, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                preferred_element_type=jnp.float32,
            ),
        }  # fmt: skip

    noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(N, std=2e-5, noise=family))
    zeros = jax.tree.map(jnp.zeros_like, params)
    outputs = jax.jit(lambda noise: nesjax.population_apply(fn, params, noise, strict=True))(noise)
    small = jax.jit(jax.vmap(lambda i: nesjax.materialise(zeros, noise, i)))(jnp.arange(N))
    expected, plain = jax.jit(jax.vmap(fn))(small), jax.jit(fn)(params)
    dense = jax.jit(jax.vmap(lambda i: nesjax.materialise(params, noise, i)))(jnp.arange(N))
    for name in params:
        error = np.linalg.norm(outputs[name] - plain[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 0.02, name
        assert (dense[name] == params[name]).all(), name  # adding it to the weights does round it away


SHAPES = [(6, 5), (3, 3, 4, 5), (7,), (), (4, 1), (1, 4)]
EVERYTHING = [(variant, shape) for variant in VARIANTS for shape in SHAPES]


@pytest.mark.parametrize("family, shape", [
    pytest.param(*case, marks=() if case[0] in FAMILIES or case[1] in SHAPES[:2] else pytest.mark.slow)
    for case in EVERYTHING
], ids=str)  # fmt: skip
def test_entries_have_mean_zero_and_variance_one(family, shape):
    """Law 3, over keys, so over the shared part too."""
    if isinstance(family, Sparse | Permuted) and len(shape) > 1:
        try:
            family.for_shape(shape)
        except ValueError:
            pytest.skip("larger than the layer")
    count = 4096
    population = nesjax.Population(2, std=1.0, noise=family)

    @jax.jit
    @jax.vmap
    def draw(key):
        return nesjax.materialise(jnp.zeros(shape), nesjax.sample_noise(key, jnp.zeros(shape), population), 1)

    e = np.asarray(draw(jax.random.split(jax.random.key(5), count)), np.float64)
    assert (np.abs(e.mean(0)) < 5 * e.std(0) / count**0.5).all()
    error = np.sqrt(np.maximum((e**4).mean(0) - 1, 0) / count)
    assert (np.abs((e**2).mean(0) - 1) < 5 * error + 1e-3).all()


# ---- the contract


@pytest.mark.parametrize("shape", [(40, 33), (3, 2, 20, 33)], ids=str)
def test_signs_in_bfloat16_sum_nearly_as_exactly_as_in_float32(shape):
    """What tensor cores multiply; compared with float64. TF32 would err by 2e-4, weights in one part by 2e-3."""
    family, weights = nesjax.LowRank(), normal(0, 512)
    keys = jax.random.split(jax.random.key(1), 512)
    members = jax.vmap(lambda key: family.sample_member(key, 0, shape, jnp.float32))(keys)
    signs = jax.vmap(lambda own: family.materialise((), own, shape))(members)
    expected = np.tensordot(np.asarray(weights, np.float64), np.asarray(signs, np.float64), 1)
    factors = [own.reshape(512, -1) for own in members]
    for dtype, limit in ((jnp.bfloat16, 5e-6), (jnp.float32, 1e-6)):
        total = jax.jit(product_of_factors, static_argnums=(0, 1))(shape, dtype, weights, factors)
        assert np.linalg.norm(total - expected) < limit * np.linalg.norm(expected), dtype


def test_long_sums_of_signs_go_in_blocks():
    """On a CPU, which else writes out what it sums up; the last one is filled up with what weighs nothing."""
    family, shape, count = nesjax.LowRank(), (300,), 1001
    assert count * shape[0] > 4 * BLOCK and count % (BLOCK // shape[0])
    keys = jax.random.split(jax.random.key(1), count)
    members = jax.vmap(lambda key: family.sample_member(key, 0, shape, jnp.float32))(keys)
    vectors = jax.vmap(lambda own: family.materialise((), own, shape))(members)
    weights = normal(0, count)
    total = jax.jit(lambda members: family.weighted_sum((), members, shape, weights))
    for found in (total(members), sum_of_columns(*shape, weights, members[0][:, 0])):
        np.testing.assert_allclose(found, np.asarray(weights, np.float64) @ vectors, rtol=1e-4, atol=1e-4)
    assert total.lower(members).compile().memory_analysis().temp_size_in_bytes < 4 * BLOCK * 4 < vectors.nbytes


@pytest.mark.parametrize("family", [nesjax.LowRank(), nesjax.LowRank(2), SignFlip(), nesjax.LowRank(values="normal")])
def test_tensor_cores_get_signs_in_bfloat16_where_there_are_any(family):
    """Lowered for each platform, without its compiler; nothing runs."""

    def gradient(w, key, weights):
        return nesjax.weighted_sum(nesjax.sample_noise(key, w, nesjax.Population(64, std=0.1, noise=family)), weights)

    traced = jax.jit(gradient).trace(jnp.zeros((16, 32)), jax.random.key(0), jnp.ones(64))
    for platform in ("cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"stablehlo.dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", text)
        signs = platform == "cuda" and getattr(family, "values", None) == "rademacher"
        assert found == ([("bf16", "bf16")] * 2 if signs else [("f32", "f32")]), text


def test_every_family_is_here():
    """A family added to `nesjax.FAMILIES` is tested with its defaults, and so is one with no more than it must have."""
    assert {*FAMILIES} == {*(family() for family in nesjax.FAMILIES), Uniform()} <= {*VARIANTS}


def test_what_a_family_cannot_do_faster_is_done_with_what_it_materialises():
    """Of products it is said; a weighted sum forms one member at a time."""
    params = {"w": normal(0, 8, 6), "k": normal(1, 3, 4, 6), "s": normal(2, 2, 8, 6)}

    def fn(params):
        return X[:, :8] @ params["w"], conv(params["k"], X[:, :8].reshape(1, 10, 4)), params["w"][ROWS % 8]

    got = []
    for family in (Unable(), Uniform()):
        population = nesjax.Population(N, std=STD, noise={"s": nesjax.Stacked(family), "": family}, chunk_size=4)
        noise = nesjax.sample_noise(jax.random.key(1), params, population)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", nesjax.MaterialiseWarning)
            got.append((nesjax.population_apply(fn, params, noise), nesjax.weighted_sum(noise, normal(7, N))))
        lines = [line.strip() for warning in caught for line in str(warning.message).splitlines()[1:]]
        said = {line.split(" has no rule")[0] for line in lines}
        assert said == ({"w: dot_general", "k: conv_general_dilated", "w: gather"} if family == Unable() else set())
    for a, b in zip(*map(jax.tree.leaves, got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_class_made_from_a_family_draws_as_it_says():
    """By keys where its parts were made of random words, a member's as well as what members share."""

    class Ones(SignFlip):
        def sample_shared(self, key, shape, dtype):
            return jnp.ones(shape, dtype)

        def sample_member(self, key, index, shape, dtype):
            return jax.tree.map(jnp.zeros_like, super().sample_member(key, index, shape, dtype))

    zeros = jnp.zeros((3, 4))
    noise = nesjax.sample_noise(jax.random.key(0), zeros, nesjax.Population(4, std=1.0, noise=Ones()))
    np.testing.assert_array_equal(nesjax.materialise(zeros, noise, 1), jnp.ones((3, 4)))


FROZEN = dataclasses.dataclass(frozen=True)
MUST = ("sample_shared", "materialise")
SHARED = r"sample_shared\(.*\), or both shared_words\(.*\) and shared_from_words\(.*\)"
DRAWS = r"sample_member\(.*\), or both words\(.*\) and from_words\(.*\)"


def family_with(*names: str, decorate=FROZEN):
    """A family whose class has methods of these names alone."""
    return decorate(type("Mine", (nesjax.NoiseFamily,), {name: lambda self, *args: () for name in names}))()


@pytest.mark.parametrize(
    "names, lacks",
    [
        ((), rf"materialise\(self, shared, member, shape\)\n- define {SHARED}\n- define {DRAWS}"),
        (("sample_shared", "sample_member"), r"materialise\(self, shared, member, shape\)"),
        (("materialise", "sample_member"), SHARED),
        (("materialise", "sample_member", "shared_words"), SHARED),
        (MUST, DRAWS),
        ((*MUST, "words"), DRAWS),
        ((*MUST, "from_words"), DRAWS),
        ((*MUST, "sample_member", "words"), DRAWS),
    ],
)
def test_an_incomplete_family_is_refused(names, lacks):
    with pytest.raises(TypeError, match=rf"noise family Mine must:\n- define {lacks}$"):
        family_with(*names)


def test_a_family_is_hashable():
    @dataclasses.dataclass(frozen=True)
    class Listed(Uniform):
        sizes: list

    with pytest.raises(TypeError, match=r"noise\['w'\] must be hashable .*sizes=\[1\]"):
        nesjax.Population(size=4, std=0.1, noise={"w": Listed([1])})


def test_a_family_is_a_frozen_dataclass():
    for decorate in (lambda cls: cls, dataclasses.dataclass):
        with pytest.raises(
            TypeError, match=r"Mine must:\n- be a frozen dataclass \(put @dataclasses.dataclass\(frozen=True\)"
        ):
            family_with(*MUST, "sample_member", decorate=decorate)
    for draws in (("sample_member",), ("words", "from_words"), ("sample_member", "words", "from_words")):
        assert str(family_with(*MUST, *draws)) == "Mine()"
