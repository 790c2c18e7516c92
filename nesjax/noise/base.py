"""What a noise family is: three methods to define it, and others to make it fast.

A family describes the perturbation `E_i` of one parameter: each entry has mean 0 and variance 1, and member i's
`E_i` is a function of a part shared by the whole population and a part of the member's own. Everything here is
written for ONE member; the population axis comes from one `vmap` in `nesjax.forward`.

Axis letters: `n` members, `B` batch, `I`/`O` in/out features. In a kernel the last two axes are in and out, whatever
stands before them (a convolution's window, say) is shared by both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def accumulator(dtype) -> jnp.dtype:
    """The dtype sums are kept in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def multiply(x: jax.Array, labels: tuple[int, ...], e: jax.Array, axes: Axes, precision=None) -> jax.Array:
    """`x` times a dense `e`, both with labelled axes, in `x`'s precision with a float32 accumulator."""
    _, e_labels, out_labels = axes
    return jnp.einsum(
        x, labels, e.astype(x.dtype), e_labels, out_labels,
        precision=precision, preferred_element_type=accumulator(x.dtype),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """A convolution of a channels-last input `[B, *space, C]`, the kernel's axes in any order.

    Attributes:
      kernel_axes: positions of (*window, in, out) among the kernel's axes.
      strides, padding, lhs_dilation, rhs_dilation: one entry (padding: a pair) a spatial axis.
      groups: feature groups; `in` is then `C / groups`.
      precision: as in `jax.lax.conv_general_dilated`.
    """

    kernel_axes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None

    @property
    def in_order(self) -> bool:
        """Whether the kernel is stored (*window, in, out), as JAX libraries do."""
        return self.kernel_axes == tuple(range(len(self.kernel_axes)))

    def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution of `x: [B, *space, C]` with a dense kernel, accumulated in float32."""
        rank = x.ndim - 2
        spatial = tuple(range(1, rank + 1))
        dimensions = jax.lax.ConvDimensionNumbers(
            lhs_spec=(0, rank + 1, *spatial), rhs_spec=(rank + 1, rank, *range(rank)), out_spec=(0, rank + 1, *spatial)
        )
        return jax.lax.conv_general_dilated(
            x, kernel.transpose(self.kernel_axes).astype(x.dtype), self.strides, self.padding, self.lhs_dilation,
            self.rhs_dilation, dimensions, self.groups, precision=self.precision,
            preferred_element_type=accumulator(x.dtype),
        )  # fmt: skip

    def padded(self, x: jax.Array) -> jax.Array:
        """`x: [B, *space, C]` with the padding and input dilation written out, ready for `tap`."""
        space = [(low, high, dilation - 1) for (low, high), dilation in zip(self.padding, self.lhs_dilation)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])

    def tap(self, x: jax.Array, space: int, index: int, window: int) -> jax.Array:
        """What the kernel's row `index` of `window` along spatial axis `space` multiplies in a padded `x`."""
        start = index * self.rhs_dilation[space]
        reach = x.shape[space + 1] - (window - 1) * self.rhs_dilation[space]
        return jax.lax.slice_in_dim(x, start, start + reach, self.strides[space], axis=space + 1)

    def patches(self, x: jax.Array, window: Sequence[int]) -> jax.Array:
        """What each output position multiplies: `[B, *space', *window, C]` of `x: [B, *space, C]`."""
        y = self.padded(x)
        for space, size in enumerate(window):
            y = jnp.stack([self.tap(y, space, index, size) for index in range(size)], -2)
        return y


class NoiseFamily:
    """The contract of a family. Subclass it as a frozen dataclass; define the first three methods, override others.

    Methods that cannot do what is asked without a dense matrix return `NotImplemented`; the caller then uses
    `materialise` and says so.

    Example:
      >>> import dataclasses, jax, nesjax
      >>> @dataclasses.dataclass(frozen=True)
      ... class Uniform(nesjax.NoiseFamily):
      ...     def sample_shared(self, key, shape, dtype):
      ...         return ()
      ...     def sample_member(self, key, index, shape, dtype):
      ...         return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)
      ...     def materialise(self, shared, member, shape):
      ...         return member
      >>> nesjax.Population(size=8, std=0.1, noise=Uniform()).noise
      Uniform()
    """

    def __str__(self) -> str:
        """The family and those of its settings that aren't the default."""
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        changed = (f"{field.name}={value!r}" for field, value in fields if value != field.default)
        return f"{type(self).__name__}({', '.join(changed)})"

    def sample_shared(self, key: jax.Array, shape: tuple[int, ...], dtype) -> Any:
        """The part all members share, drawn once a generation."""
        raise NotImplementedError

    def sample_member(self, key: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype) -> Any:
        """The part of one member. `key` is already the member's own; `index` is for members coded together."""
        return self.from_words(jax.random.bits(key, (self.words(shape),), jnp.uint32), shape)

    def words(self, shape: tuple[int, ...]) -> int:
        """How many random uint32 words make a member's part, if that is all it is made of; else 0.

        The words of all parameters are then drawn in one call, which compiles and runs several times faster than one
        call each, and given to `from_words`, which then stands for `sample_member`.
        """
        return 0

    def from_words(self, words: jax.Array, shape: tuple[int, ...]) -> Any:
        """The part of one member, of `words: uint32[self.words(shape)]`."""
        raise NotImplementedError

    def materialise(self, shared, member, shape: tuple[int, ...]) -> jax.Array:
        """The dense `E_i`, of `shape`: the definition every other method is tested against."""
        raise NotImplementedError

    def for_shape(self, shape: tuple[int, ...]) -> NoiseFamily:
        """The family that perturbs a parameter of `shape` (vectors, say, get independent noise).

        Raises:
          ValueError: this family's settings don't fit the shape.
        """
        return self

    def contract(self, shared, member, shape, x: jax.Array, axes: Axes, *, precision=None) -> jax.Array:
        """`x` contracted with `E_i` over any of its axes, as in `jnp.einsum`.

        Args:
          x: an array whose axes carry the labels `axes[0]`.
          axes: labels of `x`, of `E_i` and of the output. Labels of both that the output lacks are summed over.
          precision: as in `jax.lax.dot_general`.

        Returns:
          The product, accumulated in at least float32.
        """
        return multiply(x, axes[0], self.materialise(shared, member, shape), axes, precision)

    def conv(self, shared, member, shape, x: jax.Array, geometry: ConvGeometry) -> jax.Array:
        """`x: [B, *space, C]` convolved with `E_i`, giving `[B, *space', O]` in at least float32."""
        return geometry.apply(x, self.materialise(shared, member, shape))

    def take(self, shared, member, shape, indices: jax.Array) -> jax.Array:
        """Rows `E_i[indices]`, of shape `[*indices.shape, *shape[1:]]`; indices are within bounds."""
        return self.materialise(shared, member, shape)[indices]

    def weighted_sum(self, shared, members, shape, weights: jax.Array) -> jax.Array:
        """`sum_i weights[i] E_i`, in float32; leaves of `members` and `weights` have a leading axis `n`."""

        def add(total, item):
            member, weight = item
            return total + weight * self.materialise(shared, member, shape).astype(total.dtype), None

        start = jnp.zeros_like(weights, accumulator(weights.dtype), shape)  # varies over devices as the weights do
        return jax.lax.scan(add, start, (members, weights))[0]

    def floor(self, shape: tuple[int, ...]) -> float:
        """Cosine to the true gradient that more members never exceed, on average over gradients; 1: no floor."""
        return 1.0


def longer_axis(shape: tuple[int, ...]) -> str:
    """NESgpu's "auto": both axes of a small kernel, else the longer one."""
    n_in, n_out = shape[-2:]
    if 1 < n_in < 32 and 1 < n_out < 32:
        return "both"
    return "in" if n_in > n_out else "out"
