"""Credit: which part of a member's noise its losses can know anything about.

Noise on weights, by inputs. A call of the loss sees the noise `E` of a parameter only through `Y = X E`, `X: [T, I]`
being all rows that the parameter multiplied in that call. The projection `X^+ Y` of `E` on those rows may therefore
stand for `E` in the estimate: to first order in std its expectation is the same for any loss of that call, and its
variance falls from `I * O` to `rank(X) * O` per parameter. `Y` is the noise's own product, so no family needs to know.
The difference of antithetic partners' losses on the same samples knows, to second order, `E`'s product with the mean of
their rows: a pair is one call with that.

Noise on outputs (`nesjax.Node`), by positions. A product `y = x W + std xi` gives `sum_t c_t x_t xi_t^T`, where the
credit `c_t` of position t is the call's loss; or, of losses per token, `c_t = sum_{u >= t} discount^(u - t) loss_u`. In
a causal model no other loss can depend on `xi_t`, so with discount 1 that is exact.

Letters: `n` calls (members, times samples), `T` rows or tokens, `I`/`O` contracted and remaining sizes of the noise.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .noise.base import accumulator
from .population import Leaf
from .taps import Output, Reaped, Rows

Uses = tuple[Rows, ...]  # of one parameter
RIDGE, SHIFT = 1e-10, 1e-6  # of the longest row's squared length: what is left of a row that those before it explain


class CreditWarning(UserWarning):
    """`credit="inputs"` gives a matrix the plain estimate: right, but it learns less from each evaluation."""


def credited_rows(reaped: Reaped, leaves: tuple[Leaf, ...]) -> tuple[dict[str, Uses], dict[str, str]]:
    """The uses of each parameter that can be credited, and for each other perturbed one the reason.

    Raises:
      ValueError: one with noise on outputs can't be.
    """
    rows, reasons = {}, {}
    for leaf in leaves:
        if leaf.family is not None:
            found = _outputs(leaf, reaped) if leaf.on_outputs else _joined(leaf, reaped)
            (reasons if isinstance(found, str) else rows)[leaf.path] = found
    return rows, reasons


def _outputs(leaf: Leaf, reaped: Reaped) -> Uses:
    """All products of a parameter with noise on outputs."""
    uses = tuple(rows for rows, _ in reaped.rows.get(leaf.path, ()))
    reason = reaped.lost.get(leaf.path) or (None if uses else "never multiplied")
    if any(use.kind.scans.count(True) + use.kind.stack != leaf.axes for use in uses):
        reason = "its stack is indexed (scan over it instead)"
    if reason:
        raise ValueError(
            f"parameter {leaf.path} has noise on outputs ({leaf.family}) that can't be credited: {reason}."
        )
    return uses


def _joined(leaf: Leaf, reaped: Reaped) -> Uses | str:
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
    return (Rows(x, jnp.concatenate([use.y for use in uses], -2), kind),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CreditedSum:
    """The credited sum of one parameter's noise, of its shape (stack axes in front), in float32.

    Attributes:
      total: the sum.
      power: the squared length that the weights would give it if they had nothing to do with the noise.
    """

    total: jax.Array
    power: jax.Array


def mean_of_partners(uses: Uses) -> Uses:
    """The mean rows of antithetic partners, which stand side by side; `Y` is the noise's product with them too."""
    # XLA on a CPU forms the outputs' means together with the outputs if they are slices, the inputs' as a reduction.
    inputs, outputs = lambda x: x.reshape(-1, 2, *x.shape[1:]).mean(1), lambda y: (y[0::2] + y[1::2]) / 2
    return tuple(dataclasses.replace(use, x=inputs(use.x), y=outputs(use.y)) for use in uses)


