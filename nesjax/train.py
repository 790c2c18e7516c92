"""The training state and the training step: pure functions for one device and for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .devices import Axis
from .estimator import estimator, mean_loss
from .fitness import Shaping
from .members import checked_key
from .population import Population, checked_population


@flax.struct.dataclass
class TrainState:
    """All that training carries from one step to the next.

    Attributes:
      params: the network's parameters.
      opt_state: optax's state.
      key: the run's key; a generation's noise comes from (key, step).
      step: generations done, int32.
    """

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array

    @classmethod
    def create(cls, *, params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
        """The state before the first step.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> state = TrainState.create(params=jnp.zeros(3), optimizer=optax.sgd(0.1), key=jax.random.key(0))
          >>> int(state.step)
          0
        """
        # Weakly typed leaves, as Python numbers are, would make the second step compile again.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
        return cls(params, optimizer.init(params), checked_key(key), jnp.zeros((), jnp.int32))


def make_train_step(
    loss_fn: Callable, optimizer: optax.GradientTransformation, population: Population, *,
    shaping: Shaping | None = None, baseline: str | None = "mean", in_axes: Any = None, has_aux: bool = False,
    mesh: Mesh | None = None, axis_name: str | None = None, strict: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """One generation as a pure, jitted function: `state, metrics = step(state, *args)`.

    Arguments are those of `value_and_grad`, and an optax optimizer. With `mesh` the population is spread over its
    devices: pass the state and arguments as on one device, or already on the mesh. With `axis_name` alone use the step
    inside `jax.pmap` or `jax.shard_map` (state replicated, mapped arguments split over the devices).

    Returns:
      A function `(state, *args) -> (state, metrics)`. Metrics, all float32 scalars but for the count: `loss`,
      `loss_min`, `loss_max` and `loss_std` over the finite losses, `grad_norm`, `update_norm`, `grad_snr` (the
      cosine to be expected between the gradients of two halves of the population: 0 is pure noise), `nonfinite`
      (members), `std` (mean over perturbed parameters), and `aux` (`[N, ...]`) with `has_aux`.

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
    axis = Axis.of(mesh, axis_name, checked_population(population))
    estimate = estimator(
        loss_fn, population, shaping=shaping, baseline=baseline, in_axes=in_axes, has_aux=has_aux, strict=strict,
        axis=axis,
    )  # fmt: skip

    def generation(state: TrainState, args: tuple) -> tuple[tuple[TrainState, dict[str, Any]], Any]:
        result = estimate(state.params, jax.random.fold_in(state.key, state.step), args, state.step)
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
        losses, finite = result.losses, jnp.isfinite(result.losses)
        loss = mean_loss(losses)
        stds = [std for std, leaf in zip(result.noise.std, result.noise.leaves) if leaf.family is not None]
        metrics = {
            "loss": loss,
            "loss_min": jnp.where(finite, losses, jnp.inf).min(),
            "loss_max": jnp.where(finite, losses, -jnp.inf).max(),
            "loss_std": jnp.sqrt(jnp.where(finite, losses - loss, 0) ** 2 @ jnp.ones_like(losses) / finite.sum()),
            "grad_norm": optax.tree.norm(result.grads),
            "update_norm": optax.tree.norm(updates),
            "grad_snr": result.snr,
            "nonfinite": (~finite).sum(),
            "std": sum(stds) / max(len(stds), 1),
        }
        params = optax.apply_updates(state.params, updates)
        return (state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics), result.aux

    run = generation if mesh is None else axis.spread(generation, population, in_axes)

    def step(state: TrainState, *args: Any) -> tuple[TrainState, dict[str, Any]]:
        if not isinstance(state, TrainState):
            raise TypeError(f"state must be a nesjax.TrainState, got {type(state).__name__}.")
        (state, metrics), aux = run(state, args)
        return state, {**metrics, "aux": aux} if has_aux else metrics

    return jax.jit(step) if mesh is None else step
