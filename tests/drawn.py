"""Arrays and functions that the tests' models are made of."""

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(7)


def normal(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def weight(seed, *shape):
    """A matrix, or a stack of them, that leaves its input's size as it is."""
    return normal(seed, *shape) / np.sqrt(shape[-2])


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
