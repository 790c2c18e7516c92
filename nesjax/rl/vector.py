"""A population in a Gymnasium vector environment, which JAX never sees."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import checked_losses, instance_of, positive_int
from ..forward import population_apply
from ..members import member_keys
from ..population import Population
from .actions import actions_of, kind_of
from .environments import has_parts_of
from .obs_stats import ObsStats
from .observations import as_float32, checked_shapes, shapes_of
from .policies import Player
from .rollout import Episodes


def vector_rollout(
    envs: Any, policy: Callable, population: Population, *, steps: int, carry: Any = None, sample: bool = False
) -> Callable:
    """A generation in a Gymnasium vector environment, a member in each of its N environments.

    The population's forward pass is one jitted call per step, `policy` on each member's observation; what the
    environments do is outside JAX. Antithetic partners get the same seed, and so the same episode.

    Args:
      envs: a `gymnasium.vector.VectorEnv` of N environments, with Discrete, Box, MultiDiscrete or MultiBinary actions
        and observations in Box spaces, or in Dict or Tuple spaces of such.
      policy, steps, carry, sample: as in `rollout`.
      population: of N members.

    Returns:
      A function `(params, noise, seed, obs_stats=None) -> (losses, Episodes)`: losses `[N]` for `estimate_gradient`,
      and what members played, a number for each, `[N]`. Where there are statistics to normalise by, its `obs_stats` are
      those with this generation's observations merged in. A member that saw a NaN or infinite observation has the
      loss NaN.

    Raises:
      TypeError: `envs` is not a vector environment.
      ValueError: its spaces are not supported, its number of environments is not N, or the population has groups.

    Example:
      >>> import gymnasium, nesjax  # doctest: +SKIP
      >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=population.size)  # doctest: +SKIP
      >>> play = nesjax.rl.vector_rollout(envs, policy, population, steps=500)  # doctest: +SKIP
      >>> losses, episodes = play(params, nesjax.sample_noise(key, params, population), seed=0)  # doctest: +SKIP
      >>> episodes.returns.mean(), episodes.lengths.mean()  # doctest: +SKIP
    """
    positive_int("steps", steps)
    has_parts_of("gymnasium.vector.VectorEnv", "envs", envs, "num_envs", "single_action_space")
    name = f"{type(envs).__name__}'s environment"
    shape = checked_shapes(shapes_of(envs.single_observation_space, name))
    actions = kind_of(actions_of(envs.single_action_space, name))
    player = Player(lambda output, _, key: actions.action(output, name, key), policy, carry, sample)
    size = instance_of(Population, "population", population).size
    if envs.num_envs != size:
        raise ValueError(f"envs must have an environment for each of {size} members, got {envs.num_envs}.")
    if population.group_size != 1:
        raise ValueError(f"group_size must be 1, for a member an environment, got {population.group_size}.")

    @jax.jit
    def act(params, noise, carries, obs, obs_stats, key, at):
        one = lambda params, obs, key, carry, obs_stats: player.act(params, carry, as_float32(obs), obs_stats, key)
        keys = member_keys(jax.random.fold_in(key, at), population)
        return population_apply(one, params, noise, obs, keys, carries, obs_stats, in_axes=(0, 0, 0, None))

    observe = jax.jit(jax.vmap(lambda stats, obs, valid: stats.add(as_float32(obs), valid)))
    of_each = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)

    def play(params, noise, seed, obs_stats=None):
        ObsStats.checked(obs_stats, shape)
        obs, key = _reset(envs, seed, population), jax.random.key(seed)
        alive, bad = np.ones(size, bool), np.zeros(size, bool)
        totals, lengths = np.zeros(size), np.zeros(size, int)
        carries, seen = of_each(player.carry), of_each(ObsStats.create(shape))
        for at in range(steps):
            sound = np.all([np.isfinite(x).reshape(size, -1).all(1) for x in jax.tree.leaves(obs)], 0)
            bad |= alive & ~sound
            if obs_stats is not None:
                seen = observe(seen, obs, alive & sound)
            carries, chosen = act(params, noise, carries, obs, obs_stats, key, at)
            obs, rewards, terminated, truncated, _ = envs.step(np.asarray(chosen))
            totals += np.where(alive, rewards, 0)
            lengths += alive
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
        losses = checked_losses("losses", np.where(bad, np.nan, -totals), size)
        obs_stats = obs_stats and obs_stats.joined_by(seen)
        return losses, Episodes(-losses, jnp.asarray(lengths), jnp.asarray(bad), obs_stats)

    return play


def _reset(envs: Any, seed: int, population: Population) -> Any:
    """The observations of new episodes, the same ones for partners."""
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed must be an int >= 0, got {seed!r}.")
    try:
        return envs.reset(seed=[int(seed) + i // population.signs for i in range(population.size)])[0]
    except Exception as error:  # some take one seed only; Gymnasium raises an error of its own
        raise ValueError(
            f"envs must take a list of seeds, so that partners play the same episode: {error} Try "
            'gymnasium.make_vec(..., vectorization_mode="sync").'
        ) from error
