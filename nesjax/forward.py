"""A function of one member, with perturbed values for parameters, and the one vmap over all members.

Letters: `N` members, `g` members per group.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checks import check_params, instance_of, traced
from .formed import Formed
from .members import Member, Noise, member, with_sign
from .paths import named_leaves
from .perturbed import Perturbed, Vector
from .population import Leaf
from .rules import evaluate, evaluate_and_reap, transposed
from .views import View


def perturbed(fn: Callable, *, strict: bool = False) -> Callable:
    """Makes `fn(params, *args)` a function of one member: `perturbed(fn)(params, member, *args)`.

    `fn` is any JAX function; it runs unchanged with perturbed parameters. vmap, scan, jit or shard the result.

    Args:
      fn: a function of parameters and anything else, returning a tree of arrays.
      strict: where a parameter would have to be materialised, raise ValueError instead of warning.

    Returns:
      A function `(params, member, *args)` that returns what `fn` does for that member.

    Raises:
      ValueError: by the result: `params` are not what the noise was sampled for, or, if `strict`, one is materialised.
      TypeError: by the result: `member` is none, or `fn` does what JAX or Flax can't trace.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = jnp.zeros((4, 3))
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.5))
      >>> def one(i):
      ...     return nesjax.perturbed(lambda w, x: x @ w)(params, nesjax.member(noise, i), jnp.ones(4))
      >>> jax.vmap(one)(jnp.arange(6)).shape
      (6, 3)
    """

    def run(params, member, *args):
        formed = Formed(strict)
        values = _values(params, member, formed)
        return evaluate(lambda params: traced(fn, params, *args), params, values, formed)

    return run


def perturbed_and_reaped(fn: Callable, *, strict: bool = False, inputs: bool = True) -> Callable:
    """`perturbed`, whose function returns what `fn` does and what each parameter multiplied (`nesjax.taps.Reaped`).

    Without `inputs`, only of parameters with noise on outputs.
    """

    def run(params, member, *args):
        formed = Formed(strict)
        values = _values(params, member, formed, lambda family: inputs or family.on_outputs)
        return evaluate_and_reap(lambda params: traced(fn, params, *args), params, values, formed)

    return run


def _values(params: Any, member: Member, formed: Formed, marked: Callable = lambda family: False) -> list[Any]:
    """What stands for each parameter in a member; uses of those whose family is `marked` are marked for credit."""

    def value(leaf: Leaf, array, shared, own, scale):
        if leaf.family is None:
            return array
        weight = jnp.asarray(array).transpose(np.argsort(leaf.permutation))
        view = View.of(leaf.noise_shape)
        scale = jnp.broadcast_to(scale, leaf.stack)
        entries = jnp.arange(math.prod(leaf.stack), dtype=jnp.int32).reshape(leaf.stack)
        entry = entries if marked(leaf.family) else None
        value = Perturbed(weight, scale, shared, own, leaf.family, view, leaf.path, formed, entry)
        # A vector's noise is no larger than what it is added to; one longer than a matrix's axes may be a raveled tree.
        if len(leaf.noise_shape) < 2 and math.prod(leaf.noise_shape) <= longest:
            value = Vector(value.materialise(), value) if value.family.fused and entry is None else value.materialise()
        return transposed(value, leaf.permutation)

    instance_of(Member, "member", member)
    check_params("params", params, member.leaves, member.treedef)
    longest = max((max(leaf.noise_shape) for leaf in member.leaves if len(leaf.noise_shape) > 1), default=1)
    parts = member.leaves, jax.tree.leaves(params), member.shared, member.own, member.scale
    return [value(*of_leaf) for of_leaf in zip(*parts)]


def argument_names(fn: Callable) -> tuple[str, ...]:
    """What a function calls its positional arguments after params, as far as that is known."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some that are not written in Python
        return ()
    positional = itertools.takewhile(lambda p: p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD), parameters)
    return tuple(p.name for p in positional)[1:]


