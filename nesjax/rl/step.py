"""A training step for policies: a population of rollouts, and the statistics of what they observed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..checks import instance_of
from ..devices import Axis
from ..members import member_keys
from ..population import Population
from ..shaping import Baseline, Shaping, centered_rank
from ..train import TrainState, make_train_step
from .environments import Environment
from .obs_stats import ObsStats
from .rollout import rollout


def make_rl_step(
    env: Environment, policy: Callable, optimizer: optax.GradientTransformation, population: Population, *,
    steps: int, episodes: int = 1, carry: Any = None, sample: bool = False, shaping: Shaping | None = centered_rank,
    baseline: Baseline = "mean", mesh: Mesh | None = None, axis_name: str | None = None,
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """Makes one generation of policies in an environment: `state, metrics = step(state)`.

    Every member plays `episodes` fresh episodes a generation, its antithetic partner or group the same ones, with the
    same luck in what they draw (common random numbers). If the state has `obs_stats`, observations are normalised by
    those of the generations before, and all members' observations are merged into them.

    Args:
      env, policy, steps, episodes, carry, sample: as in `rollout`.
      optimizer, population, shaping, baseline, mesh, axis_name: as in `make_train_step`. With `axis_name` alone use the
        step inside `jax.pmap`, or inside `jax.shard_map` with `check_vma=False`, as episodes are loops.

    Returns:
      A function `state -> (state, metrics)`. Its metrics are those of `make_train_step` and `return` and `length` (the
      means over members and episodes), `return_max` (that of the best member) and `bad_obs` (the number of members that
      saw a NaN or infinite observation).

    Raises:
      TypeError or ValueError: as in `rollout` and `make_train_step`.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax, optax
      >>> env = nesjax.rl.Environment(  # be at 1
      ...     reset=lambda key: (0, jnp.ones(1)),
      ...     step=lambda key, state, x: (0, jnp.ones(1), -((x[0] - 1) ** 2), False),
      ...     obs_shape=(1,), actions=(-jnp.ones(1), jnp.ones(1)))
      >>> optimizer, population = optax.adam(0.1), nesjax.Population(size=16, std=0.1, antithetic=True)
      >>> step = make_rl_step(env, lambda w, obs: w * obs, optimizer, population, steps=2)
      >>> state = nesjax.TrainState.create(params=jnp.zeros(1), optimizer=optimizer, key=jax.random.key(0))
      >>> for _ in range(20):
      ...     state, metrics = step(state)
      >>> bool(metrics["return"] > -0.2)
      True
    """
    loss_fn = rollout(env, policy, steps=steps, episodes=episodes, carry=carry, sample=sample)
    inner = make_train_step(
        loss_fn, optimizer, population, shaping=shaping, baseline=baseline, in_axes=(0, None), has_aux=True,
        mesh=mesh, axis_name=axis_name,
    )  # fmt: skip

    axis, each = Axis.of(mesh, axis_name, population), dataclasses.replace(population, group_size=1)

    def finish(state, metrics, args):
        (played,) = args
        returns, lengths = (axis.gather(x.mean(1)) for x in (played.returns, played.lengths))
        bad = axis.gather(played.bad_obs)
        metrics |= {
            "return": jnp.nanmean(returns), "return_max": jnp.nanmax(returns), "length": lengths.mean(),
            "bad_obs": bad.sum(),
        }  # fmt: skip
        if state.obs_stats is not None:
            of_devices = jax.tree.map(lambda x: axis.gather(x[None]), ObsStats.merge(played.obs_stats))
            state = state.replace(obs_stats=state.obs_stats.joined_by(of_devices))
        return state, metrics, ()

    finish = finish if mesh is None else axis.spread(finish, each, 0)

    @jax.jit
    def keys_of(state):
        instance_of(TrainState, "state", state)
        return member_keys(jax.random.fold_in(state.key, state.step), population)

    def step(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = keys_of(state)
        if axis_name is not None and mesh is None:  # this device's, as the caller's pmap or shard_map would cut them
            index, count = axis.shard(population)
            keys = jax.lax.dynamic_slice_in_dim(keys, index * (len(keys) // count), len(keys) // count)
        new, metrics = inner(state, keys, state.obs_stats)
        played = metrics.pop("aux")
        return finish(new, metrics, (played,))[:2]

    return jax.jit(step) if mesh is None else step
