"""From losses and noise to a gradient, by hand and as an optax transformation.

A member is `params + std * sign_i * E_i`. In loss units (no shaping) the gradient is
`sum_i w_i sign_i E_i / (N * std)`, an estimate of the gradient of the loss smoothed by the noise (Wierstra et al.,
NES, JMLR 2014, eq. 3; OpenAI-ES, arXiv:1703.03864, eq. 1). Shaped weights are scale-free: `sum_i w_i sign_i E_i / N`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .checks import check_options, checked_losses, instance_of
from .credit import CreditedSum
from .devices import NO_AXIS, Axis
from .members import Noise
from .noise import NoiseFamily
from .noise.base import accumulator
from .population import Leaf, Population, alike
from .shaping import Baseline, Shaping, member_weights

EMPTY: Mapping[str, CreditedSum] = MappingProxyType({})


def sum_drawn(
    noise: Noise, own: tuple, weights: jax.Array, factors: Sequence[Any], skip: Collection[str] = ()
) -> list[jax.Array]:
    """Sums `factor * weights[k] E_k` of each parameter, in float32, over directions whose parts `own` were drawn.

    Parameters that are frozen, or whose path is in `skip`, get zeros.

    Args:
      noise: the `Noise` of this generation.
      own: what `noise.direction` returns, with a leading axis `n` on every leaf.
      weights: `[n]`.
      factors: one of each parameter. It goes to the weights, which are fewer than the sum's entries.
    """

    def of_entry(leaf, weights, shared, own):
        total = leaf.family.weighted_sum(shared, own, leaf.noise_shape, weights)
        if total is NotImplemented:
            return NoiseFamily.weighted_sum(leaf.family, shared, own, leaf.noise_shape, weights)
        return total

    def of_leaf(leaf, factor, shared, own):
        sum_entry = functools.partial(of_entry, leaf, factor * weights)
        for _ in range(leaf.axes):
            sum_entry = jax.vmap(sum_entry, (0, 1))
        return sum_entry(shared, own)

    def stacked(parts, places, axis):
        return jax.tree.map(lambda *x: jnp.stack(x, axis), *(parts[at] for at in places))

    sums: list[Any] = [None] * len(noise.leaves)
    for places in alike(noise.leaves):
        leaf = noise.leaves[places[0]]
        if leaf.family is None or all(noise.leaves[at].path in skip for at in places):
            totals = [_zeros(leaf, weights)] * len(places)
        elif len(places) == 1:
            totals = [of_leaf(leaf, *(parts[places[0]] for parts in (factors, noise.shared, own)))]
        else:  # as they lie in what was drawn, members first
            parts = [stacked(parts, places, axis) for parts, axis in ((factors, 0), (noise.shared, 0), (own, 1))]
            totals = jax.vmap(functools.partial(of_leaf, leaf), (0, 0, 1))(*parts)
        for at, total in zip(places, totals):
            sums[at] = total
    return sums


def sum_directions(
    noise: Noise, indices: jax.Array, weights: jax.Array, factors: Sequence[Any], skip: Collection[str] = ()
) -> list[jax.Array]:
    """As `sum_drawn`, of the directions with these indices, which are drawn and summed in chunks."""

    def of_chunk(indices, weights):
        return sum_drawn(noise, jax.vmap(noise.direction)(indices), weights, factors, skip)

    count, chunk = weights.shape[0], noise.population.chunk_size
    chunk = count if chunk is None else max(1, chunk // noise.population.signs)
    if chunk >= count:
        return of_chunk(indices, weights)

    def add(sums, item):
        return jax.tree.map(jnp.add, sums, of_chunk(*item)), None

    chunks = -(-count // chunk)  # the last is filled up with what weighs nothing
    items = [jnp.pad(x, (0, chunks * chunk - count)).reshape(chunks, chunk) for x in (indices, weights)]
    return jax.lax.scan(add, [_zeros(leaf, weights) for leaf in noise.leaves], tuple(items))[0]


def _zeros(leaf: Leaf, weights: jax.Array) -> jax.Array:
    """Zeros of a parameter's shape, made of the weights: they may differ between devices."""
    return jnp.zeros_like(weights, accumulator(weights.dtype), leaf.stack + leaf.noise_shape)


