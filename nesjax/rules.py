"""What each primitive does with a perturbed parameter: the only place where operations meet noise.

Products with a `Perturbed` add the noise's own product to the weight's, so the sum is never formed; operations that
only rearrange it give another `Perturbed`. Anything else materialises it for that one operation, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as core

from .formed import Formed
from .noise import ConvGeometry
from .noise.base import accumulator
from .perturbed import Perturbed, add_noise
from .primal import array_p, primal_jaxpr, scanned_p
from .taps import Reaped, reap, tap_conv, tap_product, tap_take
from .views import View

ArrayLike = Any  # plum dispatches on it: whatever is not a Perturbed


# ---- products


def _noise_product(value: Perturbed, x, axes, precision):
    """`scale * E_i` contracted with `x`; the stack's axes are mapped over one by one."""

    def product(parts, x, axes, stack):
        scale, shared, member, entry = parts
        if not stack:

            def contract(x, axes):
                y = value.family.contract(shared, member, value.view.shape, x, axes, precision=precision)
                if y is NotImplemented or entry is None:
                    return y
                return tap_product(value.path, entry, value.view.shape, x, axes, y)

            y = value.view.contract(contract, x, axes)
            return y if y is NotImplemented else scale * y

        labels, own, out = axes
        label, own = own[0], own[1:]
        at = labels.index(label) if label in labels else None
        to = out.index(label) if label in out else None
        inner = (tuple(la for la in labels if la != label), own, tuple(la for la in out if la != label))
        missing = False

        def one(parts, x):
            nonlocal missing
            y = product(parts, x, inner, stack - 1)
            missing = y is NotImplemented
            return 0.0 if missing else y

        y = jax.vmap(one, in_axes=(0, at), out_axes=to or 0)(parts, x)
        return NotImplemented if missing else y if to is not None else y.sum(0)

    return product((value.scale, value.shared, value.member, value.entry), x, axes, value.stack)


def _dot(x, w, dimension_numbers, precision, preferred_element_type, params):
    """A `dot_general` of which one operand is perturbed, the other an array."""
    value, array = (x, w) if isinstance(x, Perturbed) else (w, x)
    (contracted, batched), bind = dimension_numbers, core.dot_general_p.bind
    labels = [list(range(x.ndim)), list(range(x.ndim, x.ndim + w.ndim))]
    for left, right in zip((*contracted[0], *batched[0]), (*contracted[1], *batched[1])):
        labels[1][right] = labels[0][left]
    free = [[la for at, la in enumerate(labels[s]) if at not in (*contracted[s], *batched[s])] for s in (0, 1)]
    out = (*(labels[0][at] for at in batched[0]), *free[0], *free[1])
    mine, other = (labels[0], labels[1]) if value is x else (labels[1], labels[0])
    noise = NotImplemented
    if not jnp.issubdtype(array.dtype, jnp.complexfloating):
        x_of_noise = array.astype(jnp.promote_types(array.dtype, value.dtype))
        noise = _noise_product(value, x_of_noise, (tuple(other), tuple(mine), out), precision)
    dense = value.announce("dot_general") if noise is NotImplemented else value.weight
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    kind = dtype if noise is NotImplemented else accumulator(dtype)
    exact = bind(
        *((dense, array) if value is x else (array, dense)), dimension_numbers=dimension_numbers, precision=precision,
        preferred_element_type=jnp.dtype(kind), **params,
    )  # fmt: skip
    return exact if noise is NotImplemented else add_noise(exact, noise, dtype)


@quax.register(core.dot_general_p)
def _(x: ArrayLike, w: Perturbed, *, dimension_numbers, precision, preferred_element_type, **params):
    return _dot(x, w, dimension_numbers, precision, preferred_element_type, params)


@quax.register(core.dot_general_p)
def _(w: Perturbed, x: ArrayLike, *, dimension_numbers, precision, preferred_element_type, **params):
    return _dot(w, x, dimension_numbers, precision, preferred_element_type, params)


@quax.register(core.dot_general_p)
def _(w: Perturbed, x: Perturbed, *, dimension_numbers, precision, preferred_element_type, **params):
    dense = x.announce("dot_general of two perturbed parameters")
    return _dot(w, dense, dimension_numbers, precision, preferred_element_type, params)


@quax.register(core.conv_general_dilated_p)
def _(
    x: ArrayLike, w: Perturbed, *, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision, preferred_element_type, **params,
):  # fmt: skip
    axes, numbers = w.view.noise_axes, dimension_numbers
    last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])  # to [B, *space, C]
    noise = NotImplemented
    if axes is not None and not w.stack and batch_group_count == 1:
        out_axis, in_axis, *window = (axes[at] for at in numbers.rhs_spec)
        geometry = ConvGeometry(
            (*window, in_axis, out_axis), tuple(window_strides), tuple(padding), tuple(lhs_dilation),
            tuple(rhs_dilation), feature_group_count, precision,
        )  # fmt: skip
        noise = w.family.conv(w.shared, w.member, w.view.shape, x.transpose(last), geometry)
        if noise is not NotImplemented and w.entry is not None:
            noise = tap_conv(w.path, w.entry, w.view.shape, x.transpose(last), geometry, noise)
    dense = w.announce("conv_general_dilated") if noise is NotImplemented else w.weight
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    exact = core.conv_general_dilated_p.bind(
        x, dense, window_strides=window_strides, padding=padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=numbers, feature_group_count=feature_group_count, batch_group_count=batch_group_count,
        precision=precision, preferred_element_type=jnp.dtype(dtype if noise is NotImplemented else accumulator(dtype)),
        **params,
    )  # fmt: skip
    if noise is NotImplemented:
        return exact
    spec = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    noise = noise.transpose([spec.index(axis) for axis in range(noise.ndim)])
    return add_noise(exact, w.scale * noise, dtype)


