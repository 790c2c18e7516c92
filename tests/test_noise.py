"""Laws 1, 2, 3 and 7 for every family and option: fast paths, weighted sums, moments, quality and floors.

`E_i` is member i's noise and `materialise` its definition; everything is compared with it in float32.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nesjax
from nesjax import Gaussian, LowRank, Permuted, SignFlip, Sparse
from nesjax.noise.permuted import _modulo_product, _permutation

pytestmark = pytest.mark.usefixtures("quick_compiles")

N = 6
STD = 0.5
OPTIONS = (
    LowRank(), LowRank(3), LowRank(2, "normal"), SignFlip(), SignFlip("in"), SignFlip("out", "normal"),
    Permuted("in"), Permuted("out"), Permuted("both"), Permuted("both", 2, 0.7), Permuted("in", out_sparsity=3),
    Permuted(in_sparsity=0.5, with_replacement=True), Sparse(), Sparse(3), Gaussian(),
)  # fmt: skip


def test_every_family_is_here():
    assert {type(family) for family in OPTIONS} == set(nesjax.FAMILIES)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


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


def not_structural(family) -> set[tuple[str, str]]:
    """The parameters that a family must form, and the operations that ask for it: to be said, and only these."""
    dense = set()
    if isinstance(family, Permuted | SignFlip | Sparse):
        dense.add(("(6, 8, 3)", "conv_general_dilated"))  # these read a kernel's last two axes as in and out
    if isinstance(family, Sparse):
        dense |= {("(3, 4, 6)", "conv_general_dilated"), ("(40, 6, 4)", "gather")}
    if isinstance(family, Permuted) and family._layout((3, 4, 6))[1]:
        dense.add(("(3, 4, 6)", "conv_general_dilated"))  # an output would leave its group
    if isinstance(family, Permuted) and family.with_replacement and family._layout((40, 24))[0]:
        dense |= {("(40, 24)", "gather"), ("(40, 24)", "dynamic_slice"), ("(24, 40)", "gather")}
    return dense


@pytest.mark.parametrize("family", OPTIONS, ids=repr)
def test_uses_and_weighted_sum_are_the_materialised_ones(family):
    """Laws 1 and 2: every use of a parameter, and `sum_i w_i (member_i - params)`."""
    shapes = {shape for shape, _ in USES.values()}
    params = {str(shape): 0.3 * normal(len(shape), *shape) for shape in sorted(shapes)}
    noise = nesjax.sample_noise(jax.random.key(1), params, nesjax.Population(N, std=STD, noise=family))
    weights = normal(7, N)

    @jax.jit
    def run(params, noise):
        members = jax.vmap(lambda i: nesjax.materialise(params, noise, i))(jnp.arange(N))
        outputs = nesjax.population_apply(run_uses, params, noise)
        return outputs, jax.vmap(run_uses)(members), nesjax.weighted_sum(noise, weights), members

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nesjax.MaterialiseWarning)
        outputs, expected, raw, members = run(params, noise)
    said = (str(warning.message).partition(": ") for warning in caught)
    assert {(path, operation.partition(" ")[0]) for path, _, operation in said} == not_structural(family)
    for use in USES:
        for got, right in zip(jax.tree.leaves(outputs[use]), jax.tree.leaves(expected[use]), strict=True):
            atol = 0.05 if use == "cast" else 3e-4  # the weight is rounded, the noise is not
            np.testing.assert_allclose(got, right, rtol=2e-4, atol=atol, err_msg=use)
    for path in params:
        moved = np.asarray(members[path]) - params[path]
        np.testing.assert_allclose(raw[path], np.tensordot(weights, moved, 1), rtol=1e-4, atol=1e-4, err_msg=path)
        assert np.ptp(moved, 0).max() > STD, path  # the members do differ


@pytest.mark.parametrize("family", [family() for family in nesjax.FAMILIES], ids=repr)
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


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 4, 5), (7,), (), (4, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("family", OPTIONS, ids=repr)
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


# ---- permutations


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 27, 64, 257, 1000, 1 << 16, 70_001, 100_000])
def test_permutations_without_sorting_are_permutations(size):
    draw = jax.jit(jax.vmap(lambda words: _permutation(words, size, size)))
    images = np.asarray(draw(jax.random.bits(jax.random.key(size), (8, 4), jnp.uint32)))
    assert (np.sort(images, 1) == np.arange(size)).all()
    assert size < 8 or (images[0] != images[1]).any()


@pytest.mark.parametrize("size", [5, 8, 10, 64])
def test_permutations_are_uniform_in_indices_and_in_pairs(size):
    """What moments and floors rest on: each index, and each pair's distance, has every value equally often."""
    count = 1 << 16
    words = jax.random.bits(jax.random.key(size), (count, 4), jnp.uint32)
    images = np.asarray(jax.jit(jax.vmap(lambda words: _permutation(words, size, size)))(words)).astype(int)
    for at in range(size):
        seen = np.bincount(images[:, at], minlength=size) / count
        assert np.abs(seen - 1 / size).max() < 6 / (size * count) ** 0.5
    apart = np.stack([np.bincount((images[:, at] - images[:, 0]) % size, minlength=size) for at in range(1, size)])
    seen, expected = apart[:, 1:] / count, 1 / (size - 1)
    # Exact for a prime and one above it; elsewhere nearly, and on average over the distances of a pair's indices.
    assert np.abs(seen - expected).sum(1).mean() / 2 < {5: 0.01, 8: 0.01, 10: 0.12, 64: 0.03}[size]


