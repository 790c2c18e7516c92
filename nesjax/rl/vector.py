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
from ..population import Population
from .environments import Environment, actions_of, has_parts_of, obs_shape_of
from .obs_stats import ObsStats


def vector_rollout(envs: Any, policy: Callable, population: Population, *, steps: int) -> Callable:
    """Makes a function that plays a Gymnasium vector environment, with one member in each of its N environments.

    The population's forward pass is one jitted call per step, `policy` on each member's observation; what the
    environments do is outside JAX. Antithetic partners get the same seed, and so the same episode.

    Args:
      envs: a `gymnasium.vector.VectorEnv` of N environments, with Discrete or Box actions and Box observations.
      policy, steps: as in `rollout`.
      population: a population of N members.

    Returns:
      A function `(params, noise, seed, obs_stats=None) -> (losses, obs_stats)`: losses `[N]` for `estimate_gradient`,
      and, where there are statistics to normalise by, those with this generation's observations merged in. A member
      that saw a NaN or infinite observation has the loss NaN.

    Raises:
      TypeError: `envs` is not a vector environment.
      ValueError: its spaces are not supported, its number of environments is not N, or the population has groups.

    Example:
      >>> import gymnasium, nesjax  # doctest: +SKIP
      >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=population.size)  # doctest: +SKIP
      >>> play = nesjax.rl.vector_rollout(envs, policy, population, steps=500)  # doctest: +SKIP
      >>> losses, _ = play(params, nesjax.sample_noise(key, params, population), seed=0)  # doctest: +SKIP
    """
    positive_int("steps", steps)
    has_parts_of("gymnasium.vector.VectorEnv", "envs", envs, "num_envs", "single_action_space")
    name = f"{type(envs).__name__}'s environment"
    actions = actions_of(envs.single_action_space, name)
    env = Environment(envs.reset, envs.step, obs_shape_of(envs.single_observation_space, name), actions, name=name)
    if envs.num_envs != instance_of(Population, "population", population).size:
        raise ValueError(f"envs must have an environment for each of {population.size} members, got {envs.num_envs}.")
    if population.group_size != 1:
        raise ValueError(f"group_size must be 1, for a member an environment, got {population.group_size}.")

    def one(params, obs, obs_stats):
        obs = jnp.asarray(obs, jnp.float32)
        return env.action(policy(params, obs if obs_stats is None else obs_stats.normalise(obs)))

    @jax.jit
    def act(params, noise, obs, obs_stats):
        return population_apply(one, params, noise, obs, obs_stats, in_axes=(0, None))

    observe = jax.jit(jax.vmap(ObsStats.add))

    def play(params, noise, seed, obs_stats=None):
        ObsStats.checked(obs_stats, env.obs_shape)
        if not isinstance(seed, numbers.Integral) or seed < 0:
            raise ValueError(f"seed must be an int >= 0, got {seed!r}.")
        seeds = [int(seed) + i // population.signs for i in range(population.size)]
        try:
            obs, _ = envs.reset(seed=seeds)
        except Exception as error:  # some take one seed only; Gymnasium raises an error of its own
            raise ValueError(
                f"envs must take a list of seeds, so that partners play the same episode: {error} Try "
                'gymnasium.make_vec(..., vectorization_mode="sync").'
            ) from error
        alive, totals = np.ones(population.size, bool), np.zeros(population.size)
        seen = jax.vmap(lambda _: ObsStats.create(env.obs_shape))(alive)
        for _ in range(steps):
            sound = np.isfinite(obs).reshape(population.size, -1).all(1)
            totals[alive & ~sound] = np.nan
            if obs_stats is not None:
                seen = observe(seen, obs, alive & sound)
            obs, rewards, terminated, truncated, _ = envs.step(np.asarray(act(params, noise, obs, obs_stats)))
            totals += np.where(alive, rewards, 0)
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
        if obs_stats is not None:
            obs_stats = obs_stats.joined_by(seen)
        return checked_losses("losses", -totals, population.size), obs_stats

    return play
