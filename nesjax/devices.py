"""The axis of devices that a population is spread over: the one place where devices talk to each other.

Each device draws, evaluates and sums its own members. Across devices go the N losses (an all-gather) and one sum as
large as the params (a psum), however many devices and processes there are. Letters: `N` members.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .forward import mapped_axes
from .population import Population


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis of a mesh, that of a `jax.pmap` or the caller's `jax.shard_map` (`mesh=None`), or none (`name=None`)."""

    name: str | None = None
    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh | None, name: str | None, population: Population) -> Axis:
        """Makes the axis that `mesh=` and `axis_name=` mean.

        Raises:
          TypeError or ValueError: `mesh` is not a mesh, lacks that axis, or has several while no name is given; or the
            number of devices doesn't divide the population.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(f"axis_name must be a string or None, got {name!r}.")
        if mesh is None:
            return cls(name)
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}.")
        names = mesh.axis_names
        if name is None and len(names) != 1:
            raise ValueError(f"axis_name must say which of the mesh's axes {names} the population is spread over.")
        axis = cls(names[0] if name is None else name, mesh)
        if axis.name not in names:
            raise ValueError(f"axis_name must be one of the mesh's axes {names}, got {name!r}.")
        axis._check(population, mesh.shape[axis.name])
        return axis

    def _check(self, population: Population, count: int) -> None:
        unit = max(population.group_size, population.signs)
        if population.size % (count * unit):
            raise ValueError(
                f"population size {population.size} must be a multiple of the {count} devices of axis {self.name!r} "
                f"times {unit}, the members that belong together."
            )

    def shard(self, population: Population) -> tuple[Any, int]:
        """Gives `(index, count)`: this device has part `index` of `count` equal parts of the population."""
        if self.name is None:
            return 0, 1
        count = jax.lax.axis_size(self.name)
        self._check(population, count)
        return jax.lax.axis_index(self.name), count

    def gather(self, x: jax.Array) -> jax.Array:
        """Collects all devices' members `[N]` from each one's `[N / count]`."""
        return x if self.name is None else jax.lax.all_gather(x, self.name, tiled=True, to="invarying")

    def sum(self, tree: Any) -> Any:
        return tree if self.name is None else jax.lax.psum(tree, self.name)

    def varying(self, tree: Any) -> Any:
        """Marks `tree` as different between devices, as everything computed from it will be."""
        return tree if self.name is None else jax.lax.pcast(tree, self.name, to="varying")

    def spread(self, fn: Callable, population: Population, in_axes: Any, *, donate: bool = False) -> Callable:
        """Runs `fn(kept, whole, args) -> (kept, whole, of_members)` on each device of the mesh, jitted.

        `kept` and `whole` are the same on every device; `args` are split as `in_axes` says; the leading axis N of
        `of_members` stays sharded over the devices. Whatever is not on the mesh yet is put there, and what becomes of
        `kept` lies as it did (cut over the mesh's other axes, say), so that the first call compiles what the next ones
        run. With `donate` the memory of `kept` is reused.
        """
        mesh = self.mesh
        assert mesh is not None
        same, devices, same_keys = P(), set(mesh.devices.flat), False
        explicit = AxisType.Explicit in mesh.axis_types

        def specs(args):
            axes = iter(mapped_axes(args, in_axes, population.size // population.group_size))
            return jax.tree.map(lambda _: same if (at := next(axes)) is None else P(*(None,) * at, self.name), args)

        @functools.partial(jax.jit, donate_argnums=0 if donate else (), static_argnums=3)
        def run(kept, whole, args, shardings):
            spread = jax.shard_map(
                fn, mesh=mesh, in_specs=(same, same, specs(args)), out_specs=(same, same, P(self.name)),
                axis_names={self.name}, check_vma=False,
            )  # fmt: skip
            kept, *others = spread(kept, whole, args)
            leaves, treedef = jax.tree.flatten(kept)
            return treedef.unflatten(map(_as_before, leaves, shardings)), *others

        def put(leaf, spec=same):
            if isinstance(leaf, jax.core.Tracer):
                return leaf
            there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
            # Where shardings are types, JAX doesn't split by itself what is whole.
            if there and not (explicit and spec != same and leaf.is_fully_replicated):
                return leaf
            if _is_key(leaf):
                words = put(jax.random.key_data(leaf), spec)
                return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        def placed(kept, whole, args):
            nonlocal same_keys
            same_keys = same_keys or _check_same_keys((kept, whole))
            kept, whole = jax.tree.map(put, (kept, whole))
            # Types keep explicit shardings as they are; the caller's own jit chooses those of its outputs.
            free = lambda leaf: explicit or isinstance(leaf, jax.core.Tracer)
            shardings = tuple(None if free(leaf) else leaf.sharding for leaf in jax.tree.leaves(kept))
            return run(kept, whole, jax.tree.map(put, args, specs(args)), shardings)

        return placed


NO_AXIS = Axis()


def _as_before(leaf: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _check_same_keys(state: Any) -> bool:
    """Tells whether the keys are known yet. Raises ValueError if they differ between processes, as members would."""
    keys = [leaf for leaf in jax.tree.leaves(state) if _is_key(leaf)]
    if any(isinstance(key, jax.core.Tracer) for key in keys):
        return False
    for key in keys if jax.process_count() > 1 else ():
        words = multihost_utils.process_allgather(np.asarray(jax.random.key_data(key)))
        if (words != words[0]).any():
            raise ValueError(f"key must be the same in every process, got {words.tolist()} in processes 0, 1, ...")
    return True