@pytest.mark.parametrize("size", [7, 65_521, 65_537, (1 << 24) - 3])
def test_products_modulo_a_prime_fit_in_32_bits(size):
    a, x = (np.random.default_rng(seed).integers(0, size, 1000, np.uint32) for seed in (0, 1))
    a[:2], x[:2] = size - 1, size - 1
    got = np.asarray(_modulo_product(jnp.asarray(a), jnp.asarray(x), size))
    assert (got == (a.astype(np.uint64) * x % size)).all()


# ---- what a gradient is worth


def estimates(family, loss_fn, params, size, keys, **options):
    """Estimated gradients `[keys, ...]`, each of a new key."""
    population = nesjax.Population(size, std=0.1, noise=family)
    es_grad = nesjax.value_and_grad(loss_fn, population, **options)
    keys = jax.random.split(jax.random.key(11), keys)
    return jax.jit(lambda keys: jax.lax.map(lambda key: es_grad(params, key)[1], keys))(keys)


@pytest.mark.parametrize("x", [normal(2, 8, 12), jnp.abs(normal(2, 8, 12))], ids=["signed", "non-negative"])
@pytest.mark.parametrize("baseline", [None, "mean", "leave_one_out", "unperturbed"])
@pytest.mark.parametrize("family", [family() for family in nesjax.FAMILIES] + [Permuted("both")], ids=repr)
def test_estimate_is_unbiased_on_a_quadratic(family, baseline, x):
    """Law 7: the mean over keys is the gradient, (N - 1) / N of it with the mean baseline, within 5 standard errors."""
    w, y, size = 0.2 * normal(0, 12, 9), normal(1, 8, 9), 16

    def loss_fn(w, offset=0.0):
        return jnp.mean((x @ w - y) ** 2) - offset

    offset = 0.95 * float(loss_fn(w)) if baseline is None else 0.0  # or the loss itself would be most of the noise

    got = np.asarray(estimates(family, lambda w: loss_fn(w, offset), w, size, 600, baseline=baseline), np.float64)
    right = np.asarray(jax.grad(loss_fn)(w)) * ((size - 1) / size if baseline == "mean" else 1)
    error = got.std(0) / len(got) ** 0.5
    assert (np.abs(got.mean(0) - right) < 5 * error).all()
    along = (got * right).sum((1, 2)) / (right**2).sum()  # the same along the gradient, where there is little noise
    assert along.mean() == pytest.approx(1, abs=5 * along.std() / len(got) ** 0.5)
    assert along.std() / len(got) ** 0.5 < 0.05


@pytest.mark.parametrize("shape", [(16, 16), (3, 3, 6, 8)], ids=str)
@pytest.mark.parametrize("family", OPTIONS, ids=repr)
def test_quality_is_the_bound_or_the_documented_floor(family, shape):
    """Law 7: the cosine to the true gradient of a linear loss is `(1 / floor^2 + d / N)^(-1/2)`.

    Products of normal factors have heavier tails, which count as more dimensions.
    """
    size, d = 2048, np.prod(shape)
    g = normal(3, 12, *shape)  # gradients: a floor is an average over them
    cosines = []
    population = nesjax.Population(size, std=0.1, noise=family)

    @jax.jit
    def estimate(key, g):
        es_grad = nesjax.value_and_grad(lambda w: jnp.vdot(w, g), population)
        return es_grad(jnp.zeros(shape), key)[1]

    for at, one in enumerate(g):
        got = estimate(jax.random.key(at), one)
        cosines.append(float(jnp.vdot(got, one) / jnp.linalg.norm(got) / jnp.linalg.norm(one)))
    floor = family.for_shape(shape).floor(shape)
    if family == LowRank(2, "normal"):
        d *= 1 + (np.prod([1 + 2 / n for n in shape]) - 1) / 2
    assert np.mean(cosines) == pytest.approx((1 / floor**2 + d / size) ** -0.5, abs=0.05)
