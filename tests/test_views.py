"""The algebra of views against NumPy, over random sequences of what may be done to a parameter."""

import collections
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nesjax
from nesjax import views
from nesjax.views import View


def pad(x, value, config):
    """`lax.pad` in NumPy, without negative padding."""
    full = [low + high + size + max(size - 1, 0) * inner for size, (low, high, inner) in zip(x.shape, config)]
    y = np.full(full, value)
    kept = (slice(low, size - high, inner + 1) for size, (low, high, inner) in zip(full, config))
    y[tuple(kept)] = x
    return y


@pytest.fixture
def numpy(monkeypatch):
    """Views of NumPy arrays: nothing compiles."""
    monkeypatch.setattr(views, "jnp", np)
    monkeypatch.setattr(views, "lax", types.SimpleNamespace(pad=pad))


def factors(rng, number):
    """Sizes with this product, ones among them."""
    sizes = []
    while number > 1:
        size = int(rng.choice([n for n in range(1, number + 1) if number % n == 0]))
        sizes.append(size)
        number //= size
    return sizes


def changed(rng, view, array):
    """The name of a random operation, and both after it."""
    name = str(rng.choice(["transpose", "reshape", "slice", "reverse", "broadcast"]))
    if name == "transpose":
        order = rng.permutation(array.ndim).tolist()
        return name, view.transpose(order), array.transpose(order)
    if name == "reshape":
        sizes = factors(rng, array.size)
        return name, view.reshape(sizes), array.reshape(sizes)
    if name == "reverse":
        axes = np.flatnonzero(rng.random(array.ndim) < 0.5).tolist()
        return name, view.reverse(axes), np.flip(array, axes)
    if name == "slice":
        starts = [int(rng.integers(size)) if rng.random() < 0.3 else 0 for size in array.shape]
        stops = [int(rng.integers(start + 1, size + 1)) for start, size in zip(starts, array.shape)]
        stops = [stop if rng.random() < 0.3 else size for stop, size in zip(stops, array.shape)]
        steps = [int(rng.choice([1, 1, 2, 3])) for _ in starts]
        return name, view.slice(starts, stops, steps), array[tuple(map(slice, starts, stops, steps))]
    shape, dimensions = list(array.shape), list(range(array.ndim))
    if array.size < 100:
        at, size = int(rng.integers(array.ndim + 1)), int(rng.integers(1, 4))
        shape.insert(at, size)
        dimensions = [axis + (axis >= at) for axis in dimensions]
        array = np.expand_dims(array, at)
    longer = [3 if size == 1 and array.size < 100 and rng.random() < 0.5 else size for size in array.shape]
    shape = [new if old == 1 else size for old, new, size in zip(array.shape, longer, shape)]
    return name, view.broadcast(shape, dimensions), np.broadcast_to(array, shape)


def sequence(rng):
    """A dense noise array, a view of it after some operations, and the array it should give.

    Also a count of the operations that the view had, and of those it refused, which are left out.
    """
    shape = tuple(rng.choice([1, 2, 3, 4, 6, 12], rng.integers(1, 4)).tolist())
    noise = rng.permutation(np.arange(np.prod(shape), dtype=np.int32)).reshape(shape)
    view, array, counts = View.of(shape), noise, collections.Counter()
    for _ in range(rng.integers(1, 6)):
        name, after, expected = changed(rng, view, array)
        counts[name, after is not None] += 1
        if after is not None:
            view, array = after, expected
    return noise, view, array, counts


def product(rng, noise, view, array, asarray):
    """What `contract` gives for a random product, and what it should give."""
    labels = rng.permutation(array.ndim).tolist()
    shared = [label for label in labels if rng.random() < 0.6]
    x_labels = rng.permutation([*shared, 30, 31]).tolist()
    kept = [label for label in shared if rng.random() < 0.3]
    out = rng.permutation([*(label for label in labels if label not in shared), *kept, 30]).tolist()
    own = list(range(array.ndim))
    sizes = dict(zip([*own, 30, 31], [*array.shape, 2, 3]))
    x = rng.integers(-3, 4, [sizes[label] for label in x_labels], np.int32)

    def multiply(x, axes):
        x_labels, labels, out = map(list, axes)
        return asarray(np.einsum(x, x_labels, noise, labels, out))

    y = view.contract(multiply, asarray(x), (tuple(x_labels), tuple(own), tuple(out)))
    return y, np.einsum(x, x_labels, array, own, out)


