"""Statistics by which observations are normalised; all members of a population, on all devices, share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from .observations import check_shapes, is_image, is_shape, scaled, shapes_of_numbers

MOST = 2**31  # observations counted; there is room in uint32 for as many new ones


class ObsStats(flax.struct.PyTreeNode):
    """Running mean and variance of observations: `TrainState.create(..., obs_stats=ObsStats.create(env.obs_shape))`.

    Attributes:
      count: observations seen, uint32: exact to 2**31, where it stays, so that older ones then slowly lose weight.
      mean: of them, float32, in a tree like an observation; a lone 0 for each image, which has no statistics.
      m2: the sum of squared distances from the mean, like it; `m2 / count` is the variance.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = ObsStats.create((2,))
      >>> for obs in ([1.0, 0.0], [3.0, 0.0]):
      ...     stats = stats.add(jnp.array(obs), True)
      >>> stats.normalise(jnp.array([1.0, 0.0])).tolist()  # the second never varied
      [-1.0, 0.0]
    """

    count: jax.Array
    mean: Any
    m2: Any

    @classmethod
    def create(cls, shape: Any) -> ObsStats:
        """Of nothing seen yet.

        Args:
          shape: of an observation, see `Environment.obs_shape`.

        Example:
          >>> ObsStats.create({"joints": (5,), "camera": jax.ShapeDtypeStruct((64, 64, 3), jnp.uint8)}).mean
          {'camera': Array(0., dtype=float32), 'joints': Array([0., 0., 0., 0., 0.], dtype=float32)}
        """
        mean, m2 = (jax.tree.map(jnp.zeros, shapes_of_numbers(shape), is_leaf=is_shape) for _ in range(2))
        return cls(jnp.zeros((), jnp.uint32), mean, m2)

    def add(self, obs: Any, valid: jax.Array) -> ObsStats:
        """With one more observation, if it is `valid` (Welford, 1962)."""
        count = self.count + jnp.asarray(valid, jnp.uint32)

        def added(mean, m2, x):
            if is_image(x):
                return mean, m2
            change = jnp.where(valid, x, 0) - jnp.where(valid, mean, 0)
            mean = mean + change / jnp.maximum(count, 1)
            return mean, m2 + change * jnp.where(valid, x - mean, 0)

        return self._by_leaf(count, added, obs)

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
        wide = lambda x, like: x.reshape(-1, *(1,) * (like.ndim - 1))
        finite = jax.tree.map(lambda x: jnp.isfinite(x).all(tuple(range(1, x.ndim))), (stacked.mean, stacked.m2))
        finite = jnp.stack(jax.tree.leaves(finite)).all(0)
        counts = jnp.where(finite, stacked.count, 0)
        total = counts.sum(dtype=jnp.uint32)
        kept = jnp.minimum(total, jnp.uint32(MOST))

        def merged(mean, m2):
            mean, m2 = (jnp.where(wide(finite, x), x, 0) for x in (mean, m2))
            share, origin = wide(counts / jnp.maximum(total, 1), mean), mean[counts.argmax()]
            centre = origin + (share * (mean - origin)).sum(0)  # exact where all means are equal
            m2 = m2.sum(0) + (wide(counts, mean) * (mean - centre) ** 2).sum(0)
            return centre, m2 * (kept / jnp.maximum(total, 1))

        return stacked._by_leaf(kept, merged)

    def joined_by(self, stacked: ObsStats) -> ObsStats:
        """Merges these with many others."""
        return ObsStats.merge(jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), self, stacked))

    def _by_leaf(self, count: jax.Array, fn: Callable, *trees: Any) -> ObsStats:
        """`fn(mean, m2, *leaves) -> (mean, m2)` of each leaf."""
        means, treedef = jax.tree.flatten(self.mean)
        leaves = zip(means, treedef.flatten_up_to(self.m2), *map(treedef.flatten_up_to, trees))
        mean, m2 = map(treedef.unflatten, zip(*(fn(*parts) for parts in leaves)))
        return ObsStats(count, mean, m2)

    @staticmethod
    def checked(obs_stats: Any, shape: Any) -> None:
        """Raises TypeError or ValueError unless it is None or statistics of observations of this shape."""
        if obs_stats is not None and not isinstance(obs_stats, ObsStats):
            raise TypeError(f"obs_stats must be a nesjax.rl.ObsStats or None, got {type(obs_stats).__name__}.")
        if obs_stats is not None:
            check_shapes("obs_stats must be of observations of shape", obs_stats.mean, shapes_of_numbers(shape))

    def normalise(self, obs: Any) -> Any:
        """`obs` with mean 0 and variance 1, within 10; as it is while nothing was seen, 0 where nothing varies.

        Images are divided by 255.
        """

        def normalised(mean, m2, x):
            if is_image(x):
                return scaled(x)
            std = jnp.sqrt(m2 / jnp.maximum(self.count, 1))
            x = jnp.where(self.count > 0, jnp.where(std > 1e-6, (x - mean) / jnp.where(std > 1e-6, std, 1), 0), x)
            return x.clip(-10, 10)

        return jax.tree.map(normalised, self.mean, self.m2, obs)
