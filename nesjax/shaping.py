"""From losses to the weights of members. Losses are minimised: for rewards pass `-returns`.

A shaping function maps one group's losses `[n]` to weights `[n]` that grow with the loss. It gets +inf for members that
failed; a weight that is not finite counts as zero. Shaped weights are scale-free, so lr and std don't couple.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from .checks import positive_int

Shaping = Callable[[jax.Array], jax.Array]
Baseline = Literal["mean", "leave_one_out", "unperturbed"] | None


def _worst(losses: jax.Array) -> jax.Array:
    """Turns every loss that is not finite (-inf too) into +inf, in at least float32."""
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


def _unit(losses: jax.Array) -> jax.Array:
    """Maps the finite losses to [0, 1], where no scale over- or underflows; equal ones to 0. Failed ones stay +inf."""
    finite = jnp.isfinite(losses)
    low = jnp.where(finite, losses, jnp.inf).min()
    width = jnp.where(finite, losses, -jnp.inf).max() - low
    return jnp.where(finite, (losses - low) / jnp.where(width > 0, width, 1), jnp.inf)


def _moments(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the finite losses; 0 where there are none."""
    finite = jnp.isfinite(losses)
    count = jnp.maximum(finite.sum(), 1)
    mean = jnp.where(finite, losses, 0).sum() / count
    return mean, jnp.sqrt(jnp.where(finite, losses - mean, 0) ** 2 @ jnp.ones_like(losses) / count)


def centered_rank(losses: jax.Array) -> jax.Array:
    """Ranks losses from -0.5 (best) to 0.5 (worst). Equal losses share their average rank, failed members the worst.

    Source: OpenAI-ES, arXiv:1703.03864, section 2 (fitness shaping by ranks).

    Args:
      losses: one group's, `[n]`.

    Returns:
      Weights `[n]`.

    Example:
      >>> centered_rank(jnp.array([3.0, 1.0, jnp.nan, 1.0, 2.0])).tolist()
      [0.25, -0.375, 0.5, -0.375, 0.0]
    """
    losses = _worst(losses)
    order = jnp.sort(losses)
    rank = (jnp.searchsorted(order, losses, side="left") + jnp.searchsorted(order, losses, side="right") - 1) / 2
    return (rank / max(losses.size - 1, 1) - (0.5 if losses.size > 1 else 0.0)).astype(losses.dtype)


def standardize(losses: jax.Array) -> jax.Array:
    """Scales losses to zero mean and unit variance over the finite ones. Failed members and equal losses weigh zero.

    Args:
      losses: one group's, `[n]`.

    Returns:
      Weights `[n]`.

    Example:
      >>> standardize(jnp.array([1.0, 3.0, jnp.inf])).tolist()
      [-1.0, 1.0, 0.0]
    """
    losses = _unit(_worst(losses))
    mean, deviation = _moments(losses)
    scaled = (losses - mean) / jnp.where(deviation > 0, deviation, 1)
    return jnp.where(jnp.isfinite(losses) & (deviation > 0), scaled, 0)


def _pairs(name: str, losses: jax.Array) -> jax.Array:
    if losses.size % 2:
        raise ValueError(
            f"{name} compares members 2j and 2j + 1: the number of losses must be even, got {losses.size}."
        )
    return _worst(losses).reshape(-1, 2)


def pair_sign(losses: jax.Array) -> jax.Array:
    """Weighs the worse of members 2j and 2j + 1 by +1 and the better by -1; a tie or a failed partner weighs zero.

    Args:
      losses: one group's, `[n]`, with partners side by side, as under `antithetic=True`.

    Returns:
      Weights `[n]`.

    Raises:
      ValueError: the number of losses is odd.

    Example:
      >>> pair_sign(jnp.array([2.0, 1.0, 5.0, jnp.nan])).tolist()
      [1.0, -1.0, 0.0, 0.0]
    """
    first, second = _pairs("pair_sign", losses).T
    sign = jnp.where(jnp.isfinite(first) & jnp.isfinite(second), jnp.sign(first - second), 0)
    return jnp.stack([sign, 0 - sign], -1).reshape(-1)


