"""Rows of a parameter: an embedding's lookup, a slice whose start is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import primitives as core

from ..perturbed import Perturbed, add_noise
from ..taps import tap_take
from ..views import View
from .outputs import with_noise

ArrayLike = Any


def _rows(w: Perturbed, exact: jax.Array, indices: jax.Array, operation: Callable[[jax.Array], jax.Array], name: str):
    """Rows of the parameter, `exact` without noise; `operation` is the fallback on the dense parameter."""
    noise = NotImplemented
    if not w.stack and w.view == View.of(w.view.shape):
        indices = jnp.clip(indices, 0, w.view.shape[0] - 1)
        noise = w.family.take(w.shared, w.member, w.view.shape, indices)
        if noise is not NotImplemented and w.entry is not None:
            noise = tap_take(w.path, w.entry, indices, noise)
    if noise is NotImplemented:
        return operation(w.announce(name))
    return add_noise(exact, (w.scale * noise).reshape(exact.shape), w.dtype)


@quax.register(core.gather_p)
def _(w: Perturbed, indices: ArrayLike, *, dimension_numbers, slice_sizes, mode, **params):
    def gather(array, indices=indices):
        return core.gather_p.bind(
            array, indices, dimension_numbers=numbers, slice_sizes=slice_sizes, mode=mode, **params
        )

    numbers, batch = dimension_numbers, indices.ndim - 1
    if w.family.on_outputs:
        rows = [axis for axis in range(batch + len(numbers.offset_dims)) if axis not in numbers.offset_dims]
        return with_noise(w, lambda indices, array: gather(array, indices), indices, w.dtype, rows=rows)
    whole = tuple(slice_sizes) == (1, *w.shape[1:]) and not numbers.operand_batching_dims
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    # Starts along the other axes, of which all is taken, can only be clipped to 0.
    rows = numbers.start_index_map[:1] == (0,) and not (fills and len(numbers.start_index_map) > 1)
    kept = w.ndim - len(numbers.collapsed_slice_dims)
    trailing = numbers.offset_dims == tuple(range(batch, batch + kept)) and kept >= w.ndim - 1
    if not (whole and rows and trailing) or numbers.collapsed_slice_dims not in ((), (0,)):
        return gather(w.announce("gather"))
    row = indices[..., 0]
    out = _rows(w, gather(w.weight), row, gather, "gather")
    if not fills:
        return out
    inside = ((row >= 0) & (row < w.shape[0])).reshape(*row.shape, *(1,) * (out.ndim - row.ndim))
    return jnp.where(inside, out, gather(w.weight))


@quax.register(core.dynamic_slice_p)
def _(w: Perturbed, *starts: ArrayLike, slice_sizes, **params):
    def cut(array, starts=starts):
        return core.dynamic_slice_p.bind(array, *starts, slice_sizes=slice_sizes, **params)

    if w.family.on_outputs and not w.stack:
        return with_noise(w, lambda starts, array: cut(array, list(starts)), jnp.stack(starts), w.dtype, rows=(0,))
    if tuple(slice_sizes[1:]) != w.shape[1:]:
        return cut(w.announce("dynamic_slice"))
    if w.stack:
        return w.on_stack(lambda leaf: lax.dynamic_slice_in_dim(leaf, starts[0], slice_sizes[0]))
    start = jnp.clip(starts[0], 0, w.shape[0] - slice_sizes[0])  # as dynamic_slice does
    return _rows(w, cut(w.weight), start + jnp.arange(slice_sizes[0]), cut, "dynamic_slice")
