"""The contract of a noise family: three methods define it, and others make it fast.

A family describes the perturbation `E_i` of one parameter: each entry has mean 0 and variance 1, and member i's
`E_i` is a function of a part shared by the whole population and a part of the member's own. Everything here is
written for ONE member; the population axis comes from one `vmap` in `nesjax.forward`.

Axis letters: `n` members, `B` batch, `I`/`O` in/out features. In a kernel the last two axes are in and out, whatever
stands before them (a convolution's window, say) is shared by both.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def accumulator(dtype) -> jnp.dtype:
    """The dtype in which sums are kept: at least float32."""
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
      strides, padding, lhs_dilation, rhs_dilation: one entry (padding: one pair) per spatial axis.
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
        """Convolves `x: [B, *space, C]` with a dense kernel, accumulated in float32."""
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
        """Writes padding and input dilation into `x: [B, *space, C]`, ready for `tap`."""
        space = [(low, high, dilation - 1) for (low, high), dilation in zip(self.padding, self.lhs_dilation)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])

    def tap(self, x: jax.Array, space: int, index: int, window: int) -> jax.Array:
        """Slices from a padded `x` what the kernel's row `index`, of `window` along axis `space`, multiplies."""
        start = index * self.rhs_dilation[space]
        reach = x.shape[space + 1] - (window - 1) * self.rhs_dilation[space]
        return jax.lax.slice_in_dim(x, start, start + reach, self.strides[space], axis=space + 1)

    def patches(self, x: jax.Array, window: Sequence[int]) -> jax.Array:
        """Gathers what each output position multiplies: `[B, *space', *window, C]` from `x: [B, *space, C]`."""
        y = self.padded(x)
        for space, size in enumerate(window):
            y = jnp.stack([self.tap(y, space, index, size) for index in range(size)], -2)
        return y


