"""How a parameter that was transposed, reshaped or sliced still reads its noise.

A `View` records, for each current axis of a parameter, which parts of the noise's own axes it runs over. A product
with the view is then a product with the family's own `E_i`: the structure change is applied to the activations, which
are small, and undone in the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Atom(NamedTuple):
    """A piece of one noise axis, `size` long: `place` orders the pieces of an axis. `axis=None`: a broadcast."""

    axis: int | None
    place: tuple[int, ...]
    size: int


def _numbers(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter's current axes in terms of its noise's.

    Attributes:
      shape: the noise's own shape.
      slices: of each noise axis, `(start, stop, step)`.
      axes: of each current axis, the atoms it runs over, slowest first.
    """

    shape: tuple[int, ...]
    slices: tuple[tuple[int, int, int], ...]
    axes: tuple[tuple[Atom, ...], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> View:
        """The view of a parameter nothing was done to."""
        atoms = tuple((Atom(axis, (), size),) for axis, size in enumerate(shape))
        return cls(shape, tuple((0, size, 1) for size in shape), atoms)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The current shape."""
        return tuple(map(_numbers, self.axes))

    @property
    def noise_axes(self) -> tuple[int, ...] | None:
        """The noise axis that each current axis is, whole; None where one is not."""
        axes = [atoms[0].axis if len(atoms) == 1 else None for atoms in self.axes]
        whole = None not in axes and self.sizes == tuple(self.shape[axis] for axis in axes)
        return tuple(axes) if whole and len(set(axes)) == len(self.shape) else None

    def transpose(self, permutation: Sequence[int]) -> View:
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        """As `lax.broadcast_in_dim`: the noise does not vary along the new axes."""
        seen = sum(atom.axis is None for atoms in self.axes for atom in atoms)
        axes = [((Atom(None, (seen + at,), size),) if size > 1 else ()) for at, size in enumerate(shape)]
        for atoms, at in zip(self.axes, dimensions):
            if _numbers(atoms) == shape[at]:
                axes[at] = atoms
        return dataclasses.replace(self, axes=tuple(axes))

    def reshape(self, sizes: Sequence[int]) -> View | None:
        """The view after a row-major reshape; None if an axis would have to be cut unevenly."""
        atoms = [atom for axis in self.axes for atom in axis if atom.size > 1]
        axes = []
        for size in sizes:
            taken: list[Atom] = []
            while _numbers(taken) < size:
                if not atoms:
                    return None
                atom, need = atoms.pop(0), size // _numbers(taken)
                if atom.size > need:
                    if atom.size % need:
                        return None
                    rest = Atom(atom.axis, (*atom.place, 1), atom.size // need)
                    atoms.insert(0, rest)
                    atom = Atom(atom.axis, (*atom.place, 0), need)
                taken.append(atom)
            if _numbers(taken) != size:
                return None
            axes.append(tuple(taken))
        return dataclasses.replace(self, axes=tuple(axes))

    def slice(self, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> View | None:
        """The view after a static slice; None if a sliced axis is not one piece of one noise axis."""
        axes, slices = list(self.axes), list(self.slices)
        for at, (start, stop, step) in enumerate(zip(starts, stops, steps)):
            atoms = axes[at]
            if (start, stop, step) == (0, _numbers(atoms), 1):
                continue
            if len(atoms) != 1 or atoms[0].place or atoms[0].axis is None:
                return None
            axis = atoms[0].axis
            first, _, stride = slices[axis]
            size = -(-(stop - start) // step)
            first, stride = first + start * stride, stride * step
            slices[axis] = (first, first + (size - 1) * stride + 1, stride)
            axes[at] = (Atom(axis, (), size),)
        return dataclasses.replace(self, slices=tuple(slices), axes=tuple(axes))

    def _places(self) -> list[list[Atom]]:
        """The atoms of each noise axis, slowest first."""
        atoms = [atom for axis in self.axes for atom in axis]
        return [sorted(a for a in atoms if a.axis == axis) for axis in range(len(self.shape))]

    def dense(self, e: jax.Array) -> jax.Array:
        """The view of a dense noise array of `self.shape`."""
        e = e[tuple(slice(*bounds) for bounds in self.slices)]
        stored = [atom for atoms in self._places() for atom in atoms]
        e = e.reshape([atom.size for atom in stored])
        current = [atom for atoms in self.axes for atom in atoms]
        e = e.transpose([stored.index(atom) for atom in current if atom.axis is not None])
        e = jnp.expand_dims(e, [at for at, atom in enumerate(current) if atom.axis is None])
        return jnp.broadcast_to(e, [atom.size for atom in current]).reshape(self.sizes)

    def contract(self, contract, x: jax.Array, axes) -> jax.Array:
        """A product with the view, through `contract(x, axes)`: a product with the noise's own `E_i`.

        Args:
          contract: a family's `contract` with everything but `x` and `axes` given.
          x: the other operand.
          axes: the labels of `x`, of the view's current axes and of the output.

        Returns:
          The product, or `NotImplemented` where pieces of one noise axis are used in different ways.
        """
        labels, view_labels, out = axes
        if self.noise_axes is not None:  # at most a transpose: only labels change
            own = [view_labels[self.noise_axes.index(axis)] for axis in range(len(self.shape))]
            return contract(x, (labels, tuple(own), out))
        atoms = dict(zip(view_labels, self.axes))
        places = self._places()

        # The input, one axis an atom, then one axis a noise axis.
        pieces = {la: [(la, atom) for atom in atoms.get(la, ())] or [(la, None)] for la in (*labels, *out)}
        sizes = dict(zip(labels, x.shape))
        flat = [piece for label in labels for piece in pieces[label]]
        x = x.reshape([sizes[label] if atom is None else atom.size for label, atom in flat])
        used = {atom for label, atom in flat if atom is not None and atom.axis is not None}
        freed = {atom for label in out for atom in atoms.get(label, ()) if atom.axis is not None}
        own_in = [axis for axis, mine in enumerate(places) if mine and used.issuperset(mine)]
        own_out = [axis for axis, mine in enumerate(places) if freed.issuperset(mine)]
        for axis, mine in enumerate(places):
            cut_in = bool(used.intersection(mine)) != (axis in own_in)
            cut_out = bool(freed.intersection(mine)) != (bool(mine) and axis in own_out)
            if cut_in or cut_out:
                return NotImplemented
        others = [piece for piece in flat if piece[1] is None or piece[1].axis is None]
        by_atom = {atom: at for at, (_, atom) in enumerate(flat)}
        x = x.transpose([flat.index(p) for p in others] + [by_atom[a] for axis in own_in for a in places[axis]])
        x = x.reshape(*x.shape[: len(others)], *(_numbers(places[axis]) for axis in own_in))
        bounds = [(self.shape[axis], *self.slices[axis]) for axis in own_in]
        pads = [(start, size - stop, step - 1) for size, start, stop, step in bounds]
        if any(pad != (0, 0, 0) for pad in pads):
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * len(others) + pads)

        # The product: broadcast pieces are summed by leaving them out of the output.
        names = {piece: at for at, piece in enumerate(others)}
        own = [len(others) + axis for axis in range(len(self.shape))]
        kept = [p for p in others if p[0] in out]
        x_labels = (*names.values(), *(own[axis] for axis in own_in))
        y_labels = (*(names[piece] for piece in kept), *(own[axis] for axis in own_out))
        y = contract(x, (x_labels, tuple(own), y_labels))
        if y is NotImplemented:
            return y

        # The output, one axis an atom, then one axis a label.
        y = y[(slice(None),) * len(kept) + tuple(slice(*self.slices[axis]) for axis in own_out)]
        y = y.reshape(*y.shape[: len(kept)], *(atom.size for axis in own_out for atom in places[axis]))
        stored = kept + [(None, atom) for axis in own_out for atom in places[axis]]
        order, shape, full = [], [], []
        for label in out:
            for piece in pieces[label]:
                found = piece if piece in kept else (None, piece[1])
                present = found in stored
                size = piece[1].size if piece[1] is not None else y.shape[stored.index(found)] if present else 1
                order += [stored.index(found)] if present else []
                shape.append(size if present else 1)
                full.append(size)
        y = jnp.broadcast_to(y.transpose(order).reshape(shape), full)
        return y.reshape([sizes[la] if la in sizes else _numbers(atoms[la]) for la in out])
