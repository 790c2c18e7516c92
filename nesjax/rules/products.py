"""Products: `dot_general` and convolutions with a parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.extend.core import primitives as core

from ..dense import dense, dense_p
from ..noise import ConvGeometry
from ..noise.base import accumulator
from ..perturbed import Parameter, Perturbed, Vector, add_noise, array_of
from ..taps import tap_conv, tap_product
from .lazy import Expression, Product, bind, on_either
from .outputs import in_kernel, with_noise


def noise_product(value: Perturbed, x, axes, precision):
    """`scale * E_i` contracted with `x`; the stack's axes are mapped over one by one."""

    def product(parts, x, axes, stack):
        scale, shared, member, entry = parts
        if not stack:

            def contract(x, axes):
                y = value.family.contract(shared, member, value.view.shape, x, axes, precision=precision)
                if y is NotImplemented or entry is None:
                    return y
                return tap_product(value.path, entry, value.view.shape, x, axes, y)

            if not jnp.issubdtype(x.dtype, jnp.complexfloating):
                y = value.view.contract(contract, x, axes)
                return y if y is NotImplemented else scale * y
            real, imaginary = (value.view.contract(contract, part, axes) for part in (x.real, x.imag))
            return real if real is NotImplemented else scale * jax.lax.complex(real, imaginary)

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


def _fusable(value: Perturbed, x, axes, dtype) -> bool:
    """Whether the family asks for a kernel, and it is a product of rows with a matrix, for which there is one."""
    labels, own, out = axes
    if not value.family.fused or len(own) != 2 or (labels, out) != ((*out[:-1], own[0]), (*out[:-1], own[1])):
        return False
    on_outputs = value.family.on_outputs and value.shape[1] % 32 == 0  # whole words a row
    on_weights = value.view.noise_axes is not None and not value.stack and value.entry is None
    return x.dtype == value.dtype == dtype and (on_outputs if value.family.on_outputs else on_weights)


def _fused(value: Perturbed, x, by_xla, kernel):
    """`by_xla(value, x)`, in one kernel where it can be."""
    places: Any = value.view.noise_axes

    def of_member(x, weight, scale, t, s):
        member = (s[None], t[None]) if places == (0, 1) else (t[None], s[None])
        return by_xla(value.replace(weight, scale=scale, member=member), x)

    s, t = (value.member[axis][0] for axis in places)
    return kernel(of_member, x, value.weight, value.scale, t, s)


def _one_parameter(primitive, x, y) -> tuple[Any, Any]:
    """The operands with at most one parameter: an activation is formed, else the first of two is, and it is said."""
    x, y = (v.materialise() if isinstance(v, Expression) and v.activation and isinstance(other, Parameter) else v
            for v, other in ((x, y), (y, x)))  # fmt: skip
    if isinstance(x, Parameter) and isinstance(y, Parameter):
        x = x.announce(f"{primitive.name} of two perturbed parameters")
    return x, y


def _of_expression(primitive, value: Expression, x, product: Product, dtype):
    y = value.product(product, x)
    if y is NotImplemented:
        y = product.apply(x, value.announce(primitive.name))
    return y.astype(dtype)


def _axes(x, w, dimension_numbers) -> tuple[tuple[int, ...], ...]:
    """Labels of the axes of two operands of a product, and of those of the result."""
    (contracted, batched) = dimension_numbers
    labels = [list(range(jnp.ndim(x))), list(range(jnp.ndim(x), jnp.ndim(x) + jnp.ndim(w)))]
    for left, right in zip((*contracted[0], *batched[0]), (*contracted[1], *batched[1])):
        labels[1][right] = labels[0][left]
    free = [[la for at, la in enumerate(labels[s]) if at not in (*contracted[s], *batched[s])] for s in (0, 1)]
    return *map(tuple, labels), (*(labels[0][at] for at in batched[0]), *free[0], *free[1])


@quax.register(dense_p)
def _(x: Any, w: Any, *bias: Any, tail, dimension_numbers, preferred_element_type, **params):
    product = {"dimension_numbers": dimension_numbers, "preferred_element_type": preferred_element_type, **params}
    fits = isinstance(w, Perturbed) and not isinstance(x, Parameter) and all(isinstance(b, Vector) for b in bias)
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)
    if fits and _fusable(w, x, _axes(x, w, dimension_numbers), dtype):
        return _dot_general(
            core.dot_general_p, array_of(x), w, kernel=functools.partial(in_kernel, tail=tail, bias=bias), **product
        )
    return quax.quaxify(functools.partial(dense, tail=tail, **product))(x, w, *bias)


