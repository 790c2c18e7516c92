"""Credit by inputs: which part of a member's direction its loss can know anything about.

A call of the loss sees the noise `E` of a parameter only through `Y = X E`, `X: [T, I]` being all rows that the
parameter multiplied in that call. The projection `X^+ Y` of `E` on those rows may therefore stand for `E` in the
estimate: to first order in std its expectation is the same for any loss of that call, and its variance falls from
`I * O` to `rank(X) * O` per parameter. `Y` is the noise's own product, so no family needs to know.

Letters: `n` calls (members, times samples), `T` rows a call, `I`/`O` contracted and remaining sizes of the noise.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from .noise.base import accumulator
from .population import Leaf
from .taps import Reaped, Rows

RIDGE = 1e-10  # of the squared length of a call's rows: what is left of a row that those before it explain


class CreditWarning(UserWarning):
    """`credit="inputs"` gives a matrix the plain estimate: right, but each evaluation teaches less about it."""


def credited_rows(reaped: Reaped, leaves: tuple[Leaf, ...]) -> tuple[dict[str, Rows], dict[str, str]]:
    """The rows of each parameter that can be credited by its inputs, and for each other perturbed one the reason."""
    rows, reasons = {}, {}
    for leaf in leaves:
        if leaf.family is not None:
            found = _joined(leaf, reaped)
            (reasons if isinstance(found, str) else rows)[leaf.path] = found
    return rows, reasons


def _joined(leaf: Leaf, reaped: Reaped) -> Rows | str:
    """All rows of one parameter, or why it has none."""
    if len(leaf.noise_shape) < 2:
        return "a vector"
    if leaf.path in reaped.lost:
        return reaped.lost[leaf.path]
    uses = [rows for rows, _ in reaped.rows.get(leaf.path, ())]
    if not uses:
        return "not used"
    kind = uses[0].kind
    if any(use.kind != kind for use in uses):
        return "used in several ways"
    if any(use.y.ndim != leaf.axes + 2 for use in uses):
        return "its stack is indexed (scan over it instead)"
    x = jnp.concatenate([use.x for use in uses], -1 if kind.take else -2)
    if not kind.take and x.shape[-2] >= x.shape[-1]:
        return f"{x.shape[-2]} rows of {x.shape[-1]} inputs"
    return Rows(x, jnp.concatenate([use.y for use in uses], -2), kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CreditedSum:
    """`sum_n weights[n] X_n^+ Y_n` of one parameter, of its shape, in float32.

    Attributes:
      total: the sum.
      dimensions: of one projected direction: what the parameter's size is to a plain one.
    """

    total: jax.Array
    dimensions: int = dataclasses.field(metadata={"static": True})


def credited_sum(leaf: Leaf, rows: Rows, weights: jax.Array) -> CreditedSum:
    """The sum of projected directions.

    Args:
      leaf: the parameter.
      rows: `x: [n, *stack, T, I]`, `y: [n, *stack, T, O]`.
      weights: `[n]`.
    """
    dtype = accumulator(weights.dtype)
    one = lambda x, y: _sum_taken(leaf, x, y, weights) if rows.kind.take else _sum_projected(x, y, weights)
    for _ in range(leaf.axes):
        one = jax.vmap(one, 1)
    # A call that failed has weight 0, but may have multiplied infinities.
    finite = lambda z: jnp.where(jnp.isfinite(z), z, 0).astype(dtype)
    total = one(rows.x if rows.kind.take else finite(rows.x), finite(rows.y))
    order = (*rows.kind.inside, *rows.kind.free)
    total = total.reshape(*leaf.stack, *(leaf.noise_shape[axis] for axis in order))
    total = total.transpose(*range(leaf.axes), *(leaf.axes + order.index(axis) for axis in range(len(order))))
    return CreditedSum(total, rows.y[0].size)


def _sum_projected(x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_n weights[n] X_n^+ Y_n`: `[I, O]` of `x: [n, T, I]`, `y: [n, T, O]`."""
    if x.shape[1] == 1:
        length = jnp.sum(x[:, 0] ** 2, -1)
        return (x[:, 0] * (weights / jnp.where(length > 0, length, 1))[:, None]).T @ y[:, 0]
    enough = RIDGE * jnp.sum(x**2, (1, 2))

    # Gram and Schmidt's way, twice for each row: in float32 as exact as a QR, and without LAPACK, whose batched solves
    # block jaxlib's threads on a CPU. A row that adds nothing to those before it weighs nothing.
    def row(carry, t):
        q, r = x[:, t], y[:, t]
        for _ in range(2):
            along = jnp.einsum("nti,ni->nt", carry[0], q, precision="highest")
            q -= jnp.einsum("nt,nti->ni", along, carry[0], precision="highest")
            r -= jnp.einsum("nt,nto->no", along, carry[1], precision="highest")
        length = jnp.sum(q**2, -1)
        adds = length > enough
        scale = jnp.where(adds, jax.lax.rsqrt(jnp.where(adds, length, 1)), 0)[:, None]
        return (carry[0].at[:, t].set(q * scale), carry[1].at[:, t].set(r * scale)), None

    (x, y), _ = jax.lax.scan(row, (jnp.zeros_like(x), jnp.zeros_like(y)), jnp.arange(x.shape[1]))
    return jnp.einsum("nti,nto->io", x, weights[:, None, None] * y)


def _sum_taken(leaf: Leaf, indices: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """The same where rows are looked up, `indices: [n, T]`: one that is looked up twice counts once."""
    times = (indices[:, :, None] == indices[:, None, :]).sum(-1)
    total = jnp.zeros_like(y, shape=(leaf.noise_shape[0], y.shape[-1]))
    return total.at[indices].add(weights[:, None, None] * y / times[..., None])


def describe_rows(found: Rows | str) -> str:
    """What `nesjax.describe` says of a parameter's credit."""
    if isinstance(found, str):
        return f"plain: {found}"
    inputs = "looked up" if found.kind.take else f"of {found.x.shape[-1]} inputs"
    return f"{found.y.shape[-2]} row{'s' * (found.y.shape[-2] > 1)} {inputs}"