def directions(population: Population, weights: jax.Array) -> jax.Array:
    """Weights of members, along the first axis, as weights of directions: an antithetic pair's difference."""
    return weights if population.signs == 1 else weights[0::2] - weights[1::2]


def as_params(noise: Noise, parts: list) -> Any:
    """A tree like params of what is computed with stack axes in front."""
    return noise.treedef.unflatten(
        [p.transpose(leaf.permutation).astype(leaf.dtype) for p, leaf in zip(parts, noise.leaves)]
    )


def weighted_sum(noise: Noise, weights: jax.Array) -> Any:
    """`sum_i weights[i] * (member_i - params)`: NESgpu's set_grad, with std in it.

    Args:
      noise: the generation's, from `sample_noise`.
      weights: `[N]`.

    Returns:
      A tree like params.

    Raises:
      ValueError: weights of another shape, or a parameter has noise on outputs (`Node`).

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> population = nesjax.Population(size=2, std=0.5, antithetic=True)
      >>> noise = nesjax.sample_noise(jax.random.key(0), jnp.zeros(3), population)
      >>> abs(nesjax.weighted_sum(noise, jnp.array([1.0, -1.0]))).tolist()
      [1.0, 1.0, 1.0]
    """
    population = instance_of(Noise, "noise", noise).population
    weights = directions(population, checked_losses("weights", weights, population.size))
    return as_params(noise, sum_directions(noise, jnp.arange(weights.size), weights, noise.std))


class Gradient(NamedTuple):
    """A descent-ready gradient and its noise level.

    Attributes:
      parts: one float32 array per parameter.
      noise: expected squared norm of the gradient if the weights were independent of the perturbations (no signal).
    """

    parts: list[jax.Array]
    noise: jax.Array

    def norm(self) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(part**2) for part in self.parts))

    def snr(self) -> jax.Array:
        """The cosine to be expected between the gradients of two random halves of the population: 0 if all is noise.

        For halves A + B = G, `A.B = (|G|^2 - |A - B|^2) / 4`, and `|A - B|^2` is `noise` on average over the halves. So
        no half is formed, and none crosses devices.
        """
        length = sum(jnp.sum(part**2) for part in self.parts)
        return jnp.where(length > 0, (length - self.noise) / jnp.where(length > 0, length + self.noise, 1), 0)