@on_either(core.dot_general_p)
def _dot_general(primitive, x, w, *, dimension_numbers, preferred_element_type, kernel: Callable = in_kernel, **params):
    x, w = _one_parameter(primitive, x, w)
    labels_x, labels_w, out = _axes(x, w, dimension_numbers)
    first = isinstance(x, Parameter)
    value: Any = x if first else w
    array = w if first else x
    mine, other = (labels_x, labels_w) if first else (labels_w, labels_x)
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)

    def apply(array, value, kind=None):
        operands = (value, array) if first else (array, value)
        return bind(
            primitive, *operands, dimension_numbers=dimension_numbers,
            preferred_element_type=jnp.dtype(kind or accumulator(dtype)), **params,
        )  # fmt: skip

    if isinstance(value, Expression):
        along, own = (tuple(where.index(la) if la in where else None for la in mine) for where in (other, out))
        return _of_expression(primitive, value, array, Product(apply, along, own), dtype)
    axes = other, mine, out
    fused = _fusable(value, array, axes, dtype)
    if value.family.on_outputs:
        rows = [axis for axis, label in enumerate(out) if label not in mine]
        own = [axis for axis, label in enumerate(mine) if label not in other]
        return with_noise(value, apply, array, dtype, rows=rows, own=own, kernel=kernel if fused else None)

    def by_xla(value, array):
        x_of_noise = array.astype(jnp.promote_types(array.dtype, value.dtype))
        noise = noise_product(value, x_of_noise, axes, params["precision"])
        return noise if noise is NotImplemented else add_noise(apply(array, value.weight), noise, dtype)

    y = _fused(value, array, by_xla, kernel) if fused else by_xla(value, array)
    return apply(array, value.announce(primitive.name), dtype) if y is NotImplemented else y


@on_either(core.conv_general_dilated_p)
def _(primitive, x, w, *, dimension_numbers, preferred_element_type, feature_group_count, batch_group_count, **params):
    x, w = _one_parameter(primitive, x, w)
    numbers, grouped = dimension_numbers, feature_group_count > 1 or batch_group_count > 1
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.dtype)

    def apply(x, w, kind=None):
        return bind(
            primitive, x, w, dimension_numbers=numbers, feature_group_count=feature_group_count,
            batch_group_count=batch_group_count, preferred_element_type=jnp.dtype(kind or accumulator(dtype)), **params,
        )  # fmt: skip

    if isinstance(x, Parameter):
        return apply(x.announce(primitive.name), w, dtype)
    if isinstance(w, Expression):
        places: list[list[int | None]] = [[None] * w.ndim, [None] * w.ndim]
        places[1][numbers.rhs_spec[0]] = numbers.out_spec[1]
        if not grouped:
            places[0][numbers.rhs_spec[1]] = numbers.lhs_spec[1]
        return _of_expression(primitive, w, x, Product(apply, tuple(places[0]), tuple(places[1]), grouped), dtype)
    if w.family.on_outputs:
        own = () if grouped else numbers.rhs_spec[:1]
        return with_noise(w, apply, x, dtype, rows=(numbers.out_spec[0], *numbers.out_spec[2:]), own=own)
    noise = NotImplemented if batch_group_count > 1 else _noise_conv(w, x, numbers, feature_group_count, **params)
    if noise is NotImplemented:
        return apply(x, w.announce(primitive.name), dtype)
    return add_noise(apply(x, w.weight), noise, dtype)


def _noise_conv(
    w: Perturbed, x, numbers, groups, *, window_strides, padding, lhs_dilation, rhs_dilation, precision, **_
):
    """`x` convolved with `scale * E_i`."""
    axes = w.view.noise_axes
    if axes is None or w.stack:
        return NotImplemented
    last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])  # to [B, *space, C]
    out_axis, in_axis, *window = (axes[at] for at in numbers.rhs_spec)
    geometry = ConvGeometry(
        (*window, in_axis, out_axis), tuple(window_strides), tuple(padding), tuple(lhs_dilation), tuple(rhs_dilation),
        groups, precision,
    )  # fmt: skip
    noise = w.family.conv(w.shared, w.member, w.view.shape, x.transpose(last), geometry)
    if noise is NotImplemented:
        return noise
    if w.entry is not None:
        noise = tap_conv(w.path, w.entry, w.view.shape, x.transpose(last), geometry, noise)
    spec = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return w.scale * noise.transpose([spec.index(axis) for axis in range(noise.ndim)])
