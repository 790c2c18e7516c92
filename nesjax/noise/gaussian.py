"""Independent normal noise: the textbook family, and the most expensive (OpenAI-ES, arXiv:1703.03864)."""

import dataclasses

import jax
import jax.numpy as jnp

from .base import NoiseFamily, accumulator


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

    def sample_member(self, key, index, shape, dtype):
        return jax.random.normal(key, shape, dtype)

    def materialise(self, shared, member, shape):
        return member

    def weighted_sum(self, shared, members, shape, weights):
        return jnp.tensordot(weights, members.astype(accumulator(weights.dtype)), 1)
