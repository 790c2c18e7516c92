"""`jax.value_and_grad` by evolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from .checks import checked_key, instance_of
from .devices import Axis
from .estimate import Estimator, mean_loss
from .population import Population
from .shaping import Baseline, Shaping


def value_and_grad(
    loss_fn: Callable, population: Population, *, shaping: Shaping | None = None, baseline: Baseline = "mean",
    in_axes: Any = None, has_aux: bool = False, credit: str | None = None, samples: int | None = None,
    discount: float = 1.0, mesh: Mesh | None = None, axis_name: str | None = None, strict: bool = False,
) -> Callable:  # fmt: skip
    """`jax.value_and_grad` by evolution: `loss, grads = es_grad(params, key, *args)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar` (or `(scalar, aux)`), any JAX function; nothing of it is
        differentiated. It sees one member.
      population: size, std and noise.
      shaping, baseline: as in `estimate_gradient`; also baseline "unperturbed": the loss of the unperturbed
        parameters on the same samples, also before a shaping (nearly doubles the forward pass; the best choice when
        each member has its own).
      in_axes: as in `jax.vmap`, over `args`: None for what all members share, 0 for one slice per member (or group).
      has_aux: `loss_fn` returns `(loss, aux)`.
      credit: "inputs": the part of a member's noise that its call of the loss can know anything about, the projection
        on the inputs that each parameter multiplied, stands for the noise (see `nesjax.credit`). It needs several times
        fewer evaluations where a call multiplies few rows (one sample per call); parameters that have no such rows, or
        as many as inputs, get the plain estimate, with a `CreditWarning`. With `chunk_size`, weights that need all
        losses (ranks, or the mean over the population without pairs) cost a second forward pass. Antithetic partners
        need the same samples, as their losses' difference is credited: best by `group_size=2`, which makes a pair one
        call; slices that merely repeat cost more.
        "tokens": `loss_fn` returns losses `[T]`, one a token, of a causal model. Parameters with noise on outputs
        (`Node`) are credited position by position; the others get the plain estimate of the mean loss. The position
        of a product is its index along the one axis of length T among those axes of its output (or scans around it)
        that are not the parameter's own; none or several such axes are an error.
      samples: K, the number of calls of the loss per member, on K slices: mapped arguments are `[N, K, ...]`. Losses
        are averaged, or with `credit` credited one by one (baselines and shaping then compare members sample by
        sample).
      discount: with credit="tokens", position t is credited with `sum_{u >= t} discount^(u - t) loss_u`; in [0, 1].
      mesh: devices to spread the population over; arguments are split as `in_axes` says, and aux stays sharded.
      axis_name: which of the mesh's axes, if it has several (the others stay the compiler's); without a mesh, the axis
        of the `jax.pmap` or `jax.shard_map` that the function is used in.
      strict: see `perturbed`.

    Returns:
      A pure function `(params, key, *args, step=None, std=None) -> (loss, grads)`, or `((loss, aux), grads)` with aux
      stacked `[N, ...]` (`[N, K, ...]` with `samples`). `loss` is the mean of the finite losses; `grads` is like params
      and ready for descent. `step` is where schedules in `population.std` are taken; `std` overrides them (see
      `sample_noise`). Wrap it in `jax.jit`.

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
    estimate = Estimator(
        loss_fn, population, shaping=shaping, baseline=baseline, in_axes=in_axes, has_aux=has_aux, strict=strict,
        credit=credit, samples=samples, discount=discount, axis=axis,
    )  # fmt: skip

    def generation(params, whole, args):
        key, step, std = whole
        result = estimate(params, key, args, step, std)
        return result.grads, mean_loss(result.losses), result.aux

    run = generation if mesh is None else axis.spread(generation, population, in_axes)

    def es_grad(params, key, *args, step=None, std=None):
        grads, loss, aux = run(params, (checked_key(key), step, std), args)
        return (loss, aux) if has_aux else loss, grads

    return es_grad
