"""The training state and the training step: pure functions for one device and for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .checks import check_optimizer, checked_key, instance_of, positive_int
from .devices import Axis
from .estimate import Estimate, Estimator, mean_loss
from .paths import check_arrays, named_leaves
from .population import Population
from .shaping import Baseline, Shaping


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from one step to the next.

    Attributes:
      params: the network's parameters.
      opt_state: the optimizer's state.
      key: the run's key; a generation's noise comes from (key, step).
      step: number of generations done, int32.
      skipped: number of consecutive generations, up to the latest, that were skipped, int32: see `make_train_step`.
      obs_stats: running statistics of observations (`nesjax.rl`), or None.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> state = TrainState.create(params=jnp.zeros(3), optimizer=optax.sgd(0.1), key=jax.random.key(0))
      >>> state.replace(params=jnp.ones(3)).params.tolist()
      [1.0, 1.0, 1.0]
    """

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array
    skipped: jax.Array
    obs_stats: Any = None

    @classmethod
    def create(
        cls, *, params: Any, optimizer: optax.GradientTransformation, key: jax.Array, obs_stats: Any = None
    ) -> TrainState:
        """Makes the state before the first step.

        Args:
          params: a tree of arrays.
          optimizer: an optax optimizer.
          key: the run's key.
          obs_stats: `nesjax.rl.ObsStats`, if observations are to be normalised.

        Returns:
          A state whose arrays are copies, so that a step may reuse their memory.

        Raises:
          TypeError: a leaf of `params` is not an array, or one of the others is not what it should be.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> state = TrainState.create(params=jnp.zeros(3), optimizer=optax.sgd(0.1), key=jax.random.key(0))
          >>> int(state.step)
          0
        """
        check_optimizer(optimizer)
        check_arrays(named_leaves(params))
        # Weakly typed leaves, as Python numbers are, would make the second step compile again.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
        state = cls(params, optimizer.init(params), checked_key(key), jnp.int32(0), jnp.int32(0), obs_stats)
        # Every leaf is the state's own, so that a step may be given its memory (`donate`).
        return jax.tree.map(jnp.copy, state)


def raise_if_skipped(metrics: dict[str, Any], limit: int) -> None:
    """Raises if the last `limit` generations were all skipped, to end a run that goes nowhere.

    Args:
      metrics: those of the last step.
      limit: number of generations, at least 1.

    Raises:
      FloatingPointError: at least `limit` generations in a row were skipped.

    Example:
      >>> raise_if_skipped({"skipped": 3, "nonfinite": 64, "loss": jnp.nan}, limit=3)
      Traceback (most recent call last):
      ...
      FloatingPointError: 3 generations in a row were skipped (limit 3): \
all 64 losses of the last were NaN or infinite. The parameters stayed finite.
    """
    positive_int("limit", limit)
    if metrics["skipped"] >= limit:
        failed = jnp.isnan(metrics["loss"])  # there is a mean as soon as one loss is finite
        why = f"all {metrics['nonfinite']} losses" if failed else "the gradient or the update"
        if metrics.get("bad_obs", 0):
            why += f", and observations of {metrics['bad_obs']} members,"
        raise FloatingPointError(
            f"{metrics['skipped']} generations in a row were skipped (limit {limit}): {why} of the last were NaN or "
            "infinite. The parameters stayed finite."
        )


def _norm_and_share(updates: Any, params: Any, before: Any) -> tuple[jax.Array, jax.Array]:
    """Measures an update's norm, and the fraction of it that survived rounding to the parameters' dtype.

    A parameter that is not updated may hold infinities.
    """
    f32 = lambda tree: [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(tree)]
    both = [
        (jnp.sum(update**2), jnp.sum(jnp.where(update == 0, 0, (new - old) * update)))
        for update, new, old in zip(*map(f32, (updates, params, before)))
    ]
    wanted, done = (sum(sums) for sums in zip(*both))
    return jnp.sqrt(wanted), jnp.where(wanted > 0, done / jnp.where(wanted > 0, wanted, 1), 1)