# ---- rows


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
    def gather(array):
        return core.gather_p.bind(
            array, indices, dimension_numbers=numbers, slice_sizes=slice_sizes, mode=mode, **params
        )

    numbers, batch = dimension_numbers, indices.ndim - 1
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
    def cut(array):
        return core.dynamic_slice_p.bind(array, *starts, slice_sizes=slice_sizes, **params)

    if tuple(slice_sizes[1:]) != w.shape[1:]:
        return cut(w.announce("dynamic_slice"))
    if w.stack:
        return w.on_stack(lambda leaf: lax.dynamic_slice_in_dim(leaf, starts[0], slice_sizes[0]))
    start = jnp.clip(starts[0], 0, w.shape[0] - slice_sizes[0])  # as dynamic_slice does
    return _rows(w, cut(w.weight), start + jnp.arange(slice_sizes[0]), cut, "dynamic_slice")


# ---- structure


def _rearranged(w: Perturbed, weight: jax.Array, view: View | None, name: str, operation):
    return operation(w.announce(name)) if view is None else w.replace(weight, view=view)


@quax.register(core.transpose_p)
def _(w: Perturbed, *, permutation, **params):
    stack = w.stack
    stays = tuple(permutation[:stack]) == tuple(range(stack))
    view = w.view.transpose([axis - stack for axis in permutation[stack:]]) if stays else None
    return _rearranged(w, w.weight.transpose(permutation), view, "transpose", lambda a: a.transpose(permutation))


@quax.register(core.reshape_p)
def _(w: Perturbed, *args: ArrayLike, new_sizes, dimensions=None, **params):
    stays = dimensions is None and tuple(new_sizes[: w.stack]) == w.shape[: w.stack]
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


@quax.register(core.convert_element_type_p)
def _(w: Perturbed, *, new_dtype, **params):
    wide = jnp.issubdtype(new_dtype, jnp.floating) and jnp.finfo(new_dtype).bits >= 16  # others quantise the noise too
    weight = w.weight if wide else w.announce("convert_element_type")
    weight = core.convert_element_type_p.bind(weight, new_dtype=new_dtype, **params)
    return w.replace(weight) if wide else weight


@quax.register(core.copy_p)
def _(w: Perturbed):
    return w


def _elementwise(primitive, x, y, params):
    """A sum or a product with another operand. Dense noise no larger than an activation is nothing to announce."""
    if isinstance(x, Perturbed) and isinstance(y, Perturbed):
        return primitive.bind(x.announce(primitive.name), y.announce(primitive.name), **params)
    w, other = (x, y) if isinstance(x, Perturbed) else (y, x)
    if jnp.ndim(other) == 0 and (primitive is core.mul_p or (primitive is core.div_p and w is x)):
        factor = jnp.asarray(other, w.scale.dtype)
        scale = w.scale * factor if primitive is core.mul_p else w.scale / factor
        return w.replace(primitive.bind(w.weight, other, **params), scale=scale)
    numbers = min(w.weight.size, math.prod(w.view.shape) * w.scale.size)
    activation = jnp.size(other) >= numbers if primitive is core.add_p else jnp.size(other) > numbers
    dense = w.materialise() if activation else w.announce(primitive.name)
    return primitive.bind(*((dense, y) if w is x else (x, dense)), **params)


for _primitive in (core.add_p, core.mul_p, core.div_p):

    @quax.register(_primitive)
    def _(x: ArrayLike, y: Perturbed, *, primitive=_primitive, **params):
        return _elementwise(primitive, x, y, params)

    @quax.register(_primitive)
    def _(x: Perturbed, y: ArrayLike, *, primitive=_primitive, **params):
        return _elementwise(primitive, x, y, params)

    @quax.register(_primitive)
    def _(x: Perturbed, y: Perturbed, *, primitive=_primitive, **params):
        return _elementwise(primitive, x, y, params)


@quax.register(core.neg_p)
def _(w: Perturbed, **params):
    return w.replace(-w.weight, scale=-w.scale)


# ---- functions


@quax.register(scanned_p)
def _(w: Perturbed):
    if w.stack:
        return w
    return w.announce("scan over its leading axis (a rule `nesjax.Stacked(family)` gives each entry its own noise)")


@quax.register(array_p)
def _(w: Perturbed):
    return w.announce("a loop that changes it or a branch that gives it")


def evaluate_and_reap(fn: Callable, params: Any, values: Sequence[Any], formed: Formed) -> tuple[Any, Reaped]:
    """`evaluate`, and what the values that have an `entry` multiplied, read off a trace of the whole member."""
    arrays, tree = jax.tree.flatten(list(values))
    trace = jax.make_jaxpr(lambda *arrays: evaluate(fn, params, tree.unflatten(arrays), formed), return_shape=True)
    closed, out = trace(*arrays)
    outs, reaped = reap(closed, *arrays)
    return jax.tree.unflatten(jax.tree.structure(out), outs), reaped


def evaluate(fn: Callable, params: Any, values: Sequence[Any], formed: Formed) -> Any:
    """`fn(params)` with the leaves of `params` replaced by `values`: arrays or `Perturbed`, of the leaves' shapes."""
    primal, structure = primal_jaxpr(fn, params)
    with formed.during(primal):
        out = quax.quaxify(jaxpr_as_fun(primal))(*values)
    return structure.unflatten([v.materialise() if isinstance(v, Perturbed) else v for v in out])