def check(seed, asarray):
    """Counts of what was found in one sequence, on arrays made by `asarray`; an error if anything is wrong."""
    rng = np.random.default_rng(seed)
    noise, view, array, counts = sequence(rng)
    assert view.sizes == array.shape
    np.testing.assert_array_equal(view.dense(asarray(noise)), array)
    orders = [p for p in itertools.permutations(range(noise.ndim)) if np.array_equal(noise.transpose(p), array)]
    assert view.noise_axes in orders if 1 not in noise.shape and orders else view.noise_axes in (None, *orders)
    counts["noise axes", view.noise_axes is not None] += 1
    y, expected = product(rng, noise, view, array, asarray)
    if y is not NotImplemented:
        np.testing.assert_array_equal(y, expected)
    counts["contract", y is not NotImplemented] += 1
    return counts


def checked(seeds, asarray):
    counts = collections.Counter()
    for seed in seeds:
        try:
            counts += check(seed, asarray)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    return counts


def test_random_sequences(numpy):
    counts = checked(range(1500), np.asarray)
    share = {name: counts[name, True] / (counts[name, True] + counts[name, False]) for name, _ in counts}
    assert share["transpose"] == share["broadcast"] == 1
    assert share["reshape"] > 0.8 and share["slice"] > 0.7 and share["reverse"] > 0.7 and share["contract"] > 0.9
    assert min(counts.values()) > 50, counts  # each was had and refused (or always had) often enough to be seen


def test_random_sequences_of_jax_arrays():
    checked(range(8), jnp.asarray)


def test_noise_axes():
    view = View.of((4, 6))
    assert view.noise_axes == (0, 1) and view.transpose([1, 0]).noise_axes == (1, 0)
    assert view.reshape([2, 2, 6]).reshape([4, 6]) == view  # cut pieces that meet again are joined
    for other in (view.reshape([24]), view.slice([0, 0], [4, 5], [1, 1]), view.reverse([0]), view.reshape([2, 2, 6])):
        assert other is not None and other.noise_axes is None
    assert view.broadcast([1, 4, 6], [1, 2]).noise_axes is None


@pytest.mark.parametrize("before, after", [((64, 96), (96, 64)), ((2, 3), (3, 2)), ((6, 4), (4, 6))])
def test_reshapes_that_no_view_has(before, after):
    assert View.of(before).reshape(after) is None
    assert View.of((*before, 5)).reshape((*after, 5)) is None
    assert View.of((np.prod(before),)).reshape(before).reshape(after).sizes == after  # one axis, cut in another place


def applied(use, shape, size):
    """A population's outputs of `x @ use(w)`, and those of its materialised members."""
    w = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (3, size))
    noise = nesjax.sample_noise(jax.random.key(2), w, nesjax.Population(size=4, std=0.5))

    @jax.jit
    def both(w, noise):
        members = jax.vmap(lambda i: x @ use(nesjax.materialise(w, noise, i)))(jnp.arange(4))
        return nesjax.population_apply(lambda w: x @ use(w), w, noise), members

    with jax.default_matmul_precision("highest"):
        return both(w, noise)


def test_a_reshape_that_no_view_has_is_materialised():
    with pytest.warns(nesjax.MaterialiseWarning, match="reshape has no rule"):
        got, expected = applied(lambda w: w.reshape(6, 4), (4, 6), 6)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_two_broadcasts_in_one_axis():
    def use(w):
        once = jnp.broadcast_to(w[:, :, None], (1, 4, 2))
        return jnp.broadcast_to(once[:, None], (1, 2, 4, 2)).reshape(16)

    got, expected = applied(use, (1, 4), 16)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
