"""The return of a policy in a JAX environment, as a loss under `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..checks import positive_int
from .environments import Environment
from .obs_stats import ObsStats

PART = 20  # environment steps between two checks of whether all episodes are over


class Episodes(NamedTuple):
    """What one member played in `E` episodes.

    Attributes:
      returns: the sum of rewards of each episode, `[E]`.
      lengths: the number of steps of each episode, `[E]`.
      bad_obs: whether an observation was NaN or infinite.
      obs_stats: the statistics of all its observations; None without `obs_stats`.

    Example:
      >>> Episodes(jnp.ones(2), jnp.array([5, 7]), jnp.bool_(False), None).lengths.tolist()
      [5, 7]
    """

    returns: jax.Array
    lengths: jax.Array
    bad_obs: jax.Array
    obs_stats: ObsStats | None


def rollout(env: Environment, policy: Callable, *, steps: int, episodes: int = 1) -> Callable:
    """Makes a policy's loss function, whose loss is minus the mean return: `loss_fn(params, key, obs_stats=None)`.

    Nothing is played yet: each call of `loss_fn` plays. Use it in `value_and_grad` or `make_train_step` with
    `has_aux=True`, or to evaluate plain params. An episode ends at its first `done`, or after `steps`. An observation
    that is NaN or infinite makes the loss NaN, and isn't counted.

    Args:
      env: the environment.
      policy: `policy(params, obs) -> output`, see `Environment.actions`; `obs` is float32.
      steps: number of steps after which an episode ends at the latest.
      episodes: number of episodes, each with a key of its own.

    Returns:
      A function `(params, key, obs_stats=None) -> (loss, Episodes)`.

    Raises:
      TypeError: `env` is not an `Environment`.
      ValueError: (when traced) the policy's output or an observation has another shape than the environment says.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> env = Environment(  # stay near 0
      ...     reset=lambda key: (jnp.ones(1), jnp.ones(1)),
      ...     step=lambda key, x, action: (x + action, x + action, -jnp.abs(x[0]), jnp.abs(x[0]) > 3),
      ...     obs_shape=(1,), actions=(-jnp.ones(1), jnp.ones(1)))
      >>> loss_fn = rollout(env, lambda w, obs: w * obs, steps=10)
      >>> loss, episodes = loss_fn(-jnp.ones(1), jax.random.key(0))
      >>> float(loss), episodes.lengths.tolist()
      (1.0, [10])
    """
    positive_int("steps", steps)
    positive_int("episodes", episodes)
    if not isinstance(env, Environment):
        raise TypeError(f"env must be a nesjax.rl.Environment (see from_gymnax ...), got {type(env).__name__}.")

    def checked(obs):
        if jnp.shape(obs) != env.obs_shape:
            raise ValueError(f"{env.name}'s observation must have shape {env.obs_shape}, got {jnp.shape(obs)}.")
        return jnp.asarray(obs, jnp.float32)

    def episode(params, key, obs_stats):
        def step(carry, _):
            at, state, obs, alive, total, bad, seen = carry
            sound = jnp.isfinite(obs).all()
            if seen is not None:
                seen = seen.add(obs, alive & sound)
            output = policy(params, obs if obs_stats is None else obs_stats.normalise(obs))
            key = jax.random.fold_in(moves, at)
            state, obs, reward, done = env.step(key, state, env.action(output, state))
            for name, value in (("reward", reward), ("done", done)):
                if jnp.shape(value) != ():
                    raise ValueError(f"{env.name}'s {name} must be a scalar, got shape {jnp.shape(value)}.")
            total += jnp.where(alive, reward, 0)
            at, bad = at + alive, bad | alive & ~sound
            return (at, state, checked(obs), alive & (done == 0) & (at < steps), total, bad, seen), None

        start, moves = jax.random.split(key)
        state, obs = env.reset(start)
        seen = None if obs_stats is None else ObsStats.create(env.obs_shape)
        carry = jnp.int32(0), state, checked(obs), jnp.bool_(True), jnp.float32(0), jnp.bool_(False), seen
        # In parts, so that a population, whose members run side by side, stops when the last of them is done.
        part = lambda carry: jax.lax.scan(step, carry, length=min(steps, PART))[0]
        length, _, _, _, total, bad, seen = jax.lax.while_loop(lambda carry: carry[3], part, carry)
        return jnp.where(bad, jnp.nan, total), length, bad, seen

    def loss_fn(params, key, obs_stats=None):
        ObsStats.checked(obs_stats, env.obs_shape)
        played = jax.vmap(episode, (None, 0, None))(params, jax.random.split(key, episodes), obs_stats)
        returns, lengths, bad, seen = played
        return -returns.mean(), Episodes(returns, lengths, bad.any(), None if seen is None else ObsStats.merge(seen))

    return loss_fn
