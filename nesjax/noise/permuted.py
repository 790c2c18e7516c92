"""One shared normal matrix, seen by each member through its own permutation."""

import dataclasses
import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp

from ..checks import one_of
from .base import NoiseFamily, accumulator, longer_axis, multiply
from .gaussian import Gaussian, normals


@dataclasses.dataclass(frozen=True)
class Permuted(NoiseFamily):
    """A shared matrix permuted per member, times a random sign. NESgpu's PermutedLinear and PermutedConv2d.

    With `R` of shape `[*window, K_in, K_out]` and a member's `pi` (`[K_in]`) and `rho` (`[O]`),
    `E[pi[k], j] += R[k, rho[j]]` where `rho[j] < K_out`. The sign lets centered losses see the column sums that a
    permutation keeps. The shared part is `R`. A member's part is a dict of "in" and "out" (`pi` and `rho`, None for a
    side that stays) and "sign". Vectors, and kernels with one channel on the permuted side, get `Gaussian` noise.

    Args:
      axis: the side to permute: "in", "out", "both" or "auto". "auto" permutes each side for which a sparsity is given;
        without any, both sides of a kernel under 32 by 32, else the longer one. One side alone limits the gradient
        (see `max_cosine`); "both" needs two long axes.
      in_sparsity, out_sparsity: number of inputs or outputs kept, as a fraction in (0, 1] (of which at least one is
        kept) or as a count. A side with a sparsity is always permuted.
      with_replacement: whether indices are drawn independently, which is faster than a permutation.

    Raises:
      ValueError: `axis` is none of these, or a sparsity is neither a fraction nor a count; when it meets a parameter:
        a count is above the side's length.

    Example:
      >>> import jax
      >>> family, shape = Permuted("in"), (2, 3)
      >>> shared = family.sample_shared(jax.random.key(0), shape, "float32")
      >>> for seed in (1, 2):  # two members: the same rows in another order
      ...     member = family.sample_member(jax.random.key(seed), 0, shape, "float32")
      ...     print(family.materialise(shared, member, shape).round())
      [[ 0. -0.  1.]
       [-2. -2.  0.]]
      [[-2. -2.  0.]
       [ 0. -0.  1.]]
      >>> round(family.max_cosine((64, 64)), 2)
      0.57
    """

    axis: Literal["auto", "in", "out", "both"] = "auto"
    in_sparsity: float | int | None = None
    out_sparsity: float | int | None = None
    with_replacement: bool = False

    def __post_init__(self):
        one_of("Permuted axis", self.axis, ("auto", "in", "out", "both"))
        for name in ("in_sparsity", "out_sparsity"):
            value = getattr(self, name)
            if value is None or (_is_fraction(value) and 0 < value <= 1):
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"Permuted {name} must be a fraction in (0, 1] or a count >= 1, got {value!r}.")

    def for_shape(self, shape):
        if len(shape) < 2:
            return Gaussian()
        permutes_in, permutes_out, _, _ = self._layout(shape)
        moving = (permutes_in and shape[-2] > 1) or (permutes_out and shape[-1] > 1)
        return self if moving else Gaussian()

    def _layout(self, shape) -> tuple[bool, bool, int, int]:
        """Tells whether inputs and outputs are permuted, and how many of each are kept."""
        axis, sides = self.axis, (self.in_sparsity is not None, self.out_sparsity is not None)
        if axis == "auto":
            axis = {(True, True): "both", (True, False): "in", (False, True): "out"}.get(sides) or longer_axis(shape)
        kept = []
        for name, value, size in zip(("in", "out"), (self.in_sparsity, self.out_sparsity), shape[-2:]):
            count = size if value is None else max(1, int(value * size)) if _is_fraction(value) else value
            if count > size:
                raise ValueError(f"Permuted {name}_sparsity must be at most the {size} {name}puts, got {count}.")
            kept.append(count)
        return axis in ("in", "both") or sides[0], axis in ("out", "both") or sides[1], *kept

    def shared_words(self, shape):
        return math.prod((*shape[:-2], *self._layout(shape)[2:]))

    def shared_from_words(self, words, shape, dtype):
        kept = self._layout(shape)[2:]
        rescale = (math.prod(shape[-2:]) / math.prod(kept)) ** 0.5
        return (normals(words) * rescale).astype(dtype).reshape(*shape[:-2], *kept)

    def _indices(self, shape) -> tuple[tuple[str, int, int, int], ...]:
        """Lists each permuted side: its name, its size, the number of indices per member and that of their words."""
        permutes_in, permutes_out, k_in, _ = self._layout(shape)
        sides = (("in", permutes_in, shape[-2], k_in), ("out", permutes_out, shape[-1], shape[-1]))
        words = lambda count: count if self.with_replacement else 4
        return tuple((name, size, count, words(count)) for name, permuted, size, count in sides if permuted)

    def words(self, shape):
        return 1 + sum(words for *_, words in self._indices(shape))

    def from_words(self, words, shape):
        member, words = {"in": None, "out": None, "sign": 1 - 2 * (words[0] & 1).astype(jnp.int8)}, words[1:]
        for name, size, count, used in self._indices(shape):
            drawn = words[:used] % size if self.with_replacement else _permutation(words[:used], size, count)
            member[name], words = drawn.astype(jnp.uint16 if size <= 1 << 16 else jnp.uint32), words[used:]
        return member

    def _outputs(self, y, out, axis):
        """Takes `y[..., rho[j], ...]` along `axis`, zero where `rho[j]` was not kept."""
        if y.shape[axis] < out.shape[0]:
            y = jnp.concatenate([y, jnp.zeros_like(jax.lax.slice_in_dim(y, 0, 1, axis=axis))], axis)
        return jnp.take(y, out, axis=axis, mode="clip")

    def materialise(self, shared, member, shape):
        e = shared
        if member["out"] is not None:
            e = self._outputs(e, member["out"], e.ndim - 1)
        if member["in"] is not None:
            e = jnp.zeros(shape, e.dtype).at[..., member["in"], :].add(e)
        return e * member["sign"]

    def contract(self, shared, member, shape, x, axes, *, precision=None):
        labels, e_labels, out_labels = axes
        row, column = e_labels[-2:]
        sign = member["sign"]
        if member["out"] is not None and column in labels:
            if column in out_labels:
                return NotImplemented
            x = _scatter(x, member["out"], shared.shape[-1], labels.index(column))
        if member["in"] is not None and row in labels:
            x = sign * jnp.take(x, member["in"], axis=labels.index(row), mode="clip")
            sign = 1  # there it costs no pass of its own
        y = multiply(x, labels, shared, axes, precision)
        if member["out"] is not None and column in out_labels:
            y = self._outputs(y, member["out"], out_labels.index(column))
        if member["in"] is not None and row in out_labels:
            y = _scatter(y, member["in"], shape[-2], out_labels.index(row))
        return y * sign

    def conv(self, shared, member, shape, x, geometry):
        if not geometry.in_order or (geometry.groups > 1 and member["out"] is not None):
            return NotImplemented
        if member["in"] is not None:
            grouped = x.reshape(*x.shape[:-1], geometry.groups, shape[-2])
            x = jnp.take(grouped, member["in"], axis=-1, mode="clip").reshape(*x.shape[:-1], -1)
        y = geometry.apply(x, shared)
        if member["out"] is not None:
            y = self._outputs(y, member["out"], y.ndim - 1)
        return y * member["sign"]

    def take(self, shared, member, shape, indices):
        rows = shared
        if member["in"] is not None and len(shape) == 2:
            if self.with_replacement:
                return NotImplemented
            place = jnp.full(shape[0], len(shared), jnp.int32).at[member["in"]].set(jnp.arange(len(shared)))
            indices = place[indices]
        rows = jnp.take(rows, indices, axis=0, mode="fill", fill_value=0)
        if member["in"] is not None and len(shape) > 2:
            rows = _scatter(rows, member["in"], shape[-2], rows.ndim - 2)
        if member["out"] is not None:
            rows = self._outputs(rows, member["out"], rows.ndim - 1)
        return rows * member["sign"]

    def squared(self, shared, member, shape):
        if self.with_replacement:  # entries may be sums
            return NotImplemented
        return self, jnp.square(shared.astype(accumulator(shared.dtype))), member | {"sign": jnp.square(member["sign"])}

    def weighted_sum(self, shared, members, shape, weights):
        if members["in"] is not None and members["out"] is not None:
            return super().weighted_sum(shared, members, shape, weights)  # no closed form: N * I * O gathers
        weights = weights * members["sign"]
        r = shared.astype(accumulator(weights.dtype))
        indices = members["out"] if members["in"] is None else members["in"]
        count, size = (r.shape[-1], shape[-1]) if members["in"] is None else (r.shape[-2], shape[-2])
        columns = jnp.broadcast_to(jnp.arange(indices.shape[1]), indices.shape)
        weights = jnp.broadcast_to(weights[:, None], indices.shape)
        if members["in"] is None:  # sums[c, j]: the weight with which output j shows column c
            return r @ jnp.zeros((count, size), r.dtype).at[indices, columns].add(weights, mode="drop")
        return jnp.zeros((size, count), r.dtype).at[indices, columns].add(weights) @ r

    def max_cosine(self, shape):
        """`(1 + (c + 1) / k * prod(1 + (k_a - 1) / (size_a - 1)))^(-1/2)`, from the noise's covariance given `R`.

        `c` entries move together (the window, and sides that stay). `k` is the product of the numbers `k_a` that are
        kept on each permuted side `a`. With replacement `size_a` stands for `size_a - 1`, and one more term of outputs,
        at most `1 / size_a`, is left out.
        """
        permutes_in, permutes_out, k_in, k_out = self._layout(shape)
        together, spread = math.prod(shape[:-2]), 1.0
        for permutes, kept, size in ((permutes_in, k_in, shape[-2]), (permutes_out, k_out, shape[-1])):
            if permutes:
                others = size if self.with_replacement else max(size - 1, 1)
                spread *= (1 + (kept - 1) / others) / kept
            else:
                together *= size
        return (1 + (together + 1) * spread) ** -0.5


