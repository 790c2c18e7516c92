"""Permutations drawn from a few random words, without sorting: what `Permuted` rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nesjax


def permutations(size: int, count: int) -> np.ndarray:
    """Where each of `count` members of `Permuted("in")` puts each of `size` inputs: `[count, size]`."""
    family, shape = nesjax.Permuted("in"), (size, 1)
    words = jax.random.bits(jax.random.key(size), (count, family.words(shape)), jnp.uint32)
    return np.asarray(jax.jit(jax.vmap(lambda words: family.from_words(words, shape)["in"]))(words)).astype(int)


# The largest ones need products of more than 32 bits.
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 27, 64, 257, 1000, 65_521, 65_537, 100_000, (1 << 24) - 3])
def test_permutations_without_sorting_are_permutations(size):
    images = permutations(size, 8 if size < 1 << 20 else 1)
    for image in images:
        assert (np.bincount(image, minlength=size) == 1).all()
    assert size < 8 or (images[0] != np.arange(size)).any()
    assert len(images) == 1 or size < 8 or (images[0] != images[1]).any()


@pytest.mark.parametrize("size", [5, 8, 10, 64])
def test_permutations_are_uniform_in_indices_and_in_pairs(size):
    """What moments and `max_cosine` rest on: each index, and each pair's distance, has every value equally often."""
    count = 1 << 16
    images = permutations(size, count)
    for at in range(size):
        seen = np.bincount(images[:, at], minlength=size) / count
        assert np.abs(seen - 1 / size).max() < 6 / (size * count) ** 0.5
    apart = np.stack([np.bincount((images[:, at] - images[:, 0]) % size, minlength=size) for at in range(1, size)])
    seen, expected = apart[:, 1:] / count, 1 / (size - 1)
    # Exact for a prime and one above it; elsewhere nearly, and on average over the distances of a pair's indices.
    assert np.abs(seen - expected).sum(1).mean() / 2 < {5: 0.01, 8: 0.01, 10: 0.12, 64: 0.03}[size]