def materialise(params: Any, noise: Noise, i: Any) -> Any:
    """Member `i` as plain parameters, `params + std * sign_i * E_i`, rounded once to the parameters' dtype.

    Args:
      params: what `noise` was sampled for.
      noise: the generation's, from `sample_noise`.
      i: the member's number, an int or a traced integer scalar.

    Returns:
      A tree like params.

    Raises:
      ValueError: `params` are not what `noise` was sampled for, or a parameter has noise on outputs (`Node`).

    Example:
      >>> import jax, nesjax
      >>> noise = nesjax.sample_noise(jax.random.key(0), jax.numpy.zeros(3), nesjax.Population(size=6, std=0.5))
      >>> abs(nesjax.materialise(jax.numpy.ones(3), noise, 0) - 1).tolist()
      [0.5, 0.5, 0.5]
    """
    return perturbed(lambda params: params)(params, member(noise, i))


def population_apply(
    fn: Callable, params: Any, noise: Noise, *args: Any, in_axes: Any = None, strict: bool = False
) -> Any:
    """Calls `fn(params, *args)` for every member, in one batched pass.

    Args:
      fn: any JAX function of parameters and `args`.
      params: what `noise` was sampled for.
      noise: the generation's, from `sample_noise`.
      *args: further arguments.
      in_axes: as in `jax.vmap`, over `args`: None for what all members share, 0 for one slice a member (a leading axis
        N, or N / g in groups of g).
      strict: as in `perturbed`.

    Returns:
      `fn`'s output with a leading axis N on every leaf.

    Raises:
      ValueError: an argument doesn't fit `in_axes`, or as in `perturbed`.
      TypeError: `noise` is none, or as in `perturbed`.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = jnp.zeros((4, 3))
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.5))
      >>> nesjax.population_apply(lambda w, x: x @ w, params, noise, jnp.ones((6, 2, 4)), in_axes=0).shape
      (6, 2, 3)
    """
    instance_of(Noise, "noise", noise).check("params", params)
    run = perturbed(fn, strict=strict)

    def one(own, sign, args):
        return run(params, with_sign(noise, own, sign), *args)

    return over_members(noise, one, args, in_axes, names=argument_names(fn))


