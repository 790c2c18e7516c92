"""Independent normal noise: the textbook family, and the most expensive (OpenAI-ES, arXiv:1703.03864)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from .base import NoiseFamily, accumulator


def normals(words: jax.Array) -> jax.Array:
    """A standard normal number, float32, of each random uint32 word."""
    uniform = ((words >> 9).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-22 - 1  # symmetric, and within (-1, 1)
    return 2**0.5 * jax.lax.erf_inv(uniform)


@dataclasses.dataclass(frozen=True)
class Gaussian(NoiseFamily):
    """Every entry of every member's `E_i` is drawn from N(0, 1). NESgpu's PerturbedLinear and PerturbedConv2d.

    Members share nothing. A member's part is `E_i` itself, as large as the parameter, so bound memory with
    `Population(chunk_size=...)`.

    Example:
      >>> import jax
      >>> member = Gaussian().sample_member(jax.random.key(1), 0, (2, 2), "float32")
      >>> print(Gaussian().materialise((), member, (2, 2)).round(1))
      [[-0.2  0.1]
       [-0.1 -0.2]]
    """

    def sample_shared(self, key, shape, dtype):
        return ()

    def words(self, shape):
        return math.prod(shape) if len(shape) < 2 else 0  # not all matrices' at once, for every member

    def from_words(self, words, shape):
        return normals(words).reshape(shape)

    def sample_member(self, key, index, shape, dtype):
        if self.words(shape):
            return super().sample_member(key, index, shape, dtype)
        return jax.random.normal(key, shape, dtype)

    def materialise(self, shared, member, shape):
        return member

    def squared(self, shared, member, shape):
        return self, shared, jnp.square(member)

    def weighted_sum(self, shared, members, shape, weights):
        return jnp.tensordot(weights, members.astype(accumulator(weights.dtype)), 1)