def gradient_of(
    noise: Noise, weights: jax.Array, shaped: bool, axis: Axis = NO_AXIS, credited: Mapping[str, CreditedSum] = EMPTY
) -> Gradient:
    """The gradient of members' weights `[N]`, or of their calls' `[N, K]`.

    Each device of `axis` sums its own members, then there is one psum. `credited` holds this device's sums of those
    parameters that are credited by their inputs, by path.
    """
    weights = directions(noise.population, weights)
    per_call = weights.reshape(len(weights), -1) / (weights.size // len(weights))
    of_direction = per_call.sum(-1)
    index, devices = axis.shard(noise.population)
    count = len(weights) // devices
    scales = [noise.population.size * (1.0 if shaped else jnp.where(std > 0, std, 1)) for std in noise.std]
    factors = [jnp.where(std > 0, 1 / scale, 0) for std, scale in zip(noise.std, scales)]  # no noise, no information
    mine = index * count + jnp.arange(count)
    sums = sum_directions(noise, mine, jax.lax.dynamic_slice_in_dim(of_direction, mine[0], count), factors, credited)

    def sum_of(leaf, factor, total):
        return factor * credited[leaf.path].total if leaf.path in credited else total

    def noise_of(leaf, factor, part):
        if leaf.path in credited:
            return factor**2 * powers[leaf.path]
        return part.size * jnp.sum((factor * of_direction) ** 2)

    here = [None if leaf.family is None else sum_of(leaf, *found) for leaf, *found in zip(noise.leaves, factors, sums)]
    totals, powers = axis.sum((here, {path: found.power for path, found in credited.items()}))  # of what is not frozen
    parts = [jnp.zeros(x.shape, x.dtype) if total is None else total for x, total in zip(sums, totals)]
    return Gradient(parts, jnp.sum(jnp.stack(list(map(noise_of, noise.leaves, factors, parts)))))


def estimate_gradient(
    noise: Noise, losses: jax.Array, *, shaping: Shaping | None = None, baseline: Baseline = "mean"
) -> Any:
    """The gradient from the members' losses, ready for descent.

    Args:
      noise: the generation's, from `sample_noise`.
      losses: `[N]`, minimised; integers and bools are cast. Non-finite ones rank worst with `centered_rank` and
        otherwise weigh zero, as does an antithetic partner.
      shaping: None (loss units), `centered_rank`, `standardize`, `pair_sign`, `top_k(k)` or any function `[N] -> [N]`.
      baseline: subtracted from the losses, within each group: None, "mean" or "leave_one_out" (which is unbiased). A
        shaping centres by itself: with it "mean" subtracts nothing, and "leave_one_out" is refused. For
        the unperturbed network's loss subtract it yourself, with baseline=None.

    Returns:
      A tree like params, in its dtypes.

    Raises:
      ValueError: losses of another shape, an unknown baseline, or a parameter has noise on outputs (`Node`).

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = jnp.array([1.0, -2.0])
      >>> population = nesjax.Population(size=4096, std=0.1, antithetic=True)
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, population)
      >>> losses = nesjax.population_apply(lambda p: jnp.sum(p**2), params, noise)
      >>> nesjax.estimate_gradient(noise, losses).round().tolist()  # of sum(p**2): 2 p
      [2.0, -4.0]
    """
    if baseline == "unperturbed":
        raise ValueError('baseline="unperturbed" needs the loss function: use value_and_grad, or subtract the losses.')
    check_options(shaping, baseline)
    population = instance_of(Noise, "noise", noise).population
    losses = checked_losses("losses", losses, population.size)
    weights = member_weights(losses, shaping, baseline, population.group_size, population.antithetic)
    return as_params(noise, gradient_of(noise, weights, shaping is not None).parts)


def from_losses(
    *, shaping: Shaping | None = None, baseline: Baseline = "mean"
) -> optax.GradientTransformationExtraArgs:
    """`estimate_gradient` as the first link of an optax chain: `tx.update(noise, state, params, losses=losses)`.

    Args:
      shaping, baseline: as in `estimate_gradient`.

    Returns:
      An optax transformation whose `update` takes the `Noise` in place of updates, and `losses=`, `[N]`.

    Raises:
      ValueError or TypeError: as `estimate_gradient`, or `update` got no noise or no losses.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax, optax
      >>> tx = optax.chain(nesjax.from_losses(shaping=nesjax.centered_rank), optax.sgd(0.1))
      >>> params = jnp.zeros(3)
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=4, std=0.1))
      >>> updates, state = tx.update(noise, tx.init(params), params, losses=jnp.arange(4.0))
      >>> updates.shape
      (3,)
    """
    check_options(shaping, baseline)

    def update(updates, state, params=None, *, losses=None, **extra):
        if not isinstance(updates, Noise):
            raise TypeError(f"from_losses takes the noise in place of updates, got {type(updates).__name__}.")
        if losses is None:
            raise ValueError("from_losses needs losses=..., the members' losses [N].")
        if params is not None:
            updates.check("params", params)
        return estimate_gradient(updates, losses, shaping=shaping, baseline=baseline), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