def over_members(
    noise: Noise, one: Callable, args: tuple, in_axes: Any, shard: tuple[Any, int] = (0, 1),
    names: tuple[str, ...] = (), reduce: Callable | None = None,
) -> Any:  # fmt: skip
    """`one(own, sign, args)` over the members: the population's one vmap, in chunks.

    Directions are drawn once and used for both signs, and what a group shares stays unbatched within it. A chunk is
    cut out of the mapped arguments where they lie, so that nothing but the output has the size of the population. The
    last chunk ends with the population: where the size is no multiple, some members are evaluated twice.

    Args:
      shard: `(index, count)`: this device's share of the population; `args` hold the share's slices only.
      names: of the arguments, for messages.
      reduce: `(outputs, first, fresh) -> (kept, sums)`, of each chunk: what has the size of the population, and what is
        summed over it. `first` is the chunk's first member (of this device), `fresh: [chunk]` says which of its members
        no other chunk has evaluated. None: all outputs are kept.

    Returns:
      The outputs of all members, or `(kept, sums)`.
    """
    population = noise.population
    signs, group, size = population.signs, population.group_size, population.size // shard[1]
    unit = max(group, signs)  # members that belong together: a group, a pair
    units, directions, slices = size // unit, unit // signs, unit // group
    axes = mapped_axes(args, in_axes, size // group, names)
    leaves, treedef = jax.tree.flatten(args)

    def merge(mapped):
        mapped = iter(mapped)
        return treedef.unflatten([leaf if axis is None else next(mapped) for leaf, axis in zip(leaves, axes)])

    def cut(leaf, axis, start, count):
        if count < units:
            leaf = jax.lax.dynamic_slice_in_dim(leaf, start * slices, count * slices, axis)
        leaf = jnp.moveaxis(leaf, axis, 0)
        return leaf.reshape(count, signs, *leaf.shape[1:]) if group == 1 else leaf

    def of_unit(u, mapped):
        def of_direction(j):
            own = noise.direction(j)
            if signs == 1:
                return one(own, 1, merge([x[0] for x in mapped] if group == 1 else mapped))
            both = jax.vmap(lambda sign, x: one(own, sign, merge(x)), (0, 0 if group == 1 else None))
            return both(jnp.array([1, -1]), mapped)

        first = (shard[0] * units + u) * directions
        if directions == 1:
            return of_direction(first)
        out = jax.vmap(of_direction)(first + jnp.arange(directions))
        return jax.tree.map(lambda y: y.reshape(unit, *y.shape[2:]), out) if signs == 2 else out

    def of_chunk(start, count):
        mapped = [cut(leaf, axis, start, count) for leaf, axis in zip(leaves, axes) if axis is not None]
        out = jax.vmap(of_unit)(start + jnp.arange(count), mapped)
        return out if unit == 1 else jax.tree.map(lambda y: y.reshape(count * unit, *y.shape[2:]), out)

    chunk = min(units, max(1, (population.chunk_size or size) // unit))
    both = _in_chunks(of_chunk, reduce or (lambda out, first, fresh: (out, ())), units, unit, chunk, shard[0])
    return both if reduce else both[0]


def _in_chunks(of_chunk: Callable, reduce: Callable, units: int, unit: int, chunk: int, shard: Any) -> tuple[Any, Any]:
    """`(kept, sums)` of all `units` of `unit` members, `chunk` units at a time: `of_chunk(start, count)`, reduced."""
    if chunk == units:
        return reduce(of_chunk(0, units), 0, jnp.ones(units * unit, bool))
    firsts = jnp.arange(0, units, chunk)
    starts = jnp.minimum(firsts, units - chunk)

    def reduced(first, start):
        fresh = jnp.repeat(start + jnp.arange(chunk) >= first, unit)
        return reduce(of_chunk(start, chunk), start * unit, fresh)

    def add(sums, at):
        out, more = reduced(*at)
        return jax.tree.map(jnp.add, sums, more), out

    sums = jax.eval_shape(reduced, firsts[0], starts[0])[1]
    # They differ between devices as the index of this device's share does.
    zeros = jax.tree.map(lambda s: jnp.zeros_like(shard, s.dtype, s.shape), sums)
    sums, out = jax.lax.scan(add, zeros, (firsts, starts))
    extra = (starts.size * chunk - units) * unit  # evaluated twice

    def joined(y):
        y, last = y.reshape(-1, *y.shape[2:]), (starts.size - 1) * chunk * unit
        return jnp.concatenate([y[:last], y[last + extra :]]) if extra else y

    return jax.tree.map(joined, out), sums


def mapped_axes(args: tuple, in_axes: Any, size: int, names: tuple[str, ...] = ()) -> list[int | None]:
    """The mapped axis of every leaf of `args`, counted from the front; None if all members share the leaf.

    Raises:
      ValueError: in_axes is no prefix of `args`, or an axis that it maps hasn't `size` slices.
    """
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(f"in_axes must have an entry for each of the {len(args)} args after params, got {in_axes}.")
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    found: list[Any] = []
    try:  # an argument that is None has no leaves
        each = lambda axis, tree: found.extend([axis] * len(jax.tree.leaves(tree)))
        jax.tree.map(each, axes, args, is_leaf=lambda axis: axis is None)
    except ValueError as error:
        raise ValueError(f"in_axes must be a prefix of the arguments after params, got {in_axes}: {error}") from None
    for at, (path, leaf) in enumerate(named_leaves(args)):
        axis, shape = found[at], jnp.shape(leaf)
        if axis is None:
            continue
        first, *inner = path.split("/")
        known = int(first) < len(names)
        path = "/".join([names[int(first)] if known else f"{first} after params", *inner])
        if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
            raise ValueError(f"in_axes has {axis!r} for argument {path} of shape {shape}.")
        if shape[axis] != size:
            raise ValueError(
                f"in_axes maps axis {axis} of argument {path}, which must have {size} slices (members, or groups of "
                f"members), got shape {shape}."
            )
        found[at] = axis % len(shape)
    return found