def _is_fraction(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)


def _permutation(words, size, count):
    """Draws the first `count` images of a permutation of `size`, from 4 random words and without sorting.

    The permutation is a rotation, then `y -> a y + b` modulo the largest prime within `size` (what is beyond it stays),
    then another rotation. Every index has every image with the same probability. So has every pair of indices: exactly
    if `size` or `size - 1` is a prime, nearly otherwise. The covariance of the noise, and with it `max_cosine`, is thus
    that of uniform permutations.
    """
    prime = next(p for p in range(size, 0, -1) if p < 4 or all(p % d for d in range(2, math.isqrt(p) + 1)))
    before, a, b, after = jax.lax.rem(words, jnp.array([size, max(prime - 1, 1), prime, size], jnp.uint32))
    start = _modulo_sum(jnp.arange(count, dtype=jnp.uint32), before, size)
    moved = _modulo_sum(_modulo_product(1 + a, start, prime), b, prime)
    return _modulo_sum(jnp.where(start < prime, moved, start), after, size)


def _modulo_sum(x, y, size):
    """Adds `x` and `y`, both below `size`, modulo `size`."""
    return jnp.minimum(x + y, x + y - size)  # the latter wraps around where it is below 0


def _modulo_product(a, x, size):
    """Multiplies `a` by `x` modulo `size` in 32 bits, taking as many bits of `x` at a time as fit beside `a`."""
    bits = 32 - size.bit_length()
    total = jnp.zeros_like(x)
    for low in reversed(range(0, size.bit_length(), bits)):
        part = a * ((x >> low) & ((1 << bits) - 1)) % size
        total = _modulo_sum((total << bits) % size, part, size)
    return total


def _scatter(x, indices, size, axis):
    """Adds entry `c` of `x` along `axis` to place `indices[c]` of `size`; drops places beyond it."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    return jnp.zeros(shape, x.dtype).at[(slice(None),) * axis + (indices,)].add(x, mode="drop")
