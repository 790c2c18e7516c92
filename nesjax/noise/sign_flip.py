"""One shared matrix, seen by each member with its own row and column signs."""

import dataclasses
import itertools
import math
from typing import Literal

import jax.numpy as jnp

from ..checks import one_of
from .base import NoiseFamily, accumulator, longer_axis, multiply
from .gaussian import normals
from .low_rank import LowRank, apply_signs, packed_size, scale_axis, split


@dataclasses.dataclass(frozen=True)
class SignFlip(NoiseFamily):
    """A shared matrix `R` whose axes each member flips: `E = R * s_in * s_out`. NESgpu's Synthetic layers.

    Vectors get independent noise, and kernels whose flipped axes have size 1 get `LowRank` noise. The shared part is
    `R`, of the parameter's shape. A member's part is `uint32[ceil(size / 32)]` of packed signs for each flipped axis,
    and None for the others.

    Args:
      axis: the axes to flip: "in", "out", "both" (every axis, those of a window too) or "auto". "auto" flips both sides
        of a kernel under 32 by 32, else the longer one. Anything but "both" limits the gradient (see `max_cosine`).
      values: distribution of the shared matrix's entries: "rademacher" (+-1), under which axis="both" has no limit, or
        "normal", NESgpu's choice, under which its limit is 1/sqrt(3).

    Raises:
      ValueError: `axis` or `values` is none of these.

    Example:
      >>> import jax
      >>> family, shape = SignFlip("in"), (2, 3)
      >>> shared = family.sample_shared(jax.random.key(0), shape, "float32")
      >>> for seed in (1, 2):  # two members: the same rows, but for their signs
      ...     member = family.sample_member(jax.random.key(seed), 0, shape, "float32")
      ...     print(family.materialise(shared, member, shape).tolist())
      [[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]]
      [[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]
      >>> family.max_cosine((64, 64))
      0.125
    """

    axis: Literal["auto", "in", "out", "both"] = "both"
    values: Literal["rademacher", "normal"] = "rademacher"

    def __post_init__(self):
        one_of("SignFlip axis", self.axis, ("auto", "in", "out", "both"))
        one_of("SignFlip values", self.values, ("rademacher", "normal"))

    def for_shape(self, shape):
        if len(shape) < 2 or all(shape[axis] == 1 for axis in self._flipped(shape)):
            return LowRank(1, self.values).for_shape(shape)
        return self

    def _flipped(self, shape) -> tuple[int, ...]:
        axis = longer_axis(shape) if self.axis == "auto" else self.axis
        last = len(shape) - 1
        return {"in": (last - 1,), "out": (last,), "both": tuple(range(len(shape)))}[axis]

    def shared_words(self, shape):
        rows = math.prod(shape[:-1])
        return rows * (shape[-1] if self.values == "normal" else packed_size(shape[-1]))  # packed: one bit per sign

    def shared_from_words(self, words, shape, dtype):
        if self.values == "normal":
            return normals(words).astype(dtype).reshape(shape)
        return apply_signs(jnp.ones(shape, dtype), words.reshape(*shape[:-1], -1), len(shape) - 1, shape[-1])

    def words(self, shape):
        return sum(packed_size(shape[axis]) for axis in self._flipped(shape))

    def from_words(self, words, shape):
        flipped = self._flipped(shape)
        signs = iter(split(words, [(packed_size(shape[axis]),) for axis in flipped]))
        return tuple(next(signs) if axis in flipped else None for axis in range(len(shape)))

    def _flip(self, x, member, shape, axes):
        """Flips `x` by the signs of those of `shape`'s axes that `axes` maps to axes of `x`."""
        for axis, at in axes.items():
            if member[axis] is not None:
                x = scale_axis(x[None], member[axis][None], at + 1, shape[axis])[0]
        return x

    def materialise(self, shared, member, shape):
        return self._flip(shared, member, shape, {axis: axis for axis in range(len(shape))})

    def contract(self, shared, member, shape, x, axes, *, precision=None):
        labels, e_labels, out = axes
        x = self._flip(x, member, shape, {a: labels.index(la) for a, la in enumerate(e_labels) if la in labels})
        y = multiply(x, labels, shared, axes, precision)
        return self._flip(y, member, shape, {a: out.index(la) for a, la in enumerate(e_labels) if la not in labels})

    def conv(self, shared, member, shape, x, geometry):
        """Moves the channels' flips to input and output; a flipped window takes one product per tap, never stored."""
        if not geometry.in_order:
            return NotImplemented
        *window, n_in, n_out = shape
        groups, channels, last = geometry.groups, x.shape[-1], len(shape) - 1
        x = x.reshape(*x.shape[:-1], groups, n_in)
        x = self._flip(x, member, shape, {last - 1: x.ndim - 1}).reshape(*x.shape[:-2], channels)
        if all(member[axis] is None for axis in range(len(window))):
            y = geometry.apply(x, shared)
        else:
            x, y = geometry.padded(x), jnp.zeros((), accumulator(x.dtype))
            kernel = self._flip(jnp.ones(window, jnp.float32), member, window, {a: a for a in range(len(window))})
            for tap in itertools.product(*map(range, window)):
                z = x
                for space, index in enumerate(tap):
                    z = geometry.tap(z, space, index, window[space])
                z = z.reshape(*z.shape[:-1], groups, n_in)
                r = shared[tap].reshape(n_in, groups, n_out // groups).astype(z.dtype)
                kind = {"precision": geometry.precision, "preferred_element_type": accumulator(z.dtype)}
                y = y + kernel[tap] * jnp.einsum("...gi,igo->...go", z, r, **kind)
            y = y.reshape(*y.shape[:-2], n_out)
        return self._flip(y, member, shape, {last: y.ndim - 1})

    def take(self, shared, member, shape, indices):
        rows = shared[indices]
        if member[0] is not None:
            signs = apply_signs(jnp.ones(shape[0], rows.dtype), member[0], 0, shape[0])[indices]
            rows = rows * signs.reshape(*indices.shape, *(1,) * (len(shape) - 1))
        return self._flip(rows, member, shape, {a: a + indices.ndim - 1 for a in range(1, len(shape))})

    def squared(self, shared, member, shape):
        return self, jnp.square(shared.astype(accumulator(shared.dtype))), tuple(None for _ in shape)

    def weighted_sum(self, shared, members, shape, weights):
        """Multiplies `R` by the weighted sum of the flips, which is `LowRank`'s one GEMM over the flipped axes."""
        flipped = self._flipped(shape)
        sizes = tuple(shape[axis] for axis in flipped)
        flips = LowRank().weighted_sum((), tuple(members[axis][:, None] for axis in flipped), sizes, weights)
        return shared * flips.reshape([size if axis in flipped else 1 for axis, size in enumerate(shape)])

    def max_cosine(self, shape):
        """`1 / sqrt(c)` for `c` entries that each flip moves together; `1 / sqrt(c + 2)` for a normal `R`."""
        kept = math.prod(size for axis, size in enumerate(shape) if axis not in self._flipped(shape))
        return (kept + (2 if self.values == "normal" else 0)) ** -0.5