def credited_sum(leaf: Leaf, uses: Uses, weights: jax.Array, discount: float = 1.0, agree: int = 1) -> CreditedSum:
    """The sum of what each call's loss, or each token's, can know of the noise.

    Args:
      leaf: the parameter.
      uses: what it multiplied; each leaf with a leading axis `n`.
      weights: `[n]`, or of losses per token `[n, T]`.
      discount: of later tokens' losses.
      agree: the number of calls, side by side, of the same noise (partners of which each has a part of the weight).
    """
    if leaf.on_outputs:
        sums = zip(*(_sum_of_outputs(leaf, use, weights, discount) for use in uses))
        total, power = (functools.reduce(jnp.add, parts) for parts in sums)
        return CreditedSum(total, agree * power)
    (rows,) = uses
    dtype = accumulator(weights.dtype)
    one = lambda x, y: _sum_taken(leaf, x, y, weights) if rows.kind.take else _sum_projected(x, y, weights)
    for _ in range(leaf.axes):
        one = jax.vmap(one, 1)
    total = one(rows.x, rows.y.astype(dtype))
    order = (*rows.kind.inside, *rows.kind.free)
    total = total.reshape(*leaf.stack, *(leaf.noise_shape[axis] for axis in order))
    total = total.transpose(*range(leaf.axes), *(leaf.axes + order.index(axis) for axis in range(len(order))))
    return CreditedSum(total, agree * rows.y[0].size * jnp.sum(jnp.square(weights.astype(dtype))))