def top_k(k: int) -> Shaping:
    """Keeps the `k` pairs whose better member is best, weighed by loss differences over the kept losses' deviation.

    Source: ARS, arXiv:1803.07055, algorithm 2 (V1-t): `(L+ - L-) / (k * deviation)` for each pair kept.

    Args:
      k: number of pairs kept per group.

    Returns:
      A shaping function.

    Raises:
      ValueError: `k` is not a whole number of at least 1, or (when the shaping is used) a group has fewer pairs.

    Example:
      >>> top_k(1)(jnp.array([2.0, 1.0, 9.0, 5.0])).tolist()
      [4.0, -4.0, 0.0, 0.0]
    """
    if isinstance(k, jax.Array):
        raise TypeError("shaping must be nesjax.top_k(k), with a number of pairs: top_k was not called.")
    positive_int("top_k k", k)

    def shaping(losses: jax.Array) -> jax.Array:
        pairs = _pairs("top_k", losses)
        if k > len(pairs):
            raise ValueError(f"top_k k must be at most the {len(pairs)} pairs of a group, got {k}.")
        whole = jnp.isfinite(pairs).all(-1)
        best = jnp.argsort(jnp.where(whole, pairs.min(-1), jnp.inf))[:k]
        kept = jnp.zeros(len(pairs), bool).at[best].set(True) & whole
        pairs = _unit(jnp.where(kept[:, None], pairs, jnp.inf))
        _, deviation = _moments(pairs.reshape(-1))
        halves = jnp.where(kept, pairs[:, 0] - pairs[:, 1], 0) / 2
        halves = halves * losses.size / (k * jnp.where(deviation > 0, deviation, 1))
        return jnp.stack([halves, 0 - halves], -1).reshape(-1)

    return shaping


def centered(losses: jax.Array, baseline: Baseline, antithetic: bool) -> jax.Array:
    """Subtracts a baseline from one group's losses, in loss units. Failed members and their partners weigh zero."""
    finite = jnp.isfinite(losses)
    if antithetic:
        finite = jnp.repeat(finite.reshape(-1, 2).all(-1), 2)
    count = finite.sum()
    if baseline in ("mean", "leave_one_out"):
        losses = losses - jnp.where(finite, losses, jnp.inf).min()  # equal losses are exactly 0
        losses = losses - jnp.where(finite, losses, 0).sum() / jnp.maximum(count, 1)
        if baseline == "leave_one_out":  # L_i - mean of the others
            losses = losses * count / jnp.maximum(count - 1, 1)
    return jnp.where(finite, losses, 0)


def member_weights(
    losses: jax.Array, shaping: Shaping | None, baseline: Baseline, group_size: int, antithetic: bool
) -> jax.Array:
    """Turns losses `[N]` into weights `[N]`, group by group (one group of all members if `group_size` is 1)."""

    def each(weigh):
        return weigh(losses) if group_size == 1 else jax.vmap(weigh)(losses.reshape(-1, group_size)).reshape(-1)

    if shaping is None:
        return each(lambda group: centered(group, baseline, antithetic))

    def shaped(group):
        weights, n = shaping(group), group.size
        if jnp.shape(weights) != group.shape:
            raise ValueError(f"shaping must map losses [{n}] to weights [{n}], got shape {jnp.shape(weights)}.")
        return jnp.where(jnp.isfinite(weights), weights, 0).astype(losses.dtype)

    def of_group(group):
        group = _worst(group)
        weights = shaped(group)
        if not antithetic:
            return weights
        # Where a failed member weighs nothing, its partner has nothing to be compared with.
        lost = (~jnp.isfinite(group) & (weights == 0)).reshape(-1, 2).any(-1).repeat(2)
        return jnp.where(lost, 0, shaped(jnp.where(lost, jnp.inf, group)))

    return each(of_group)
