"""From losses and noise to a gradient: by hand, as `jax.value_and_grad`, and as an optax transformation.

A member is `params + std * sign_i * E_i`. In loss units (no shaping) the gradient is
`sum_i w_i sign_i E_i / (N * std)`, an estimate of the gradient of the loss smoothed by the noise (Wierstra et al.,
NES, JMLR 2014, eq. 3; OpenAI-ES, arXiv:1703.03864, eq. 1). Shaped weights are scale-free: `sum_i w_i sign_i E_i / N`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .devices import NO_AXIS, Axis
from .fitness import Shaping, member_weights
from .forward import over_members, perturbed
from .members import Noise, checked_key, checked_noise, sample_noise, with_sign
from .noise.base import accumulator
from .population import Population, checked_population

BASELINES = (None, "mean", "leave_one_out", "unperturbed")


def checked_losses(name: str, values: Any, population: Population) -> jax.Array:
    """`values: [N]` in at least float32; raises ValueError for another shape, TypeError for complex numbers."""
    values = jnp.asarray(values)
    if values.shape != (population.size,):
        raise ValueError(f"{name} must have shape ({population.size},), one a member, got {values.shape}.")
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {values.dtype}.")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def check_options(shaping: Any, baseline: Any) -> None:
    """Raises for a baseline or shaping that doesn't exist."""
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}.")
    if shaping is not None and not callable(shaping):
        raise TypeError(f"shaping must be None or a function of losses (nesjax.centered_rank ...), got {shaping!r}.")


