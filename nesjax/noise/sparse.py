"""Independent normal noise on `k` input rows per member: the quality of dense noise at the cost of `k` rows."""

import dataclasses
import math

import jax.numpy as jnp

from ..checks import positive_int
from .base import NoiseFamily, accumulator, multiply
from .gaussian import Gaussian, normals


@dataclasses.dataclass(frozen=True)
class Sparse(NoiseFamily):
    """`k` input rows per member, drawn with replacement, get independent normal noise. NESgpu's SparsePerturbedLinear.

    `E[rows[c], :] += values[c, :]`. A member's part is a dict of "rows" (`[k]`) and "values" (`[*window, k, O]`, normal
    numbers times `sqrt(I / k)`). Members share nothing. Vectors get `Gaussian` noise.

    Args:
      k: number of rows perturbed per member, at least 1 and at most `I`.

    Raises:
      ValueError: `k` is no positive integer; when it meets a parameter: `k` is above its `I`.

    Example:
      >>> import jax
      >>> member = Sparse().sample_member(jax.random.key(1), 0, (3, 2), "float32")
      >>> print(Sparse().materialise((), member, (3, 2)).round(1))
      [[ 0.   0. ]
       [ 0.   0. ]
       [ 0.1 -0.2]]
      >>> Sparse(2).for_shape((1, 5))
      Traceback (most recent call last):
      ...
      ValueError: Sparse k must be at most the layer's 1 inputs, got 2.
    """

    k: int = 1

    def __post_init__(self):
        positive_int("Sparse k", self.k)

    def for_shape(self, shape):
        if len(shape) < 2:
            return Gaussian()
        if self.k > shape[-2]:
            raise ValueError(f"Sparse k must be at most the layer's {shape[-2]} inputs, got {self.k}.")
        return self

    def sample_shared(self, key, shape, dtype):
        return ()

    def words(self, shape):
        return self.k * (1 + math.prod(shape) // shape[-2])

    def from_words(self, words, shape):
        *window, n_in, n_out = shape
        values = normals(words[self.k :]).reshape(*window, self.k, n_out)
        return {"rows": (words[: self.k] % n_in).astype(jnp.int32), "values": values * (n_in / self.k) ** 0.5}

    def materialise(self, shared, member, shape):
        values = member["values"]
        return jnp.zeros(shape, values.dtype).at[..., member["rows"], :].add(values)

    def contract(self, shared, member, shape, x, axes, *, precision=None):
        labels, e_labels, out = axes
        row = e_labels[-2]
        if row in labels:
            x = jnp.take(x, member["rows"], axis=labels.index(row), mode="clip")
        y = multiply(x, labels, member["values"], axes, precision)
        if row not in out:
            return y
        at = out.index(row)
        scattered = jnp.zeros((*y.shape[:at], shape[-2], *y.shape[at + 1 :]), y.dtype)
        return scattered.at[(slice(None),) * at + (member["rows"],)].add(y)

    def conv(self, shared, member, shape, x, geometry):
        if geometry.groups > 1 or not geometry.in_order:
            return NotImplemented
        return geometry.apply(jnp.take(x, member["rows"], axis=-1, mode="clip"), member["values"])

    def take(self, shared, member, shape, indices):
        if len(shape) > 2:
            return NotImplemented
        hit = (indices[..., None] == member["rows"]).astype(member["values"].dtype)
        return hit @ member["values"]

    def squared(self, shared, member, shape):
        if self.k > 1:  # entries may be sums
            return NotImplemented
        return self, shared, member | {"values": jnp.square(member["values"])}

    def weighted_sum(self, shared, members, shape, weights):
        values = jnp.einsum("n,n...->n...", weights, members["values"].astype(accumulator(weights.dtype)))
        values = jnp.moveaxis(values, -2, 1)  # [n, k, *window, O]
        *window, n_in, n_out = shape
        total = jnp.zeros((n_in, *window, n_out), values.dtype).at[members["rows"]].add(values)
        return jnp.moveaxis(total, 0, -2)
