"""Flax Linen layers that name their noise family.

Each is the plain Flax module, with its parameter names, shapes, initial values and outputs, plus a field `noise`:
a family, or None for the population's default. The field does nothing by itself: `Population.for_model` reads it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .noise import NoiseFamily


class Dense(nn.Dense):
    """`flax.linen.Dense` with a noise family.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> layer = nesjax.Dense(3, noise=nesjax.Permuted(in_sparsity=0.5))
      >>> population = nesjax.Population(size=8, std=0.1).for_model(layer, jnp.ones((1, 4)))
      >>> [(layer.path, layer.family.in_sparsity) for layer in population.layers]
      [('bias', 0.5), ('kernel', 0.5)]
    """

    noise: NoiseFamily | None = None


class Conv(nn.Conv):
    """`flax.linen.Conv` with a noise family."""

    noise: NoiseFamily | None = None


class Embed(nn.Embed):
    """`flax.linen.Embed` with a noise family."""

    noise: NoiseFamily | None = None


class Scale(nn.Module):
    """A scale and a bias per feature, `x * scale + bias`, as at the end of a normalisation. NESgpu's PerturbedAffine.

    Shapes: `x: [..., F] -> [..., F]`; parameters `scale: [F]` (ones) and `bias: [F]` (zeros).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = Scale().init(jax.random.key(0), jnp.ones((2, 3)))["params"]
      >>> sorted(params)
      ['bias', 'scale']
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32
    noise: NoiseFamily | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x, scale, bias = nn.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        return x * scale + bias
