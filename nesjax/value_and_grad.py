"""`jax.value_and_grad` by evolution: what the training step is made of."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .checks import check_options, checked_key, instance_of
from .devices import NO_AXIS, Axis
from .forward import argument_names, over_members, perturbed
from .gradient import as_params, gradient_of
from .members import Noise, sample_noise, with_sign
from .population import Population
from .shaping import Baseline, Shaping, member_weights


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
    loss_fn: Callable, population: Population, *, shaping: Shaping | None = None, baseline: Baseline = "mean",
    in_axes: Any = None, has_aux: bool = False, strict: bool = False, axis: Axis = NO_AXIS,
) -> Callable[..., Estimate]:  # fmt: skip
    """`(params, key, args, step) -> Estimate`: what `value_and_grad` and `make_train_step` are made of.

    It runs on each device of `axis`, with that device's slices of the mapped arguments.
    """
    check_options(shaping, baseline)
    instance_of(Population, "population", population)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, *args), got {loss_fn!r}.")

    def scalar_loss(params, *args):
        out: Any = loss_fn(params, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"loss_fn must return (loss, aux) with has_aux=True, got {type(out).__name__}.")
        loss, aux = out if has_aux else (out, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, numbers.Number):
            raise TypeError(f"loss_fn must return a scalar ((loss, aux) with has_aux=True), got {type(loss).__name__}.")
        shape = getattr(loss, "shape", ())
        if shape != ():
            raise ValueError(f"loss_fn must return a scalar for each member, got shape {shape}.")
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
        losses, aux = over_members(noise, one, args, in_axes, shard, argument_names(loss_fn))
        compared = losses
        if baseline == "unperturbed":
            compared = losses - over_members(noise, unperturbed, args, in_axes, shard)
        losses, compared = axis.gather(losses), axis.gather(compared)
        weights = member_weights(compared, shaping, baseline, population.group_size, population.antithetic)
        grads = gradient_of(noise, weights, shaping is not None, axis)
        return Estimate(losses, aux, as_params(noise, grads.parts), grads.norm(), grads.snr(), noise)

    return estimate


def value_and_grad(
    loss_fn: Callable, population: Population, *, shaping: Shaping | None = None, baseline: Baseline = "mean",
    in_axes: Any = None, has_aux: bool = False, mesh: Mesh | None = None, axis_name: str | None = None,
    strict: bool = False,
) -> Callable:  # fmt: skip
    """`jax.value_and_grad` by evolution: `loss, grads = es_grad(params, key, *args)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar` (or `(scalar, aux)`), any JAX function; nothing of it is
        differentiated. It sees one member.
      population: size, std and noise.
      shaping, baseline: as in `estimate_gradient`; also baseline "unperturbed": the loss of the unperturbed
        parameters on the same samples, also before a shaping (nearly doubles the forward pass; the best choice when
        each member has its own).
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
    axis = Axis.of(mesh, axis_name, instance_of(Population, "population", population))
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
