"""Noise on outputs: what a parameter multiplies is perturbed after the product, anew at every position."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from ..checks import check_fused, one_of
from .base import NoiseFamily
from .low_rank import LowRank, apply_signs, packed_size


@dataclasses.dataclass(frozen=True)
class Node(NoiseFamily):
    """Noise on outputs instead of weights: `y = x W + std * xi`, with `xi` drawn anew for every number of `y`.

    The gradient is `sum loss * x xi^T / std` over all positions (rows, tokens, time steps). A direction has as many
    dimensions as an output has features, not as many as the matrix has entries, so each evaluation teaches more; with
    `credit="tokens"` a position is credited with the losses it can have caused alone. This is node perturbation
    (Williams, "Simple statistical gradient-following algorithms", Machine Learning 8, 1992); with losses per token it
    is what Dust does (Q Labs, 2026).

    The parameter must be used in products only (matrix products, einsum, convolutions, lookups of rows), and not inside
    `while_loop` or `cond`. It is no perturbation of weights: `materialise`, `weighted_sum` and `estimate_gradient`
    refuse it; train by `value_and_grad` or `make_train_step`. Vectors get `LowRank` noise of the same values.

    Args:
      values: "rademacher" (+-1) or "normal".
      fused: experimental, as for `LowRank`: one kernel forms a product of rows with a matrix, the noise on it,
        bias and activation.

    Raises:
      ValueError: `values` is neither, or `fused` is asked for without signs.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> population = nesjax.Population(size=4096, std=0.1, noise=nesjax.Node())
      >>> es_grad = nesjax.value_and_grad(lambda w, x: jnp.sum(x @ w), population)
      >>> _, grads = es_grad(jnp.zeros((2, 2)), jax.random.key(0), jnp.array([1.0, 2.0]))
      >>> grads.round(1).tolist()
      [[1.0, 1.0], [2.0, 2.0]]
    """

    values: Literal["rademacher", "normal"] = "rademacher"
    fused: bool = dataclasses.field(default=False, repr=False)  # the noise is the same, so checkpoints don't name it

    def __post_init__(self):
        one_of("Node values", self.values, ("rademacher", "normal"))
        check_fused(self, self.values == "rademacher")

    @property
    def on_outputs(self):
        return True

    def for_shape(self, shape):
        return self if len(shape) > 1 else LowRank(values=self.values, fused=self.fused).for_shape(shape)

    def sample_shared(self, key, shape, dtype):
        return ()

    def words(self, shape):
        return 2

    def from_words(self, words, shape):
        """A member's part: the data of a key."""
        return words

    def materialise(self, shared, member, shape):
        raise ValueError("Node perturbs the outputs of products, not weights: there is no perturbed parameter to form.")

    def weighted_sum(self, shared, members, shape, weights):
        raise ValueError(
            "Node perturbs the outputs of products, not weights: its gradient needs what each parameter multiplied, so "
            "use nesjax.value_and_grad or nesjax.make_train_step."
        )

    def fold(self, member: jax.Array, number: jax.Array | int) -> jax.Array:
        """The key data apart for a place in the program, a time step or a call: `uint32[..., 2]`."""
        fold = lambda words: jax.random.key_data(jax.random.fold_in(_key(words), number))
        for _ in member.shape[1:]:
            fold = jax.vmap(fold)
        return fold(member)

    def draw(self, member: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        """The noise of an output of `shape`."""
        if self.values == "normal":
            return jax.random.normal(_key(member.reshape(-1, 2)[0]), shape, dtype)
        return self.signs(self.draw_words(member, shape), shape, dtype)

    def draw_words(self, member: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The signs of an output of `shape`, 32 a word."""
        return jax.random.bits(_key(member.reshape(-1, 2)[0]), (packed_size(math.prod(shape)),), jnp.uint32)

    def signs(self, words: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        """The noise of an output of `shape`, of its words."""
        size = math.prod(shape)
        return apply_signs(jnp.ones(size, dtype), words, 0, size).reshape(shape)


def _key(words: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")