class NoiseFamily(abc.ABC):
    """The contract of a noise family: what one parameter's perturbation `E_i` is, and how to compute with it fast.

    Write a family as a frozen dataclass. It must define `materialise`, `sample_shared` or `shared_words` with
    `shared_from_words`, and `sample_member` or `words` with `from_words`; a class that does not is refused when it is
    used. `materialise` is the definition: every other method has a default made of it, to be overridden for speed.
    `contract`, `conv`, `take`, `squared` and `weighted_sum` may return `NotImplemented` for what they cannot do faster,
    and the caller materialises instead (with a `MaterialiseWarning`, except for `weighted_sum`).

    In all methods `shape` is the parameter's, a member's part is what `sample_member` returned, and `shared` is what
    `sample_shared` returned. The laws are those of tests/README.md; a family added to `nesjax.FAMILIES` is tested
    against all of them.

    Raises:
      TypeError: the class is incomplete or not a frozen dataclass; the message lists what to write.

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
      >>> params, population = jax.numpy.zeros((2, 2)), nesjax.Population(size=8, std=0.1, noise=Uniform())
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, population)
      >>> print((100 * nesjax.materialise(params, noise, 5)).round())
      [[ -6. -15.]
       [  8.  -9.]]
    """

    fused: bool = False  # whether products may be formed by a kernel of `nesjax.kernels`

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        lacks = list(_lacks(cls))
        if lacks:
            raise TypeError(f"noise family {cls.__name__} must:\n- " + "\n- ".join(lacks))
        return super().__new__(cls)

    def __str__(self) -> str:
        """Writes the family and those of its settings that differ from the default."""
        family: Any = self  # a dataclass, as all subclasses are
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(family))
        changed = (f"{field.name}={value!r}" for field, value in fields if value != field.default)
        return f"{type(self).__name__}({', '.join(changed)})"

    def sample_shared(self, key: jax.Array, shape: tuple[int, ...], dtype) -> Any:
        """Draws the part that all members share, once per generation: a tree of arrays, `()` if they share nothing.

        Law 3: a new key gives new noise.
        """
        return self.shared_from_words(jax.random.bits(key, (self.shared_words(shape),), jnp.uint32), shape, dtype)

    def shared_words(self, shape: tuple[int, ...]) -> int:
        """Counts the random words of the shared part, as `words` does a member's; 0 if it needs other draws."""
        return 0

    def shared_from_words(self, words: jax.Array, shape: tuple[int, ...], dtype) -> Any:
        """Makes the shared part from `words: uint32[self.shared_words(shape)]`. Law 3, as for `sample_shared`."""
        raise NotImplementedError

    def sample_member(self, key: jax.Array, index: jax.Array, shape: tuple[int, ...], dtype) -> Any:
        """Draws one member's own part.

        Laws 3 and 5: over keys, each entry of `E_i` has mean 0 and variance 1; the part depends on `key` and `index`
        alone.

        Args:
          key: the member's own key, which no other member has.
          index: the member's number, for families whose members are coded against each other; most ignore it.
          shape: the parameter's shape.
          dtype: the parameter's dtype.

        Returns:
          A tree of arrays of any shapes, the smaller the better: it is held for every member of a chunk.
        """
        return self.from_words(jax.random.bits(key, (self.words(shape),), jnp.uint32), shape)

    def words(self, shape: tuple[int, ...]) -> int:
        """Counts the random uint32 words that fully determine one member's part; 0 if it needs other draws.

        The words of all parameters are then drawn in one call, which compiles and runs several times faster than one
        call each, and `from_words` is used instead of `sample_member`.
        """
        return 0

    def from_words(self, words: jax.Array, shape: tuple[int, ...]) -> Any:
        """Makes one member's part from `words: uint32[self.words(shape)]`. Laws 3 and 5, as for `sample_member`."""
        raise NotImplementedError

    @property
    def on_outputs(self) -> bool:
        """Whether the noise is on what a parameter is multiplied to, not on the parameter (`nesjax.Node`)."""
        return False

    def fold(self, member: Any, number: Any) -> Any:
        """The part of a member whose noise is on outputs, for a place in the program, a step or a call of its own."""
        raise NotImplementedError

    def draw(self, member: Any, shape: tuple[int, ...], dtype) -> jax.Array:
        """The noise of an output of `shape`, of a member whose noise is on outputs."""
        raise NotImplementedError

    @abc.abstractmethod
    def materialise(self, shared: Any, member: Any, shape: tuple[int, ...]) -> jax.Array:
        """Forms the dense `E_i`, of `shape`: the definition that every other method is tested against."""

    def for_shape(self, shape: tuple[int, ...]) -> NoiseFamily:
        """Chooses the family that perturbs a parameter of `shape`: vectors, say, may get independent noise.

        Raises:
          ValueError: this family's settings don't fit the shape.
        """
        return self

    def contract(
        self, shared: Any, member: Any, shape: tuple[int, ...], x: jax.Array, axes: Axes, *, precision: Any = None
    ) -> jax.Array:
        """Contracts `x` with `E_i` over any of its axes, as `jnp.einsum` does.

        Law 1: the result is that of the materialised `E_i`.

        Args:
          shared, member, shape: the noise.
          x: an array whose axes carry the labels `axes[0]`.
          axes: the labels of `x`, of `E_i` and of the output. Labels of both that the output lacks are summed over.
          precision: as in `jax.lax.dot_general`.

        Returns:
          The product, accumulated in at least float32, or `NotImplemented`.
        """
        return multiply(x, axes[0], self.materialise(shared, member, shape), axes, precision)

    def conv(self, shared: Any, member: Any, shape: tuple[int, ...], x: jax.Array, geometry: ConvGeometry) -> jax.Array:
        """Convolves `x: [B, *space, C]` with `E_i`, as law 1 says.

        Returns:
          `[B, *space', O]` in at least float32, or `NotImplemented`.
        """
        return geometry.apply(x, self.materialise(shared, member, shape))

    def take(self, shared: Any, member: Any, shape: tuple[int, ...], indices: jax.Array) -> jax.Array:
        """Takes the rows `E_i[indices]`, within bounds: `[*indices.shape, *shape[1:]]`, or `NotImplemented`. Law 1."""
        return self.materialise(shared, member, shape)[indices]

    def squared(self, shared: Any, member: Any, shape: tuple[int, ...]) -> tuple[NoiseFamily, Any, Any]:
        """Finds the family and the parts of the noise whose entries are the squares of `E_i`'s, or `NotImplemented`.

        With it, sums of squares are products, and nothing is formed. Law 1.
        """
        return NotImplemented

    def weighted_sum(self, shared: Any, members: Any, shape: tuple[int, ...], weights: jax.Array) -> jax.Array:
        """Sums `weights[i] E_i` over members. Law 2: the result is that of the materialised `E_i`.

        Args:
          shared, shape: the noise.
          members: members' parts; every leaf has a leading axis `n`.
          weights: `[n]`.

        Returns:
          An array of `shape` in at least float32, or `NotImplemented`: this default, which adds up one materialised
          member after the other, is then used.
        """

        def add(total, item):
            member, weight = item
            return total + weight * self.materialise(shared, member, shape).astype(total.dtype), None

        start = jnp.zeros_like(weights, accumulator(weights.dtype), shape)  # varies over devices as the weights do
        return jax.lax.scan(add, start, (members, weights))[0]

    def max_cosine(self, shape: tuple[int, ...]) -> float:
        """Limit, as N grows, of the cosine between estimate and true gradient; 1.0 if unlimited.

        Law 7. It is averaged over random gradients: with `E` and `E'` of two members that share a shared part,
        `max_cosine^-2 = E[<E, E'>^2] / d` for a parameter of `d` entries.
        """
        return 1.0


def _lacks(cls: type[NoiseFamily]) -> Iterator[str]:
    """Lists what must still be done to a family's class before it can be used."""

    def call(name: str) -> str:
        return f"{name}({', '.join(inspect.signature(getattr(NoiseFamily, name)).parameters)})"

    made = getattr(cls, "__dataclass_params__", None)
    if made is None or not made.frozen:
        yield "be a frozen dataclass (put @dataclasses.dataclass(frozen=True) above the class)"
    for name in sorted(cls.__abstractmethods__):
        yield f"define {call(name)}"
    for draws in (("sample_shared", "shared_words", "shared_from_words"), ("sample_member", "words", "from_words")):
        own = {name for name in draws if getattr(cls, name) is not getattr(NoiseFamily, name)}
        if not own or len(own - {draws[0]}) == 1:
            yield "define {}, or both {} and {}".format(*map(call, draws))


def longer_axis(shape: tuple[int, ...]) -> str:
    """NESgpu's rule for "auto": both axes of a small kernel, else the longer one."""
    n_in, n_out = shape[-2:]
    if 1 < n_in < 32 and 1 < n_out < 32:
        return "both"
    return "in" if n_in > n_out else "out"
