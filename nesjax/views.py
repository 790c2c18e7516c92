"""How a parameter that was transposed, reshaped, sliced, reversed or broadcast still reads its noise.

A `View` records, for each current axis of a parameter, which pieces of the noise's own axes it runs over. A product
with the view is then a product with the family's own `E_i`: the structure change is applied to the activations, which
are small, and undone in the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Atom(NamedTuple):
    """A piece of a noise axis: `size` positions, `stride` apart. A broadcast has `axis=None` and `stride=0`."""

    axis: int | None
    stride: int
    size: int


def _numbers(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


def _stored(atoms: Sequence[Atom], axes: Sequence[int]) -> list[Atom]:
    """Sorts the atoms that lie on `axes` as an array with these axes stores them: within one axis, slowest first."""
    return sorted((atom for atom in atoms if atom.axis in axes), key=lambda atom: (axes.index(atom.axis), -atom.stride))


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter's current axes in terms of its noise's own axes.

    Attributes:
      shape: the noise's own shape.
      rows: the positions that are read, for each noise axis.
      axes: the atoms that each current axis runs over, slowest first. Strides count within `rows`.
    """

    shape: tuple[int, ...]
    rows: tuple[range, ...]
    axes: tuple[tuple[Atom, ...], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> View:
        """The view of an unchanged parameter."""
        return cls(shape, tuple(map(range, shape)), tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The current shape."""
        return tuple(map(_numbers, self.axes))

    @property
    def noise_axes(self) -> tuple[int, ...] | None:
        """The noise axis behind each current axis; None unless the view is a transpose."""
        axes: Any = tuple(atoms[0].axis if len(atoms) == 1 else None for atoms in self.axes)
        every = len(axes) == len(self.shape) and set(axes) == set(range(len(axes)))
        return axes if every and self.rows == View.of(self.shape).rows else None

    # ---- what is done to a parameter

    def transpose(self, permutation: Sequence[int]) -> View:
        """The view after a transpose."""
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        """The view after `lax.broadcast_in_dim`: the noise does not vary along the new axes."""
        axes: list[tuple[Atom, ...]] = [(Atom(None, 0, size),) for size in shape]
        for atoms, at in zip(self.axes, dimensions):
            if _numbers(atoms) == shape[at]:
                axes[at] = atoms
        return dataclasses.replace(self, axes=tuple(axes))

    def reshape(self, sizes: Sequence[int]) -> View | None:
        """The view after a row-major reshape, or None if a piece would have to be cut unevenly."""
        if 0 in sizes:
            return None
        left: list[Atom] = []  # adjacent atoms that form one piece are joined, so that it may be cut in other places
        for atom in (atom for atoms in self.axes for atom in atoms if atom.size > 1):
            if left and (left[-1].axis, left[-1].stride) == (atom.axis, atom.stride * atom.size):
                atom = atom._replace(size=left.pop().size * atom.size)
            left.append(atom)
        axes: list[tuple[Atom, ...]] = []
        for size in sizes:
            taken = []
            while size > 1:
                axis, stride, length = left.pop(0)
                part = min(length, size)
                if length % part or size % part:
                    return None
                rest, size = length // part, size // part
                taken.append(Atom(axis, stride * rest, part))
                if rest > 1:
                    left.insert(0, Atom(axis, stride, rest))
            axes.append(tuple(taken))
        return dataclasses.replace(self, axes=tuple(axes))

    def slice(
        self, starts: Sequence[int | None], stops: Sequence[int | None], steps: Sequence[int | None]
    ) -> View | None:
        """The view after a static slice, or None if a sliced axis is not one noise axis or one broadcast."""
        axes, rows = list(self.axes), list(self.rows)
        for at, bounds in enumerate(map(slice, starts, stops, steps)):
            everything = range(_numbers(axes[at]))
            taken = everything[bounds]
            if taken == everything:
                continue
            if len(axes[at]) != 1 or not taken:
                return None
            (atom,) = axes[at]
            if atom.axis is not None:
                if atom.size != len(rows[atom.axis]):
                    return None
                rows[atom.axis] = rows[atom.axis][bounds]
            axes[at] = (atom._replace(size=len(taken)),)
        return dataclasses.replace(self, rows=tuple(rows), axes=tuple(axes))

    def reverse(self, dimensions: Sequence[int]) -> View | None:
        """The view after `lax.rev`, or None where a slice would give None."""
        ends = [None] * len(self.axes)
        return self.slice(ends, ends, [-1 if at in dimensions else None for at in range(len(ends))])

    # ---- what is read through it

    def dense(self, e: jax.Array) -> jax.Array:
        """Reads a dense noise array of `self.shape` through the view."""
        atoms = [atom for atoms in self.axes for atom in atoms]
        return self._read(e, tuple(range(len(self.shape))), atoms).reshape(self.sizes)

    def contract(self, contract: Callable, x: jax.Array, axes) -> jax.Array:
        """Multiplies `x` by the view, through `contract(x, axes)`, a product with the noise's own `E_i`.

        Args:
          contract: a family's `contract` with everything but `x` and `axes` given.
          x: the other operand.
          axes: the labels of `x`, of the view's current axes and of the output.

        Returns:
          The product, or `NotImplemented` where pieces of one noise axis are used in different ways.
        """
        labels, view_labels, out = axes
        if self.noise_axes is not None:  # only labels change
            noise_labels = tuple(view_labels[self.noise_axes.index(axis)] for axis in range(len(self.shape)))
            return contract(x, (labels, noise_labels, out))
        full, atoms = self._labelled(dict(zip(view_labels, self.axes)), dict(zip(labels, x.shape)))
        x_atoms = [atom for label in labels for atom in atoms[label]]
        y_atoms = [atom for label in out for atom in atoms[label]]
        if not (full._whole(x_atoms) and full._whole(y_atoms)):
            return NotImplemented
        own = tuple(range(len(self.shape)))
        x_axes: tuple[Any, ...] = tuple(dict.fromkeys(atom.axis for atom in x_atoms))
        y_axes: tuple[Any, ...] = tuple(
            dict.fromkeys(atom.axis for atom in y_atoms if atom.axis in own or atom.axis in x_axes)
        )
        y_axes += tuple(axis for axis in own if axis not in x_axes + y_axes)  # of one position, and dropped
        y = contract(full._embed(x, x_atoms, x_axes), (x_axes, own, y_axes))
        return y if y is NotImplemented else full._read(y, y_axes, y_atoms).reshape([_numbers(atoms[la]) for la in out])

    # ---- between arrays with one axis per atom and arrays with one axis per noise axis

    def _labelled(self, axes: dict, sizes: dict) -> tuple[View, dict[int, list[Atom]]]:
        """The view with one more noise axis for each axis without noise, and the atoms of each label."""
        rows, labelled = list(self.rows), {}
        for label, atoms in ({label: (Atom(None, 0, size),) for label, size in sizes.items()} | axes).items():
            labelled[label] = []
            for atom in atoms:
                if atom.axis is None:
                    atom = Atom(len(rows), 1, atom.size)
                    rows.append(range(atom.size))
                labelled[label].append(atom)
        shape = (*self.shape, *map(len, rows[len(self.shape) :]))
        return dataclasses.replace(self, shape=shape, rows=tuple(rows)), labelled

    def _whole(self, atoms: Sequence[Atom]) -> bool:
        """Tells whether every noise axis that occurs is there in full."""
        axes: set[Any] = {atom.axis for atom in atoms}
        return all(_numbers(_stored(atoms, (axis,))) == len(self.rows[axis]) for axis in axes)

    def _embed(self, x: jax.Array, atoms: Sequence[Atom], axes: Sequence[int]) -> jax.Array:
        """Turns one axis per atom into the noise axes `axes`, in full: zero at the positions that are not read."""
        stored, rows = _stored(atoms, axes), [self.rows[axis] for axis in axes]
        x = x.reshape([atom.size for atom in atoms]).transpose([atoms.index(atom) for atom in stored])
        x = x.reshape([len(row) for row in rows])
        x = x[tuple(slice(None, None, 1 if row.step > 0 else -1) for row in rows)]
        first, last = [min(row, default=0) for row in rows], [max(row, default=-1) for row in rows]
        high = [self.shape[axis] - 1 - end for axis, end in zip(axes, last)]
        pads = list(zip(first, high, (abs(row.step) - 1 for row in rows)))
        return lax.pad(x, jnp.zeros((), x.dtype), pads) if any(map(any, pads)) else x

    def _read(self, y: jax.Array, axes: Sequence[int], atoms: Sequence[Atom]) -> jax.Array:
        """Turns the noise axes `axes` into one axis per atom: what is read, repeated along atoms of other axes."""
        rows, stored = [self.rows[axis] for axis in axes], _stored(atoms, axes)
        y = y[tuple(slice(row.start, row.stop if row.stop >= 0 else None, row.step) for row in rows)]
        y = y.reshape([atom.size for atom in stored])
        y = y.transpose([stored.index(atom) for atom in atoms if atom in stored])
        y = jnp.expand_dims(y, [at for at, atom in enumerate(atoms) if atom not in stored])
        return jnp.broadcast_to(y, [atom.size for atom in atoms])
