"""Statistics by which observations are normalised; all members of a population, on all devices, share them."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

MOST = 2**31  # observations counted; there is room in uint32 for as many new ones


class ObsStats(flax.struct.PyTreeNode):
    """Running mean and variance of observations: `TrainState.create(..., obs_stats=ObsStats.create(env.obs_shape))`.

    Attributes:
      count: number of observations seen, uint32. It is exact up to 2**31 and stays there, so that old ones then slowly
        lose weight.
      mean: their mean, float32.
      m2: the sum of squared distances from the mean, float32; `m2 / count` is the variance.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = ObsStats.create((2,))
      >>> for obs in ([1.0, 0.0], [3.0, 0.0]):
      ...     stats = stats.add(jnp.array(obs), True)
      >>> stats.normalise(jnp.array([1.0, 0.0])).tolist()  # the second never varied
      [-1.0, 0.0]
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    @classmethod
    def create(cls, shape: tuple[int, ...]) -> ObsStats:
        """Makes the statistics before the first observation.

        Args:
          shape: that of one observation.
        """
        return cls(jnp.zeros((), jnp.uint32), jnp.zeros(shape), jnp.zeros(shape))

    def add(self, obs: jax.Array, valid: jax.Array) -> ObsStats:
        """Adds one observation, if it is `valid` (Welford, 1962)."""
        count = self.count + jnp.asarray(valid, jnp.uint32)
        change = jnp.where(valid, obs, 0) - jnp.where(valid, self.mean, 0)
        mean = self.mean + change / jnp.maximum(count, 1)
        return ObsStats(count, mean, self.m2 + change * jnp.where(valid, obs - mean, 0))

    @classmethod
    def merge(cls, stacked: ObsStats) -> ObsStats:
        """Merges many along their leading axis (Chan, Golub and LeVeque, 1979); leaves out those that overflowed.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> x = jnp.arange(12.0).reshape(3, 4)
          >>> each = jax.vmap(lambda row: jax.lax.fori_loop(
          ...     0, 4, lambda i, stats: stats.add(row[i], True), ObsStats.create(())))(x)
          >>> merged = ObsStats.merge(each)
          >>> float(merged.mean), round(float(merged.m2 / merged.count), 2)  # as x.mean(), x.var()
          (5.5, 11.92)
        """
        wide = lambda x: x.reshape(-1, *(1,) * (stacked.mean.ndim - 1))
        sound = jnp.isfinite(stacked.mean + stacked.m2).all(tuple(range(1, stacked.mean.ndim)))
        mean, m2 = (jnp.where(wide(sound), x, 0) for x in (stacked.mean, stacked.m2))
        counts = jnp.where(sound, stacked.count, 0)
        total = counts.sum(dtype=jnp.uint32)
        share, origin = wide(counts / jnp.maximum(total, 1)), mean[counts.argmax()]
        centre = origin + (share * (mean - origin)).sum(0)  # exact where all means are equal
        kept = jnp.minimum(total, jnp.uint32(MOST))
        m2 = m2.sum(0) + (wide(counts) * (mean - centre) ** 2).sum(0)
        return cls(kept, centre, m2 * (kept / jnp.maximum(total, 1)))

    def joined_by(self, stacked: ObsStats) -> ObsStats:
        """Merges these with many others."""
        return ObsStats.merge(jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), self, stacked))

    @staticmethod
    def checked(obs_stats: Any, shape: tuple[int, ...]) -> None:
        """Raises TypeError or ValueError unless `obs_stats` is None or for observations of this shape."""
        if obs_stats is not None and not isinstance(obs_stats, ObsStats):
            raise TypeError(f"obs_stats must be a nesjax.rl.ObsStats or None, got {type(obs_stats).__name__}.")
        if obs_stats is not None and obs_stats.mean.shape != shape:
            raise ValueError(f"obs_stats must be of observations of shape {shape}, got {obs_stats.mean.shape}.")

    def normalise(self, obs: jax.Array) -> jax.Array:
        """Scales `obs` to mean 0 and variance 1, clipped at 10.

        Before the first observation `obs` stays what it is. What never varied becomes 0.
        """
        std = jnp.sqrt(self.m2 / jnp.maximum(self.count, 1))
        scaled = jnp.where(std > 1e-6, (obs - self.mean) / jnp.where(std > 1e-6, std, 1), 0)
        return jnp.where(self.count > 0, scaled, obs).clip(-10, 10)