def sum_directions(noise: Noise, indices: jax.Array, weights: jax.Array) -> list[jax.Array]:
    """`sum_k weights[k] E_{indices[k]}` of each parameter, in float32; drawn and summed in chunks."""

    def zeros(leaf):  # as the weights: they may differ between devices
        return jnp.zeros_like(weights, accumulator(weights.dtype), leaf.shape)

    def of_leaf(leaf, shared, own, weights):
        if leaf.family is None:
            return zeros(leaf)

        def of_entry(shared, own):
            return leaf.family.weighted_sum(shared, own, leaf.noise_shape, weights)

        for _ in range(leaf.axes):
            of_entry = jax.vmap(of_entry, (0, 1))
        return of_entry(shared, own)

    def of_chunk(indices, weights):
        own = jax.vmap(noise.direction)(indices)
        return [of_leaf(*item, weights) for item in zip(noise.leaves, noise.shared, own)]

    count, chunk = weights.shape[0], noise.population.chunk_size
    chunk = count if chunk is None else max(1, chunk // noise.population.signs)
    if chunk >= count:
        return of_chunk(indices, weights)

    def add(sums, item):
        return jax.tree.map(jnp.add, sums, of_chunk(*item)), None

    chunks = -(-count // chunk)  # the last is filled up with what weighs nothing
    items = [jnp.pad(x, (0, chunks * chunk - count)).reshape(chunks, chunk) for x in (indices, weights)]
    return jax.lax.scan(add, [zeros(leaf) for leaf in noise.leaves], tuple(items))[0]


def _directions(population: Population, weights: jax.Array) -> jax.Array:
    """Weights of members as weights of directions: an antithetic pair's difference."""
    return weights if population.signs == 1 else weights[0::2] - weights[1::2]


def _as_params(noise: Noise, parts: list) -> Any:
    return noise.treedef.unflatten([part.astype(leaf.dtype) for part, leaf in zip(parts, noise.leaves)])


def weighted_sum(noise: Noise, weights: jax.Array) -> Any:
    """`sum_i weights[i] * (member_i - params)`: NESgpu's set_grad, with std in it. A tree like params.

    Args:
      noise: of this generation.
      weights: `[N]`.

    Raises:
      ValueError: weights of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> population = nesjax.Population(size=2, std=0.5, antithetic=True)
      >>> noise = nesjax.sample_noise(jax.random.key(0), jnp.zeros(3), population)
      >>> abs(nesjax.weighted_sum(noise, jnp.array([1.0, -1.0]))).tolist()
      [1.0, 1.0, 1.0]
    """
    weights = checked_losses("weights", weights, checked_noise(noise).population)
    weights = _directions(noise.population, weights)
    sums = sum_directions(noise, jnp.arange(weights.size), weights)
    return _as_params(noise, [std * total for std, total in zip(noise.std, sums)])


class Gradient(NamedTuple):
    """A gradient, ready for descent, as a list of each parameter's in float32; and how much of it is noise.

    Attributes:
      parts: of each parameter.
      noise: the squared length that members' weights would give the gradient if they had nothing to do with the noise.
    """

    parts: list[jax.Array]
    noise: jax.Array

    def norm(self) -> jax.Array:
        return jnp.sqrt(sum(jnp.vdot(part, part) for part in self.parts))

    def snr(self) -> jax.Array:
        """The cosine to be expected between the gradients of two random halves of the population: 0 if all is noise.

        For halves A + B = G, `A.B = (|G|^2 - |A - B|^2) / 4`, and `|A - B|^2` is `noise` on average over the halves. So
        no half is formed, and none crosses devices.
        """
        length = sum(jnp.vdot(part, part) for part in self.parts)
        return jnp.where(length > 0, (length - self.noise) / jnp.where(length > 0, length + self.noise, 1), 0)


def gradient_of(noise: Noise, weights: jax.Array, shaped: bool, axis: Axis = NO_AXIS) -> Gradient:
    """The gradient of members' weights `[N]`; each device of `axis` sums its own members, then one psum."""
    weights = _directions(noise.population, weights)
    index, count = axis.shard(noise.population)
    mine = weights.size // count
    here = jax.lax.dynamic_slice_in_dim(weights, index * mine, mine)
    sums = sum_directions(noise, index * mine + jnp.arange(mine), here)
    totals = iter(axis.sum([total for total, leaf in zip(sums, noise.leaves) if leaf.family is not None]))

    def scaled(std, leaf):
        scale = noise.population.size * (1.0 if shaped else jnp.where(std > 0, std, 1))
        total = jnp.zeros(leaf.shape, accumulator(weights.dtype)) if leaf.family is None else next(totals)
        of_noise = total.size * jnp.sum((weights / scale) ** 2)
        return [jnp.where(std > 0, x, 0) for x in (total / scale, of_noise)]  # no noise, no information

    parts, of_noise = zip(*map(scaled, noise.std, noise.leaves))
    return Gradient(list(parts), sum(of_noise))


def estimate_gradient(
    noise: Noise, losses: jax.Array, *, shaping: Shaping | None = None, baseline: str | None = "mean"
) -> Any:
    """The gradient, ready for descent, from the members' losses. A tree like params, in its dtypes.

    Args:
      noise: of this generation.
      losses: `[N]`, minimised; integers and bools are cast. Non-finite ones rank worst with `centered_rank` and
        otherwise weigh zero, as does an antithetic partner.
      shaping: None (loss units), `centered_rank`, `standardize`, `pair_sign`, `top_k(k)` or any function `[N] -> [N]`.
      baseline: subtracted from the losses, within each group: None, "mean" or "leave_one_out" (which is unbiased). For
        the unperturbed network's loss subtract it yourself, with baseline=None.

    Raises:
      ValueError: losses of another shape, an unknown baseline.

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
    population = checked_noise(noise).population
    losses = checked_losses("losses", losses, population)
    weights = member_weights(losses, shaping, baseline, population.group_size, population.antithetic)
    return _as_params(noise, gradient_of(noise, weights, shaping is not None).parts)


def from_losses(
    *, shaping: Shaping | None = None, baseline: str | None = "mean"
) -> optax.GradientTransformationExtraArgs:
    """`estimate_gradient` as the first link of an optax chain: `tx.update(noise, state, params, losses=losses)`.

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


class Estimate(NamedTuple):
    """What one generation gave: losses `[N]`, aux of the members here, the gradient, its norm and SNR, the noise."""

    losses: jax.Array
    aux: Any
    grads: Any
    norm: jax.Array
    snr: jax.Array
    noise: Noise


def mean_loss(losses: jax.Array) -> jax.Array:
    """The mean of the finite losses; NaN if there are none."""
    finite = jnp.isfinite(losses)
    return jnp.where(finite, losses, 0).sum() / finite.sum()


def estimator(
    loss_fn: Callable, population: Population, *, shaping: Shaping | None = None, baseline: str | None = "mean",
    in_axes: Any = None, has_aux: bool = False, strict: bool = False, axis: Axis = NO_AXIS,
) -> Callable[..., Estimate]:  # fmt: skip
    """`(params, key, args, step) -> Estimate`: what `value_and_grad` and `make_train_step` are made of.

    It runs on each device of `axis`, with that device's slices of the mapped arguments.
    """
    check_options(shaping, baseline)
    checked_population(population)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, *args), got {loss_fn!r}.")

    def scalar_loss(params, *args):
        out = loss_fn(params, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"loss_fn must return (loss, aux) with has_aux=True, got {type(out).__name__}.")
        loss, aux = out if has_aux else (out, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, numbers.Number):
            raise TypeError(f"loss_fn must return a scalar ((loss, aux) with has_aux=True), got {type(loss).__name__}.")
        if jnp.shape(loss) != ():
            raise ValueError(f"loss_fn must return a scalar for each member, got shape {jnp.shape(loss)}.")
        if jnp.issubdtype(jnp.result_type(loss), jnp.complexfloating):
            raise TypeError(f"loss_fn must return a real loss, got {jnp.result_type(loss)}.")
        return jnp.asarray(loss, jnp.promote_types(jnp.result_type(loss), jnp.float32)), aux

    run = perturbed(scalar_loss, strict=strict)

    def estimate(params, key, args, step=None) -> Estimate:
        noise = sample_noise(key, params, population, step=step)
        shard = axis.shard(population)

        def one(own, sign, args):
            return run(params, with_sign(noise, own, sign), *args)

        def unperturbed(own, sign, args):
            return scalar_loss(params, *args)[0]

        params = axis.varying(params)
        losses, aux = over_members(noise, one, args, in_axes, shard)
        compared = losses
        if baseline == "unperturbed":
            compared = losses - over_members(noise, unperturbed, args, in_axes, shard)
        losses, compared = axis.gather(losses), axis.gather(compared)
        weights = member_weights(compared, shaping, baseline, population.group_size, population.antithetic)
        grads = gradient_of(noise, weights, shaping is not None, axis)
        return Estimate(losses, aux, _as_params(noise, grads.parts), grads.norm(), grads.snr(), noise)

    return estimate


def value_and_grad(
    loss_fn: Callable, population: Population, *, shaping: Shaping | None = None, baseline: str | None = "mean",
    in_axes: Any = None, has_aux: bool = False, mesh: Mesh | None = None, axis_name: str | None = None,
    strict: bool = False,
) -> Callable:  # fmt: skip
    """`jax.value_and_grad` by evolution: `loss, grads = es_grad(params, key, *args)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar` (or `(scalar, aux)`), any JAX function; nothing of it is
        differentiated. It sees one member.
      population: size, std and noise.
      shaping, baseline: as in `estimate_gradient`; also baseline "unperturbed": the loss of the unperturbed
        parameters on the same samples (nearly doubles the forward pass; the best choice when each member has its own).
      in_axes: as in `jax.vmap`, over `args`: None for what all members share, 0 for one slice a member (or a group).
      has_aux: `loss_fn` returns `(loss, aux)`.
      mesh: devices to spread the population over; arguments are split as `in_axes` says, and aux stays spread.
      axis_name: which of the mesh's axes, if it has several (the others stay the compiler's); without a mesh, the axis
        of the `jax.pmap` or `jax.shard_map` that the function is used in.
      strict: see `perturbed`.

    Returns:
      A pure function `(params, key, *args, step=None) -> (loss, grads)`, or `((loss, aux), grads)` with aux stacked
      `[N, ...]`. `loss` is the mean of the members' finite losses; `grads` is like params, ready for descent. `step` is
      where schedules in `population.std` are taken. Wrap it in `jax.jit`.

    Raises:
      ValueError or TypeError: at trace time, naming the argument.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean(jnp.sign(x @ w) != y)  # no gradient to backpropagate
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> y = jnp.sign(x[:, 0])
      >>> es_grad = jax.jit(nesjax.value_and_grad(loss_fn, nesjax.Population(size=512, std=0.5)))
      >>> loss, grads = es_grad(jnp.ones(4), jax.random.key(1), x, y)
      >>> grads.shape, bool(grads[0] < 0)
      ((4,), True)
    """
    axis = Axis.of(mesh, axis_name, checked_population(population))
    estimate = estimator(
        loss_fn, population, shaping=shaping, baseline=baseline, in_axes=in_axes, has_aux=has_aux, strict=strict,
        axis=axis,
    )  # fmt: skip

    def generation(whole, args):
        params, key, step = whole
        result = estimate(params, key, args, step)
        return (mean_loss(result.losses), result.grads), result.aux

    run = generation if mesh is None else axis.spread(generation, population, in_axes)

    def es_grad(params, key, *args, step=None):
        (loss, grads), aux = run((params, checked_key(key), step), args)
        return (loss, aux) if has_aux else loss, grads

    return es_grad
