"""Transposes, reshapes, slices and the like: what only rearranges a parameter gives another one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import primitives as core

from ..perturbed import Parameter, Perturbed, array_of
from ..views import View
from .lazy import Expression, Joined, Transposed, bind, on_one, transposed

ArrayLike = Any


def _rearranged(w: Perturbed, weight: jax.Array, view: View | None, name: str, operation):
    return operation(w.announce(name)) if view is None else w.replace(weight, view=view)


@quax.register(core.transpose_p)
def _(w: Perturbed, *, permutation, **params):
    stack = w.stack
    stays = tuple(permutation[:stack]) == tuple(range(stack))
    if not stays:
        return Transposed(w, tuple(permutation))
    return w.replace(w.weight.transpose(permutation), view=w.view.transpose([at - stack for at in permutation[stack:]]))


@quax.register(core.reshape_p)
def _(w: Perturbed, *args: ArrayLike, new_sizes, dimensions=None, **params):
    stays = dimensions is None and tuple(new_sizes[: w.stack]) == w.shape[: w.stack]
    matrix = sum(size > 1 for size in new_sizes[w.stack :]) > 1
    if len(w.view.shape) == 1 and matrix:  # a vector has no product of its own as a matrix
        w.formed.add(w.path, "reshape of a vector to a matrix", w.weight.size * w.weight.dtype.itemsize)
        return w.materialise().reshape(new_sizes)
    view = w.view.reshape(new_sizes[w.stack :]) if stays else None
    return _rearranged(w, w.weight.reshape(new_sizes), view, "reshape", lambda a: a.reshape(new_sizes))


@quax.register(core.squeeze_p)
def _(w: Perturbed, *, dimensions, **params):
    outer = [axis for axis in dimensions if axis < w.stack]
    if outer:
        w = w.on_stack(lambda leaf: lax.squeeze(leaf, outer))
    inner = [axis - len(outer) for axis in dimensions if axis not in outer]
    weight = lax.squeeze(w.weight, inner)
    view = w.view.reshape(weight.shape[w.stack :])
    return _rearranged(w, weight, view, "squeeze", lambda a: a.reshape(weight.shape))


@quax.register(core.rev_p)
def _(w: Perturbed, *, dimensions, **params):
    inner = [axis - w.stack for axis in dimensions]
    view = w.view.reverse(inner) if min(inner, default=0) >= 0 else None
    return _rearranged(w, lax.rev(w.weight, dimensions), view, "rev", lambda a: lax.rev(a, dimensions))


@quax.register(core.broadcast_in_dim_p)
def _(w: Perturbed, *args: ArrayLike, shape, broadcast_dimensions, **params):
    def broadcast(array):
        return lax.broadcast_in_dim(array, shape, broadcast_dimensions)

    view = w.view.broadcast(shape, broadcast_dimensions) if not w.stack else None
    return _rearranged(w, broadcast(w.weight), view, "broadcast_in_dim", broadcast)


def _slice(w: Perturbed, starts, stops, steps):
    def cut(array):
        return lax.slice(array, starts, stops, steps)

    stack = w.stack
    for axis in range(stack):
        w = w.on_stack(lambda leaf: lax.slice_in_dim(leaf, starts[axis], stops[axis], steps[axis], axis))  # noqa: B023
    starts, steps = (*(0,) * stack, *starts[stack:]), (*(1,) * stack, *steps[stack:])
    stops = (*w.shape[:stack], *stops[stack:])
    return _rearranged(w, cut(w.weight), w.view.slice(starts[stack:], stops[stack:], steps[stack:]), "slice", cut)


@quax.register(core.slice_p)
def _(w: Perturbed, *, start_indices, limit_indices, strides, **params):
    return _slice(w, start_indices, limit_indices, strides or (1,) * w.ndim)


@quax.register(lax.split_p)
def _(w: Perturbed, *, sizes, axis, **params):
    parts, start = [], 0
    for size in map(int, sizes):
        starts = [start if at == axis else 0 for at in range(w.ndim)]
        stops = [start + size if at == axis else length for at, length in enumerate(w.shape)]
        parts.append(_slice(w, starts, stops, (1,) * w.ndim))
        start += size
    return parts


@on_one(lax.unstack_p)
def _(primitive, w, *, axis, **params):
    def entry(at):
        starts, stops = [[at + end if k == axis else end * n for k, n in enumerate(w.shape)] for end in (0, 1)]
        part = bind(core.slice_p, w, start_indices=starts, limit_indices=stops, strides=None)
        return bind(core.squeeze_p, part, dimensions=(axis,))

    return list(map(entry, range(w.shape[axis])))


@on_one(lax.tile_p)
def _(primitive, w, *, reps, **params):
    shape = tuple(size for both in zip(reps, w.shape) for size in both)
    own = tuple(range(1, len(shape), 2))
    w = bind(core.broadcast_in_dim_p, w, shape=shape, broadcast_dimensions=own, sharding=None)
    sizes = tuple(shape[axis - 1] * shape[axis] for axis in own)
    return bind(core.reshape_p, w, new_sizes=sizes, dimensions=None, sharding=None)


@on_one(core.convert_element_type_p)
def _(primitive, w, *, new_dtype, **params):
    # Others quantise the noise too. Complex numbers are pairs of floats.
    wide = jnp.issubdtype(new_dtype, jnp.inexact) and jnp.finfo(new_dtype).bits >= 16
    if not wide:
        return primitive.bind(w.announce(primitive.name), new_dtype=new_dtype, **params)
    if isinstance(w, Perturbed):
        return w.replace(primitive.bind(w.weight, new_dtype=new_dtype, **params))
    if w.activation:  # rounded once, as a whole
        return primitive.bind(w.materialise(), new_dtype=new_dtype, **params)
    return w.map(functools.partial(bind, primitive, new_dtype=new_dtype, **params))


@on_one(core.copy_p, core.name_p)
def _(primitive, w, **params):
    return w


@on_one(core.sharding_constraint_p)
def _(primitive, w, **params):  # a member's parameter is never laid out, but its weight is
    return w.replace(primitive.bind(w.weight, **params)) if isinstance(w, Perturbed) else w


@quax.register(core.transpose_p)
def _(w: Expression, *, permutation, **params):
    return w.transpose(tuple(permutation))


@quax.register(core.concatenate_p)
def _(*pieces: Any, dimension, **params):
    pieces = tuple(map(array_of, pieces))
    if not any(isinstance(piece, Parameter) for piece in pieces):
        return core.concatenate_p.bind(*pieces, dimension=dimension, **params)
    joined = Joined(pieces, dimension)
    return joined.materialise() if joined.activation else joined


@quax.register(core.slice_p)
def _(w: Transposed, *, start_indices, limit_indices, strides, **params):
    own = [w.permutation.index(axis) for axis in range(w.ndim)]
    starts, stops, steps = (
        [bounds[at] for at in own] for bounds in (start_indices, limit_indices, strides or (1,) * w.ndim)
    )
    return transposed(_slice(w.value, starts, stops, steps), w.permutation)


@quax.register(core.squeeze_p)
def _(w: Transposed, *, dimensions, **params):
    gone = [w.permutation[axis] for axis in dimensions]
    left = [axis for axis in range(w.ndim) if axis not in gone]
    value = bind(core.squeeze_p, w.value, dimensions=tuple(gone))
    return transposed(value, [left.index(axis) for axis in w.permutation if axis in left])


@quax.register(core.slice_p)
def _(w: Joined, *, start_indices, limit_indices, strides, **params):
    steps = strides or (1,) * w.ndim
    if steps[w.axis] == 1:
        return w.slice(tuple(start_indices), tuple(limit_indices), tuple(steps))
    return lax.slice(w.announce("slice"), start_indices, limit_indices, strides)
