"""Outer products of sign (or normal) vectors: one bit per row and column, and no limit to the gradient."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from ..checks import check_fused, one_of, positive_int
from .base import NoiseFamily, accumulator
from .gaussian import Gaussian, normals

BLOCK = 1 << 16  # entries of vectors that a CPU sums up at a time


def packed_size(size: int) -> int:
    """Number of uint32 words that hold `size` signs."""
    return -(-size // 32)


def split(flat: jax.Array, shapes: Sequence[tuple[int, ...]]) -> tuple[jax.Array, ...]:
    """Cuts a flat array into arrays of the given shapes, one after the other."""
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    return tuple(flat[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes))


def apply_signs(x: jax.Array, words: jax.Array, axis: int, size: int) -> jax.Array:
    """Applies one axis's packed signs to `x`. `words` broadcasts like `x`, with `ceil(size / 32)` along the axis.

    The bits are moved onto the float's sign bit, which shifts all others out. Unpacking to +-1 and multiplying is
    slower and needs an array more.
    """
    width = x.dtype.itemsize * 8
    kind = jnp.dtype(f"uint{width}")
    words = jnp.expand_dims(words, axis + 1)
    shape = (*words.shape[: axis + 1], 32, *words.shape[axis + 2 :])
    places = jax.lax.broadcasted_iota(words.dtype, shape, axis + 1)
    bits = jax.lax.shift_right_logical(jnp.broadcast_to(words, shape), places)
    bits = bits.reshape(*shape[:axis], -1, *shape[axis + 2 :])
    bits = _whole(jax.lax.slice_in_dim(bits, 0, size, axis=axis)).astype(kind) << (width - 1)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, kind) ^ bits, x.dtype)


def _whole(bits: jax.Array) -> jax.Array:
    """Keeps bits on every device of those mesh axes that are the compiler's, which else cuts words as it does kernels.

    Every device draws them anyway; cut, they would cross devices, 32 at a time.
    """
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
        return bits
    return jax.lax.with_sharding_constraint(bits, PartitionSpec())


def scale(x: jax.Array, factor: jax.Array, axis: int, size: int) -> jax.Array:
    """Multiplies `x` by a factor, packed signs or numbers, that broadcasts like `x` and varies along `axis`."""
    packed = jnp.issubdtype(factor.dtype, jnp.unsignedinteger)
    return apply_signs(x, factor, axis, size) if packed else x * factor.astype(x.dtype)


def scale_axis(x: jax.Array, factor: jax.Array, axis: int, size: int) -> jax.Array:
    """Multiplies `x: [rank, ...]` along `axis` by packed signs `[rank, words]` or numbers `[rank, size]`."""
    sides = (1,) * (axis - 1), (1,) * (x.ndim - axis - 1)
    return scale(x, factor.reshape(factor.shape[0], *sides[0], -1, *sides[1]), axis, size)


@dataclasses.dataclass(frozen=True)
class LowRank(NoiseFamily):
    """The sum of `rank` outer products of one vector per axis, over `sqrt(rank)`. The default family.

    Members share nothing, so `E[<g, E> E] = g` and the cosine to the true gradient has no limit below 1. EGGROLL
    (arXiv:2511.16652) uses normal factors on matrices; here the noise of a kernel is separable for any number of axes.
    The forward pass reads its input once more and adds an outer product. The noise of a vector is independent, and a
    scalar gets `Gaussian` noise. A member's part is one factor per axis: signs packed as
    `uint32[rank, ceil(size / 32)]`, or normal numbers `[rank, size]`.

    Args:
      rank: number of outer products summed, at least 1.
      values: distribution of the factors: "rademacher" (+-1, stored as one bit) or "normal". Signs never move a weight
        farther than std, so they can't see a jump beyond it: use "normal" for tiny or discontinuous networks.
      fused: experimental, and not yet timed: on an NVIDIA H100 or H200, forms a product of rows with a bfloat16 matrix,
        its noise, the bias and the activation in one kernel, where the shapes fit and no credit is asked for
        (`nesjax.kernels.signed_product` says which); elsewhere as without it. Only for one product of signs, and
        `jax.grad` can't go through it.

    Raises:
      ValueError: `rank` or `values` is none of these, or `fused` is asked for what isn't one product of signs.

    Example:
      >>> import jax
      >>> member = LowRank().sample_member(jax.random.key(1), 0, (2, 3), "float32")
      >>> print(LowRank().materialise((), member, (2, 3)))
      [[-1.  1.  1.]
       [-1.  1.  1.]]
      >>> [words.shape for words in LowRank().sample_member(jax.random.key(1), 0, (64, 32), "float32")]
      [(1, 2), (1, 1)]
    """

    rank: int = 1
    values: Literal["rademacher", "normal"] = "rademacher"
    fused: bool = dataclasses.field(default=False, repr=False)  # the noise is the same, so checkpoints don't name it

    def __post_init__(self):
        positive_int("LowRank rank", self.rank)
        one_of("LowRank values", self.values, ("rademacher", "normal"))
        check_fused(self, self.rank == 1 and self.values == "rademacher")

    def for_shape(self, shape):
        if not shape:
            return Gaussian()
        return self if len(shape) > 1 else dataclasses.replace(self, rank=1)

    def sample_shared(self, key, shape, dtype):
        return ()

    def words(self, shape):
        return self.rank * sum(map(self._words, shape))

    def _words(self, size: int) -> int:
        """Number of words of one factor."""
        return packed_size(size) if self.values == "rademacher" else size

    def from_words(self, words, shape):
        factors = words if self.values == "rademacher" else normals(words)
        return split(factors, [(self.rank, self._words(size)) for size in shape])

    def _spread(self, y, member, shape, axes):
        """Multiplies `y: [rank, ...]` by the factors of the axes that `axes` maps to its own, and sums over rank."""
        for axis, at in axes.items():
            y = scale_axis(y, member[axis], at, shape[axis])
        return y[0] if self.rank == 1 else y.sum(0) * self.rank**-0.5

    def materialise(self, shared, member, shape):
        dtype = jnp.float32 if self.values == "rademacher" else member[0].dtype
        ones = jnp.ones((self.rank, *shape), dtype)
        return self._spread(ones, member, shape, {axis: axis + 1 for axis in range(len(shape))})

    def contract(self, shared, member, shape, x, axes, *, precision=None):
        labels, e_labels, out = axes
        y = x.astype(accumulator(x.dtype))[None]
        if set(e_labels) <= set(labels):  # nothing of `E_i` is left to be spread: products, which keep no array like x
            ones = [jnp.ones((self.rank, size), y.dtype) for size in shape]
            factors = [scale_axis(one, own, 1, size) for one, own, size in zip(ones, member, shape)]
            terms = [term for factor, label in zip(factors, e_labels) for term in (factor, (-1, label))]
            return jnp.einsum(y[0], labels, *terms, out, precision=precision) * self.rank**-0.5
        y = jnp.broadcast_to(y, (self.rank, *x.shape))
        for axis, label in enumerate(e_labels):
            if label in labels:
                y = scale_axis(y, member[axis], labels.index(label) + 1, shape[axis])
        y = y.sum([at + 1 for at, label in enumerate(labels) if label not in out])
        kept = [label for label in labels if label in out]
        y = y.transpose(0, *(kept.index(label) + 1 for label in out if label in kept))
        y = jnp.expand_dims(y, [at + 1 for at, label in enumerate(out) if label not in kept])
        free = {axis: out.index(label) + 1 for axis, label in enumerate(e_labels) if label not in labels}
        return self._spread(y, member, shape, free)

    def conv(self, shared, member, shape, x, geometry):
        """Takes channels first (to one channel per group), then the window's axes one by one, then the outputs."""
        *window, n_in, n_out = geometry.kernel_axes
        groups = geometry.groups
        y = x.astype(accumulator(x.dtype)).reshape(*x.shape[:-1], groups, shape[n_in])
        y = jnp.broadcast_to(y[None], (self.rank, *y.shape))
        y = scale_axis(y, member[n_in], y.ndim - 1, shape[n_in]).sum(-1)  # [rank, B, *space, groups]
        y = jax.vmap(geometry.padded)(y)
        for space, axis in enumerate(window):
            taps = [jax.vmap(lambda z: geometry.tap(z, space, k, shape[axis]))(y) for k in range(shape[axis])]  # noqa: B023
            y = scale_axis(jnp.stack(taps, -1), member[axis], y.ndim, shape[axis]).sum(-1)
        y = jnp.repeat(y, shape[n_out] // groups, -1)
        return self._spread(y, member, shape, {n_out: y.ndim - 1})

    def take(self, shared, member, shape, indices):
        rows = scale_axis(jnp.ones((self.rank, shape[0]), jnp.float32), member[0], 1, shape[0])[:, indices]
        y = rows.reshape(self.rank, *indices.shape, *(1,) * (len(shape) - 1))
        return self._spread(y, member, shape, {axis: axis + indices.ndim for axis in range(1, len(shape))})

    def squared(self, shared, member, shape):
        """The noise of the products of any two of the sum's terms: of rank `rank**2`."""
        product = jnp.bitwise_xor if self.values == "rademacher" else jnp.multiply
        pairs = (product(factor[:, None], factor).reshape(-1, factor.shape[-1]) for factor in member)
        return dataclasses.replace(self, rank=self.rank**2), shared, tuple(pairs)

    def weighted_sum(self, shared, members, shape, weights):
        """One GEMM: the products of the first axes' factors against the weighted ones of the last axes' factors.

        For an NVIDIA GPU it is lowered to bfloat16 where the factors are signs, which that holds exactly: tensor cores
        then err by 2e-6, not by TF32's 2e-4.
        """
        rows, dtype = weights.size * self.rank, accumulator(weights.dtype)
        weights = jnp.repeat(weights.astype(dtype) * self.rank**-0.5, self.rank)
        members = [factor.reshape(rows, -1) for factor in members]
        if len(shape) == 1:
            if self.values == "normal" or rows * shape[0] <= 4 * BLOCK:
                return sum_of_vectors(*shape, weights, *members)
            blocks, columns = (functools.partial(fn, *shape) for fn in (sum_in_blocks, sum_of_columns))
            return jax.lax.platform_dependent(weights, *members, cpu=blocks, default=columns)
        plain = functools.partial(product_of_factors, shape, dtype)
        if self.values == "normal" or dtype != jnp.float32:
            return plain(weights, members)
        signs = functools.partial(product_of_factors, shape, jnp.bfloat16)
        return jax.lax.platform_dependent(weights, members, cuda=signs, default=plain)


def sum_of_vectors(size: int, weights: jax.Array, factors: jax.Array) -> jax.Array:
    """`sum_k weights[k] factors[k]`, of packed signs or numbers of `size` each."""
    return scale(jnp.broadcast_to(weights[:, None], (len(weights), size)), factors, 1, size).sum(0)


def sum_of_columns(size: int, weights: jax.Array, words: jax.Array) -> jax.Array:
    """The same of packed signs, as a GPU sums them up without writing them out."""
    return apply_signs(jnp.broadcast_to(weights, (size, len(weights))), words.T, 0, size).sum(1)


def sum_in_blocks(size: int, weights: jax.Array, factors: jax.Array) -> jax.Array:
    """The same, BLOCK entries at a time: a CPU writes out the signs that it sums up, and so does it in its cache."""
    count = -(-len(weights) // max(1, BLOCK // size))
    rows = -(-len(weights) // count)
    blocks = [jnp.pad(x, [(0, count * rows - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in (weights, factors)]
    add = lambda total, block: (total + sum_of_vectors(size, *block), None)
    items = tuple(x.reshape(count, rows, *x.shape[1:]) for x in blocks)
    return jax.lax.scan(add, jnp.zeros_like(weights, shape=size), items)[0]


def product_of_factors(shape: tuple[int, ...], dtype, weights: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """`sum_k weights[k] outer(factors[0][k], factors[1][k], ...)` of `shape`, as one product of arrays of `dtype`.

    Weights that `dtype` would round go in two parts, of which the second is what the first leaves out.
    """
    middle = min(range(1, len(shape)), key=lambda at: math.prod(shape[:at]) + math.prod(shape[at:]))

    def side(axes):  # [product of the axes' sizes, k], as products read them best
        y = jnp.ones((1, weights.size), dtype)
        for axis in axes:
            factor = scale(jnp.ones((shape[axis], weights.size), dtype), factors[axis].T, 0, shape[axis])
            y = (y[:, None] * factor[None]).reshape(-1, weights.size)
        return y

    left, right, parts = side(range(middle)), side(range(middle, len(shape))), [weights]
    if dtype != weights.dtype:
        kind = jnp.finfo(dtype)
        high = jax.lax.reduce_precision(weights, kind.nexp, kind.nmant)  # unlike a cast there and back, XLA keeps it
        parts = [high, weights - high]
    product = functools.partial(jnp.matmul, preferred_element_type=weights.dtype)
    products = [product(left, (part.astype(dtype)[None] * right).T) for part in parts]
    return functools.reduce(jnp.add, products).reshape(shape)
