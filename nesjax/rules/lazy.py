"""Expressions of perturbed parameters that a product can still take apart: sums, scalings along axes, concatenations.

`x @ (A + W)` is `x @ A + x @ W`; `x @ (W * g)` is `(x @ W) * g` or `(x * g) @ W`; `x @ [W, V]` is `[x @ W, x @ V]`.
An expression in an operation that can't is formed, as a parameter is.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.core import ShapedArray
from jax.extend.core import primitives as core

from ..perturbed import Parameter, array_of


def bind(primitive, *values: Any, **params: Any) -> Any:
    """The primitive with whatever the rules make of it for these values."""
    return quax.quaxify(lambda *values: primitive.bind(*values, **params))(*values)


def on_one(*primitives):
    """Registers `rule(primitive, w, **params)` for a parameter."""

    def register(rule):
        for primitive in primitives:

            @quax.register(primitive)
            def _(w: Parameter, *, primitive=primitive, **params):
                return rule(primitive, w, **params)

        return rule

    return register


def on_either(*primitives):
    """Registers `rule(primitive, x, y, **params)` for two operands of which one or both are parameters."""

    def register(rule):
        for primitive in primitives:

            @quax.register(primitive)
            def _(x: Parameter, y: Any, *, primitive=primitive, **params):
                return rule(primitive, x, array_of(y), **params)

            @quax.register(primitive)
            def _(x: Any, y: Parameter, *, primitive=primitive, **params):
                return rule(primitive, array_of(x), y, **params)

            @quax.register(primitive)
            def _(x: Parameter, y: Parameter, *, primitive=primitive, **params):
                return rule(primitive, x, y, **params)

        return rule

    return register


class Product(NamedTuple):
    """A product of an array with a parameter: a `dot_general` or a convolution.

    Attributes:
      apply: `(x, w) -> y`, in the accumulator's dtype; `w` is an array or a `Parameter`.
      x_axes: for each axis of `w`, the axis of `x` it is multiplied along (contracted or batched), or None.
      y_axes: for each axis of `w`, the axis of `y` that it is, or None.
      grouped: whether outputs see different inputs, so that the axes can't be cut.
    """

    apply: Callable
    x_axes: tuple[int | None, ...]
    y_axes: tuple[int | None, ...]
    grouped: bool = False


class Expression(Parameter):
    """An expression of several parts: arrays and parameters."""

    @property
    def parts(self) -> tuple:
        raise NotImplementedError

    def combine(self, parts: list) -> jax.Array:
        """The expression's array, of its parts' arrays."""
        raise NotImplementedError

    def map(self, operation: Callable) -> Expression:
        """The expression with an operation done to each part."""
        raise NotImplementedError

    def transpose(self, permutation: tuple[int, ...]) -> Expression:
        return self.map(lambda part: bind(core.transpose_p, part, permutation=permutation))

    def product(self, product: Product, x: jax.Array) -> jax.Array:
        """The product with `x`, or `NotImplemented`."""
        return NotImplemented

    def aval(self):
        return ShapedArray(*self.shape_and_dtype())

    @abc.abstractmethod
    def shape_and_dtype(self) -> tuple[tuple[int, ...], Any]:
        """Of the expression's array."""

    @property
    def activation(self) -> bool:
        """Whether as much of it are arrays as are parameters: then forming it costs no more than they did."""
        sizes = [0, 0]
        for part in self.parts:
            whole = isinstance(part, Parameter) and not (isinstance(part, Expression) and part.activation)
            sizes[whole] += math.prod(jnp.shape(part))
        return sizes[0] >= sizes[1]

    def materialise(self):
        return self.combine([p.materialise() if isinstance(p, Parameter) else p for p in self.parts])

    def announce(self, operation):
        if self.activation:
            return self.materialise()
        return self.combine([p.announce(operation) if isinstance(p, Parameter) else p for p in self.parts])


class Sum(Expression):
    """The sum of `terms`, all of one shape and dtype."""

    terms: tuple

    @property
    def parts(self):
        return self.terms

    def shape_and_dtype(self):
        return self.terms[0].shape, self.terms[0].dtype

    def combine(self, parts):
        return functools.reduce(jnp.add, parts)

    def map(self, operation):
        return Sum(tuple(map(operation, self.terms)))

    def product(self, product, x):
        return functools.reduce(jnp.add, (product.apply(x, term) for term in self.terms))


