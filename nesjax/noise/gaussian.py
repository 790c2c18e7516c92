"""Independent normal noise: the textbook family, and the dearest (OpenAI-ES, arXiv:1703.03864)."""

import dataclasses

import jax
import jax.numpy as jnp

from .base import NoiseFamily, accumulator


@dataclasses.dataclass(frozen=True)
class Gaussian(NoiseFamily):
    """Every entry of every member's `E_i` is drawn from N(0, 1). NESgpu's PerturbedLinear and PerturbedConv2d.

    A member's part is as large as the parameter: bound memory with `Population(chunk_size=...)`.

    Example:
      >>> import jax
      >>> Gaussian().sample_member(jax.random.key(0), 0, (3, 2), "float32").shape
      (3, 2)
    """

    def sample_shared(self, key, shape, dtype):
        return ()

    def sample_member(self, key, index, shape, dtype):
        return jax.random.normal(key, shape, dtype)

    def materialise(self, shared, member, shape):
        return member

    def weighted_sum(self, shared, members, shape, weights):
        return jnp.tensordot(weights, members.astype(accumulator(weights.dtype)), 1)