def make_train_step(
    loss_fn: Callable, optimizer: optax.GradientTransformation, population: Population, *,
    shaping: Shaping | None = None, baseline: Baseline = "mean", in_axes: Any = None, has_aux: bool = False,
    credit: str | None = None, samples: int | None = None, discount: float = 1.0, mesh: Mesh | None = None,
    axis_name: str | None = None, strict: bool = False, donate: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """Makes one generation a pure, jitted function: `state, metrics = step(state, *args)`.

    Members whose loss is NaN or infinite weigh nothing, or rank worst. A generation without a finite loss, or whose
    gradient overflows, is skipped: it leaves parameters and optimizer as they were. Where an update overflows, the
    parameter stays, and the generation counts as skipped.

    Args:
      loss_fn, population: as in `value_and_grad`.
      optimizer: an optax optimizer.
      shaping, baseline, in_axes, has_aux, credit, samples, discount, strict: as in `value_and_grad`.
      mesh: the devices that the population is spread over. Pass the state and arguments as on one device, or already on
        the mesh.
      axis_name: the mesh's axis, if it has several. Without a mesh, the axis of the `jax.pmap` or `jax.shard_map`
        around the step (state replicated, mapped arguments split over the devices).
      donate: whether the step reuses the memory of the state it is given, which can't be used afterwards.

    Returns:
      A function `(state, *args) -> (state, metrics)`. Metrics are float32 scalars, but for counts:
      `loss`, `loss_min`, `loss_max`, `loss_std` over the finite losses;
      `grad_norm`, `update_norm`;
      `grad_snr`, the cosine to be expected between the gradients of two halves of the population (0 is pure noise);
      `nonfinite`, the number of members without a finite loss;
      `skipped`, the number of generations skipped in a row, this one included;
      `update_applied`, the fraction of the update that survived rounding to the parameters' dtype, 0 if skipped (if it
      is far below 1, keep float32 parameters and cast them in the loss);
      `std`, the mean over perturbed parameters;
      `aux`, `[N, ...]`, with `has_aux`.

    Raises:
      TypeError or ValueError: an argument makes no sense; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax, optax
      >>> optimizer = optax.adam(0.1)
      >>> step = nesjax.make_train_step(lambda w: jnp.sum(w**2), optimizer, nesjax.Population(size=64, std=0.1))
      >>> state = nesjax.TrainState.create(params=jnp.ones(3), optimizer=optimizer, key=jax.random.key(0))
      >>> for _ in range(50):
      ...     state, metrics = step(state)
      >>> bool(metrics["loss"] < 0.2)
      True
    """
    axis = Axis.of(mesh, axis_name, instance_of(Population, "population", population))
    estimate = Estimator(
        loss_fn, population, shaping=shaping, baseline=baseline, in_axes=in_axes, has_aux=has_aux, strict=strict,
        credit=credit, samples=samples, discount=discount, axis=axis,
    )  # fmt: skip

    check_optimizer(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)  # some want the loss as `value`

    def generation(state: TrainState, whole: tuple, args: tuple) -> tuple[TrainState, dict[str, Any], Any]:
        result = estimate(state.params, jax.random.fold_in(state.key, state.step), args, state.step)
        loss = mean_loss(result.losses)
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params, value=loss)
        updates = result.noise.treedef.unflatten([  # weight decay, say, moves frozen parameters too
            jnp.zeros_like(update) if leaf.family is None else update
            for leaf, update in zip(result.noise.leaves, jax.tree.leaves(updates))
        ])  # fmt: skip
        # Decided before the update, so that it is one pass over the parameters with it.
        usable = jnp.isfinite(result.losses).any() & jnp.isfinite(result.norm)
        fits = lambda new, old: jnp.where(usable & jnp.isfinite(new), new, old)
        params = jax.tree.map(fits, optax.apply_updates(state.params, updates), state.params)
        opt_state = jax.tree.map(lambda new, old: jnp.where(usable, new, old), opt_state, state.opt_state)
        update_norm, applied = _norm_and_share(updates, params, state.params)
        skipped = jnp.where(usable & jnp.isfinite(update_norm), 0, state.skipped + 1)
        metrics = {
            **_metrics(result, loss),
            "update_norm": update_norm,
            "skipped": skipped,
            "update_applied": jnp.where(skipped == 0, applied, 0),
        }
        state = state.replace(params=params, opt_state=opt_state, step=state.step + 1, skipped=skipped)
        return state, metrics, result.aux

    run = generation if mesh is None else axis.spread(generation, population, in_axes, donate=donate)

    def step(state: TrainState, *args: Any) -> tuple[TrainState, dict[str, Any]]:
        state, metrics, aux = run(instance_of(TrainState, "state", state), (), args)
        return state, {**metrics, "aux": aux} if has_aux else metrics

    return jax.jit(step, donate_argnums=0 if donate else ()) if mesh is None else step


def _metrics(result: Estimate, loss: jax.Array) -> dict[str, Any]:
    """What a generation's losses and gradient say; `loss` is the mean."""
    losses, finite = result.losses, jnp.isfinite(result.losses)
    sound = finite.sum()
    stds = [std for std, leaf in zip(result.noise.std, result.noise.leaves) if leaf.family is not None]
    return {
        "loss": loss,
        "loss_min": jnp.where(finite, losses, jnp.inf).min(),
        "loss_max": jnp.where(finite, losses, -jnp.inf).max(),
        "loss_std": jnp.sqrt(jnp.sum(jnp.where(finite, losses - loss, 0) ** 2) / sound),
        "grad_norm": result.norm,
        "grad_snr": result.snr,
        "nonfinite": losses.size - sound,
        "std": sum(stds) / max(len(stds), 1),
    }