class Scaled(Expression):
    """`base * factor`, where neither or one of the two has the whole shape: sizes of 1 broadcast."""

    base: Any
    factor: jax.Array

    @property
    def parts(self):
        return self.base, self.factor

    def shape_and_dtype(self):
        return jnp.broadcast_shapes(jnp.shape(self.base), self.factor.shape), self.factor.dtype

    @property
    def activation(self):
        return isinstance(self.base, Expression) and self.base.activation

    def combine(self, parts):
        return jnp.broadcast_to(parts[0] * parts[1], self.shape)

    def map(self, operation):
        return Scaled(operation(self.base), operation(self.factor))

    def product(self, product, x):
        varying = [axis for axis, size in enumerate(self.factor.shape) if size > 1]
        base = self.base
        if not isinstance(base, Parameter):  # only the outputs' axes may stay broadcast
            free = [y is not None and along is None for along, y in zip(product.x_axes, product.y_axes)]
            sizes = [1 if f and not product.grouped else size for f, size in zip(free, self.shape)]
            base = jnp.broadcast_to(base, [max(size, have) for size, have in zip(sizes, base.shape)])
        for before, axes in ((True, product.x_axes), (False, product.y_axes)):
            if any(axes[axis] is None for axis in varying):
                continue
            y = x if before else product.apply(x, base)
            order = sorted(varying, key=lambda axis: axes[axis] or 0)
            factor = self.factor.transpose([*order, *(a for a in range(self.factor.ndim) if a not in order)])
            sizes = {axes[axis]: self.factor.shape[axis] for axis in varying}
            y = y * factor.reshape([sizes.get(axis, 1) for axis in range(y.ndim)])
            return product.apply(y, base) if before else y
        return NotImplemented


class Joined(Expression):
    """The concatenation of `pieces` along `axis`."""

    pieces: tuple
    axis: int = eqx.field(static=True)

    @property
    def parts(self):
        return self.pieces

    @property
    def sizes(self) -> list[int]:
        """The pieces' lengths along the axis."""
        return [piece.shape[self.axis] for piece in self.pieces]

    def shape_and_dtype(self):
        shape = self.pieces[0].shape
        return (*shape[: self.axis], sum(self.sizes), *shape[self.axis + 1 :]), self.pieces[0].dtype

    def combine(self, parts):
        return jnp.concatenate(parts, self.axis)

    def map(self, operation):
        return Joined(tuple(map(operation, self.pieces)), self.axis)

    def transpose(self, permutation):
        pieces = tuple(bind(core.transpose_p, piece, permutation=permutation) for piece in self.pieces)
        return Joined(pieces, permutation.index(self.axis))

    def slice(self, starts, stops, steps):
        """The pieces that a slice meets, cut; one piece is no concatenation any more."""
        pieces, end = [], 0
        for piece, size in zip(self.pieces, self.sizes):
            first, end = end, end + size
            start, stop = max(starts[self.axis] - first, 0), min(stops[self.axis] - first, size)
            if start < stop:
                cuts = [list(starts), list(stops)]
                cuts[0][self.axis], cuts[1][self.axis] = start, stop
                pieces.append(bind(core.slice_p, piece, start_indices=cuts[0], limit_indices=cuts[1], strides=steps))
        return pieces[0] if len(pieces) == 1 else Joined(tuple(pieces), self.axis)

    def product(self, product, x):
        along, out = product.x_axes[self.axis], product.y_axes[self.axis]
        if product.grouped or (along is None and out is None):
            return NotImplemented
        inputs = [x] * len(self.pieces) if along is None else jax.lax.split(x, self.sizes, along)
        outputs = [product.apply(x, piece) for x, piece in zip(inputs, self.pieces)]
        return functools.reduce(jnp.add, outputs) if out is None else jnp.concatenate(outputs, out)


class Transposed(Expression):
    """A stacked parameter whose stack axes are not in front: `value` transposed."""

    value: Any
    permutation: tuple[int, ...] = eqx.field(static=True)

    @property
    def parts(self):
        return (self.value,)

    def shape_and_dtype(self):
        return tuple(self.value.shape[axis] for axis in self.permutation), self.value.dtype

    def combine(self, parts):
        return parts[0].transpose(self.permutation)

    def map(self, operation):
        return Transposed(operation(self.value), self.permutation)

    def transpose(self, permutation):
        return transposed(self.value, [self.permutation[axis] for axis in permutation])


def transposed(value: Any, permutation: Sequence[int]) -> Any:
    """An array or a parameter transposed."""
    if tuple(permutation) == tuple(range(len(permutation))):
        return value
    return bind(core.transpose_p, value, permutation=tuple(permutation))


class Square(Expression):
    """The square of each number of `value`, on its way to a sum."""

    value: Parameter

    @property
    def parts(self):
        return (self.value,)

    def shape_and_dtype(self):
        return self.value.shape, self.value.dtype

    def combine(self, parts):
        return jnp.square(parts[0])

    def map(self, operation):
        return Square(operation(self.value))
