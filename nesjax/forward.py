"""A function of one member, with perturbed values for parameters, and the one vmap over all members.

Letters: `N` members, `g` members a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .members import Member, Noise, check_params, checked_noise, member, with_sign
from .population import Leaf, named_leaves
from .values import Perturbed, evaluate
from .views import View


def perturbed(fn: Callable, *, strict: bool = False) -> Callable:
    """`fn(params, *args)` as a function of one member: `perturbed(fn)(params, member, *args)`.

    `fn` is any JAX function; it runs unchanged with perturbed parameters. vmap, scan, jit or shard the result.

    Args:
      fn: a function of parameters and anything else, returning a tree of arrays.
      strict: where a parameter would have to be materialised, raise ValueError instead of warning.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = jnp.zeros((4, 3))
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.5))
      >>> def one(i):
      ...     return nesjax.perturbed(lambda w, x: x @ w)(params, nesjax.member(noise, i), jnp.ones(4))
      >>> jax.vmap(one)(jnp.arange(6)).shape
      (6, 3)
    """

    def value(leaf: Leaf, array, shared, own, scale):
        if leaf.family is None:
            return array
        weight = jnp.asarray(array)
        scale = jnp.broadcast_to(scale, leaf.stack)
        view = View.of(leaf.noise_shape)
        value = Perturbed(weight, scale, shared, own, leaf.family, view, leaf.path, strict)
        # A vector's noise is no larger than what it is added to: no need for a product.
        return value.materialise() if len(leaf.noise_shape) < 2 else value

    def run(params, member, *args):
        if not isinstance(member, Member):
            raise TypeError(f"member must come from nesjax.member(noise, i), got {type(member).__name__}.")
        check_params("params", params, member.leaves, member.treedef)
        values = map(value, member.leaves, jax.tree.leaves(params), member.shared, member.own, member.scale)
        return evaluate(lambda params: fn(params, *args), params, list(values))

    return run


def materialise(params: Any, noise: Noise, i: Any) -> Any:
    """Member `i` as plain parameters, `params + std * sign_i * E_i`, rounded once to the parameters' dtype."""
    return perturbed(lambda params: params)(params, member(noise, i))


def population_apply(
    fn: Callable, params: Any, noise: Noise, *args: Any, in_axes: Any = None, strict: bool = False
) -> Any:
    """`fn(params, *args)` for every member, in one batched pass.

    Args:
      fn: any JAX function of parameters and `args`.
      params: what `noise` was sampled for.
      noise: of this generation.
      *args: further arguments.
      in_axes: as in `jax.vmap`, over `args`: None for what all members share, 0 for one slice a member (a leading axis
        N, or N / g in groups of g).
      strict: as in `perturbed`.

    Returns:
      `fn`'s output with a leading axis N on every leaf.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = jnp.zeros((4, 3))
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.5))
      >>> nesjax.population_apply(lambda w, x: x @ w, params, noise, jnp.ones((6, 2, 4)), in_axes=0).shape
      (6, 2, 3)
    """
    checked_noise(noise).check("params", params)
    run = perturbed(fn, strict=strict)

    def one(own, sign, args):
        return run(params, with_sign(noise, own, sign), *args)

    return over_members(noise, one, args, in_axes)


def over_members(noise: Noise, one: Callable, args: tuple, in_axes: Any, shard: tuple[Any, int] = (0, 1)) -> Any:
    """`one(own, sign, args)` over the members: the population's one vmap, in chunks.

    Directions are drawn once and used for both signs, and what a group shares stays unbatched within it.

    Args:
      shard: `(index, count)`: this device's share of the population; `args` hold the share's slices only.
    """
    population = noise.population
    signs, group = population.signs, population.group_size
    size = population.size // shard[1]
    unit = max(group, signs)  # members that belong together: a group, a pair
    units, directions = size // unit, unit // signs
    mapped, merge = _mapped_args(args, in_axes, size // group)
    if group == 1:
        mapped = [x.reshape(units, signs, *x.shape[1:]) for x in mapped]

    def of_unit(u, slices):
        def of_direction(j):
            own = noise.direction(j)
            if signs == 1:
                return one(own, 1, merge([x[0] for x in slices] if group == 1 else slices))
            both = jax.vmap(lambda sign, x: one(own, sign, merge(x)), (0, 0 if group == 1 else None))
            return both(jnp.array([1, -1]), slices)

        first = (shard[0] * units + u) * directions
        if directions == 1:
            return of_direction(first)
        out = jax.vmap(of_direction)(first + jnp.arange(directions))
        return jax.tree.map(lambda y: y.reshape(unit, *y.shape[2:]), out) if signs == 2 else out

    chunk = population.chunk_size and max(1, population.chunk_size // unit)
    if chunk is None or chunk >= units:
        out = jax.vmap(of_unit)(jnp.arange(units), mapped)
    else:
        out = jax.lax.map(lambda item: of_unit(*item), (jnp.arange(units), mapped), batch_size=chunk)
    return out if unit == 1 else jax.tree.map(lambda y: y.reshape(size, *y.shape[2:]), out)


def _mapped_args(args: tuple, in_axes: Any, size: int) -> tuple[list, Callable]:
    """The mapped leaves of `args`, their mapped axis first, and a function from such leaves to the arguments."""
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(f"in_axes must have an entry for each of the {len(args)} args after params, got {in_axes}.")
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    try:
        axes = jax.tree.map(
            lambda axis, tree: jax.tree.map(lambda _: axis, tree), axes, args, is_leaf=lambda axis: axis is None
        )
    except ValueError as error:
        raise ValueError(f"in_axes must be a prefix of the arguments after params, got {in_axes}: {error}") from None
    axes = jax.tree.leaves(axes, is_leaf=lambda axis: axis is None)
    leaves, treedef = jax.tree.flatten(args)
    mapped = []
    for (path, leaf), axis in zip(named_leaves(args), axes):
        if axis is None:
            continue
        if not isinstance(axis, int) or not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(f"in_axes has {axis!r} for argument {path} of shape {jnp.shape(leaf)}.")
        if jnp.shape(leaf)[axis] != size:
            raise ValueError(
                f"in_axes maps axis {axis} of argument {path}, which must have {size} slices (members, or groups of "
                f"members), got shape {jnp.shape(leaf)}."
            )
        mapped.append(jnp.moveaxis(leaf, axis, 0))

    def merge(slices):
        slices = iter(slices)
        return treedef.unflatten([leaf if axis is None else next(slices) for leaf, axis in zip(leaves, axes)])

    return mapped, merge
