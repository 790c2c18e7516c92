"""Sums and scalings. `W + array` and `W * g` stay expressions; what an activation outsizes becomes an array."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as core

from ..perturbed import Parameter, Perturbed
from .lazy import Expression, Scaled, Square, Sum, bind, on_either, on_one


def _noise_numbers(w: Parameter) -> int:
    """The numbers in the parameter's noise: fewer than its own if it was broadcast."""
    size = math.prod(w.shape)
    return min(size, math.prod(w.view.shape) * w.scale.size) if isinstance(w, Perturbed) else size


def _small(x: Any, y: Any, shape: tuple[int, ...]) -> list:
    """The operands, arrays in place of those that are activations or broadcast to something larger."""

    def is_small(value, other):
        if not isinstance(value, Parameter):
            return False
        if isinstance(value, Expression) and value.activation:
            return True
        return value.shape != shape or (not isinstance(other, Parameter) and jnp.size(other) > _noise_numbers(value))

    return [v.materialise() if is_small(v, other) else v for v, other in ((x, y), (y, x))]


def _term(value: Any, shape: tuple[int, ...]) -> Any:
    """A term of a sum of `shape`: what varies along some axes only is kept that small."""
    if jnp.shape(value) == shape:
        return value
    value = jnp.reshape(value, jnp.shape(value) or (1,) * len(shape))
    return Scaled(jnp.ones([1 if size > 1 else full for size, full in zip(value.shape, shape)], value.dtype), value)


@on_either(core.add_p, core.sub_p)
def _(primitive, x, y, **params):
    shape = jnp.broadcast_shapes(jnp.shape(x), jnp.shape(y))
    x, y = _small(x, y, shape)
    if not isinstance(x, Parameter) and not isinstance(y, Parameter):
        return primitive.bind(x, y, **params)
    x, y = _term(x, shape), _term(y, shape)
    return Sum((x, bind(core.neg_p, y) if primitive is core.sub_p else y))


@on_either(core.mul_p, core.div_p)
def _(primitive, x, y, **params):
    if x is y and primitive is core.mul_p:
        return Square(x)
    shape = jnp.broadcast_shapes(jnp.shape(x), jnp.shape(y))
    x, y = _small(x, y, shape)
    w, factor = (x, y) if isinstance(x, Parameter) else (y, x)
    if not isinstance(w, Parameter):
        return primitive.bind(x, y, **params)
    divides = primitive is core.div_p
    size = jnp.size(factor)
    if isinstance(factor, Parameter) or (divides and w is y) or (1 < size == math.prod(shape)):
        return Parameter.default(primitive, (x, y), params)
    if isinstance(w, Perturbed) and size == 1 and not jnp.issubdtype(w.dtype, jnp.complexfloating):
        number = jnp.reshape(factor, ()).astype(w.scale.dtype)
        scale = w.scale / number if divides else w.scale * number
        return w.replace(primitive.bind(w.weight, factor, **params), scale=scale)
    factor = jnp.reshape(factor, jnp.shape(factor) or (1,) * len(shape))
    return Scaled(w, 1 / factor if divides else factor)


@on_one(core.neg_p)
def _(primitive, w, **params):
    if isinstance(w, Perturbed):
        return w.replace(-w.weight, scale=-w.scale)
    return Scaled(w, jnp.full((1,) * w.ndim, -1, w.dtype))
