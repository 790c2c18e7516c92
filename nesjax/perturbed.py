"""A perturbed parameter as a value: `weight + scale * E_i`, standing where the parameter's array stood.

What each operation does with it is in `nesjax.rules`; where none says anything, the value is materialised for that one
operation, with a warning.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import quax

from .formed import Formed
from .noise import NoiseFamily
from .noise.base import accumulator
from .taps import lose
from .views import View


class Parameter(quax.ArrayValue):
    """What stands where a parameter's array stood: a `Perturbed`, or an expression of some (`nesjax.rules.lazy`)."""

    @abc.abstractmethod
    def materialise(self) -> jax.Array:
        """The dense array, computed in float32 and rounded once."""

    @abc.abstractmethod
    def announce(self, operation: str) -> jax.Array:
        """`materialise`, noted for the warning, or refused if strict."""

    @staticmethod
    def default(primitive, values, params):
        dense = [v.announce(primitive.name) if isinstance(v, Parameter) else array_of(v) for v in values]
        return primitive.bind(*dense, **params)


class Perturbed(Parameter):
    """`weight + scale * E_i`, for one member.

    Attributes:
      weight: the parameter, `[*stack, *view.sizes]`. The number of stack axes is what it has beyond the view's.
      scale: std times the antithetic sign, `[*stack]`, float32.
      shared, member: the family's parts, each leaf with the stack axes in front.
      family, view: the noise of one entry of the stack, and how `weight` reads it.
      path: the parameter's name, for messages.
      formed: where it is noted if the value is formed as a whole.
      entry: the place of each entry in the stack, `[*stack]`, where uses are marked for credit (`nesjax.taps`);
        else None.
    """

    weight: jax.Array
    scale: jax.Array
    shared: Any
    member: Any
    family: NoiseFamily = eqx.field(static=True)
    view: View = eqx.field(static=True)
    path: str = eqx.field(static=True)
    formed: Formed = eqx.field(static=True)
    entry: jax.Array | None = None

    def aval(self):
        return jax.typeof(self.weight)

    @property
    def stack(self) -> int:
        """The number of leading axes along which each entry has its own noise."""
        return self.weight.ndim - len(self.view.axes)

    def materialise(self) -> jax.Array:
        if self.family.on_outputs:
            self.formed.refuse(self.path, "an operation other than a product", self.family)

        def noise(scale, shared, member):
            e = self.family.materialise(shared, member, self.view.shape)
            return scale * self.view.dense(e).astype(accumulator(e.dtype))

        for _ in range(self.stack):
            noise = jax.vmap(noise)
        total = self.weight.astype(accumulator(self.weight.dtype)) + noise(self.scale, self.shared, self.member)
        return self.lose(total.astype(self.weight.dtype), "formed as a whole")

    def lose(self, y: jax.Array, reason: str) -> jax.Array:
        """`y`, marked as a use that can't be credited by inputs."""
        return y if self.entry is None else lose(y, self.path, reason)

    def announce(self, operation: str) -> jax.Array:
        if self.family.on_outputs:
            self.formed.refuse(self.path, operation, self.family)
        if len(self.view.shape) > 1 or sum(size > 1 for size in self.weight.shape[self.stack :]) > 1:
            self.formed.add(self.path, operation, self.weight.size * self.weight.dtype.itemsize)
        return self.materialise()

    def replace(self, weight: jax.Array, **changes: Any) -> Perturbed:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Perturbed(**{**fields, "weight": weight, **changes})

    def on_stack(self, operation: Callable[[jax.Array], jax.Array]) -> Perturbed:
        """The value after an operation on the stack axes alone, which every leaf has."""
        parts = jax.tree.map(operation, (self.scale, self.shared, self.member))
        scale = self.lose(parts[0], "its stack is indexed (scan over it instead)")
        entry = None if self.entry is None else operation(self.entry)
        return self.replace(operation(self.weight), scale=scale, shared=parts[1], member=parts[2], entry=entry)


class Vector(quax.ArrayValue):
    """A perturbed vector, formed: any operation meets its array, but a kernel may form it anew, of what it was."""

    array: jax.Array
    of: Perturbed

    def aval(self):
        return jax.typeof(self.array)

    def materialise(self):
        return self.array


def array_of(value: Any) -> Any:
    """The array of a `Vector`; anything else as it is."""
    return value.array if isinstance(value, Vector) else value


def add_noise(exact: jax.Array, noise: jax.Array, dtype) -> jax.Array:
    return (exact.astype(accumulator(exact.dtype)) + noise).astype(dtype)
