"""Sums of a parameter and of its squares: means, norms and penalties. They are products, so nothing is formed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as core

from ..noise.base import accumulator
from ..perturbed import Perturbed
from .lazy import Expression, Square, bind, on_one
from .products import noise_product


@on_one(core.reduce_sum_p)
def _(primitive, w, *, axes, **params):
    if isinstance(w, Square):
        total = _sum_of_squares(w.value, axes) if isinstance(w.value, Perturbed) else NotImplemented
        return primitive.bind(w.announce("square"), axes=axes, **params) if total is NotImplemented else total
    if isinstance(w, Expression) and w.activation:
        return primitive.bind(w.materialise(), axes=axes, **params)
    kept = tuple(axis for axis in range(w.ndim) if axis not in axes)
    order = (*kept, *axes)  # the axes that are summed, last
    ones = jnp.ones([w.shape[axis] for axis in axes], w.dtype)
    numbers = ((tuple(range(len(axes))), tuple(range(len(kept), w.ndim))), ((), ()))
    return bind(
        core.dot_general_p, ones, bind(core.transpose_p, w, permutation=order), dimension_numbers=numbers,
        precision="highest", preferred_element_type=w.dtype, out_sharding=None,
    )  # fmt: skip


@on_one(core.square_p, core.integer_pow_p)
def _(primitive, w, *, y=2):
    return Square(w) if y == 2 else primitive.bind(w.announce(primitive.name), y=y)


def _sum_of_squares(w: Perturbed, axes: tuple[int, ...]):
    """`|W|^2 + 2 s <W, E> + s^2 |E|^2` over `axes`, or `NotImplemented`."""
    squared = _squared(w)
    if squared is NotImplemented:
        return squared
    own = tuple(range(w.ndim))
    out = tuple(axis for axis in own if axis not in axes)
    weight = w.weight.astype(accumulator(w.dtype))
    cross = noise_product(w, weight, (own, own, out), "highest")
    ones = jnp.ones([w.shape[axis] for axis in axes], weight.dtype)
    squares = noise_product(squared, ones, (axes, own, out), "highest")
    if cross is NotImplemented or squares is NotImplemented:
        return NotImplemented
    return (jnp.square(weight).sum(axes) + 2 * cross + squares).astype(w.dtype)


def _squared(w: Perturbed):
    """The parameter with the squares of its noise, or `NotImplemented`."""
    family: Any = NotImplemented

    def parts(shared, member) -> Any:
        nonlocal family
        found = w.family.squared(shared, member, w.view.shape)
        if found is NotImplemented:
            return ()
        family, *parts = found
        return parts

    for _ in range(w.stack):
        parts = jax.vmap(parts)
    found = parts(w.shared, w.member)
    if family is NotImplemented:
        return family
    scale = jnp.square(w.scale)
    return w.replace(w.weight, family=family, scale=scale, shared=found[0], member=found[1], entry=None)