def _sum_of_outputs(leaf: Leaf, use: Rows, weights: jax.Array, discount: float) -> tuple[jax.Array, jax.Array]:
    """`sum c x xi^T` over calls and positions, and its squared length if the credits were chance."""
    kind: Output = use.kind
    credits = _credits(leaf, use, weights.astype(use.y.dtype), discount)
    is_indices = jnp.issubdtype(use.x.dtype, jnp.integer)
    x = use.x if is_indices else jnp.where(jnp.isfinite(use.x), use.x, 0).astype(use.y.dtype)

    def over_calls(product, in_w):
        for layer in reversed(kind.scans):
            product = jax.vmap(product, (0, in_w if layer else None))
        return jax.vmap(product, (0, None))

    read = kind.view.dense
    for _ in range(kind.stack):
        read = jax.vmap(read)
    outputs = over_calls(lambda x, w: kind.apply(x, _free_first(kind, read(w))), 0)
    # Made of the weights, as it may differ between devices like them.
    parameter = jnp.zeros_like(weights, use.y.dtype, leaf.stack + leaf.noise_shape)
    (total,) = jax.linear_transpose(lambda w: outputs(x, w), parameter)(credits * use.y)
    if is_indices:  # of 1 and 0 in place of x
        return total, jnp.sum(jnp.broadcast_to(credits, use.y.shape) ** 2)
    sizes = [*leaf.stack[leaf.axes - kind.stack :], *kind.view.sizes]
    ones = jnp.ones([1 if axis in kind.own else size for axis, size in enumerate(sizes)], x.dtype)
    lengths = over_calls(kind.apply, None)(x**2, ones)
    return total, jnp.sum(credits**2 * lengths) * (use.y.size // lengths.size)


def _free_first(kind: Output, w: jax.Array) -> jax.Array:
    """`w`, whose transpose forms a sum with the free axes first, as a product gives it, and only then puts them right.

    Else XLA on a CPU folds the transposition into a slower product.
    """
    order = sorted(range(w.ndim), key=lambda axis: (axis >= kind.stack, axis not in kind.own))
    return jax.lax.optimization_barrier(w.transpose(order)).transpose(np.argsort(order)) if kind.own else w


def _credits(leaf: Leaf, use: Rows, weights: jax.Array, discount: float) -> jax.Array:
    """The credit of each position, in an array that broadcasts against `use.y`."""
    if weights.ndim == 1:
        return weights.reshape(-1, *(1,) * (use.y.ndim - 1))
    lead = 1 + len(use.kind.scans)  # axes in front of the product's own
    steps = [at for at, layer in enumerate(use.kind.scans, 1) if not layer]
    positions = {at: use.y.shape[at] for at in (*steps, *(at + lead for at in use.kind.rows))}
    tokens = [at for at, size in positions.items() if size == weights.shape[1]]
    if len(tokens) != 1:
        raise ValueError(
            f'credit="tokens": loss_fn returns {weights.shape[1]} losses, so one axis of the positions at which '
            f"parameter {leaf.path} is multiplied must have that length, got {list(positions.values())}."
        )
    later = lambda after, loss: (loss + discount * after,) * 2
    _, credits = jax.lax.scan(later, jnp.zeros_like(weights[:, 0]), weights.T, reverse=True)
    return jnp.expand_dims(credits.T, [at for at in range(1, use.y.ndim) if at != tokens[0]])


def _sum_projected(x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_n weights[n] X_n^+ Y_n`: `[I, O]` of `x: [n, T, I]`, `y: [n, T, O]`."""
    if x.shape[1] == 1:
        x, y = x[:, 0].astype(y.dtype), _finite(y[:, 0])
        length = jnp.sum(x**2, -1)
        scale = jnp.where(length > 0, weights / jnp.where(length > 0, length, 1), 0)[:, None]
        # Written as a CPU's product reads it: else XLA folds the transposition into a slower product.
        return jax.lax.optimization_barrier(jnp.where(scale != 0, x * scale, 0).T) @ y
    x, y = _finite(x).astype(y.dtype), _finite(y)
    product = functools.partial(jnp.matmul, precision="highest")
    first = _orthonormal(x, shift=SHIFT)
    x = product(first, x)
    again = _orthonormal(x, least=RIDGE / SHIFT)
    y = product(product(again.mT, product(again, first)), y)
    return jnp.einsum("nti,nto->io", x, weights[:, None, None] * y)


def _orthonormal(x: jax.Array, *, shift: float = 0.0, least: float = 0.0) -> jax.Array:
    """`S: [n, T, T]` whose `S X` has orthonormal rows; zeros for a row of which little is left beside those before it.

    Cholesky's way, row by row and without LAPACK, whose batched solves block jaxlib's threads on a CPU. Where rows
    nearly depend on each other it takes two passes, the first with its diagonal shifted (shifted Cholesky QR, Fukaya et
    al., SIAM J. Sci. Comput. 2020), to be as exact as a QR in float32.

    Args:
      x: `[n, T, I]`.
      shift, least: what is added to the rows' squared lengths, and what must be left, of the longest row's.
    """
    inner = jnp.einsum("nti,nsi->tsn", x, x, precision="highest")
    longest = jnp.einsum("ttn->tn", inner).max(0)

    def row(s, t):
        along = jnp.einsum("usn,sn->un", s, inner[t], precision="highest")
        rest = jnp.expand_dims(jnp.arange(len(s)) == t, 1) - jnp.einsum("un,usn->sn", along, s, precision="highest")
        left = inner[t, t] + shift * longest - jnp.sum(along**2, 0)
        adds = left > least * longest
        return s.at[t].set(rest * jnp.where(adds, jax.lax.rsqrt(jnp.where(adds, left, 1)), 0)), None

    s, _ = jax.lax.scan(row, jnp.zeros_like(inner), jnp.arange(x.shape[1]))
    return jnp.moveaxis(s, -1, 0)


def _finite(z: jax.Array) -> jax.Array:
    """A call that failed has weight 0, but may have multiplied infinities."""
    return jnp.where(jnp.isfinite(z), z, 0)


def _sum_taken(leaf: Leaf, indices: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """The same where rows are looked up, `indices: [n, T]`: one that is looked up twice counts once."""
    times = (indices[:, :, None] == indices[:, None, :]).sum(-1)
    total = jnp.zeros_like(y, shape=(leaf.noise_shape[0], y.shape[-1]))
    return total.at[indices].add(weights[:, None, None] * _finite(y) / times[..., None])


def describe_rows(found: Uses | str) -> str:
    """What `nesjax.describe` says of a parameter's credit."""
    if isinstance(found, str):
        return f"plain: {found}"
    if isinstance(found[0].kind, Output):
        kept = sum(array.size * array.dtype.itemsize for use in found for array in (use.x, use.y))
        return f"{sum(use.y.size for use in found):,} outputs, {kept:,} bytes kept"
    (rows,) = found
    inputs = "looked up" if rows.kind.take else f"of {rows.x.shape[-1]} inputs"
    return f"{rows.y.shape[-2]} row{'s' * (rows.y.shape[-2] > 1)} {inputs}"
