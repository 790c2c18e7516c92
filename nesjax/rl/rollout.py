"""The return of a policy in a JAX environment, as a loss under `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..checks import positive_int
from .environments import Environment
from .obs_stats import ObsStats
from .observations import as_float32, check_shapes, is_finite
from .policies import Player

PART = 20  # environment steps between two checks of whether all episodes are over


class Episodes(NamedTuple):
    """What one member played in `E` episodes, or, by `vector_rollout`, what each member played in one, `[N]` for `[E]`.

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


def rollout(
    env: Environment, policy: Callable, *, steps: int, episodes: int = 1, carry: Any = None, sample: bool = False
) -> Callable:
    """Makes the loss function of a policy, minus its mean return: `loss_fn(params, key, obs_stats=None)`.

    Nothing is played yet: each call of `loss_fn` plays. Use it in `value_and_grad` or `make_train_step` with
    `has_aux=True`, or to evaluate plain params. An episode ends at its first `done`, or after `steps`. An observation
    that is NaN or infinite makes the loss NaN, and isn't counted.

    Args:
      env: the environment.
      policy: `policy(params, obs) -> output`, see `Environment.actions`; `obs` is float32, and images divided by 255.
      steps: number of steps after which an episode ends at the latest.
      episodes: number of episodes, each with a key of its own.
      carry: what a policy with memory carries at the start of each episode, a tree of arrays (a recurrent cell's
        initial carry): it is then `policy(params, carry, obs) -> (carry, output)`. None: no memory.
      sample: actions are drawn from the policy's preferences, and continuous ones from the mean and log-std that it
        returns, not the preferred ones taken. Leave it out to evaluate.

    Returns:
      A function `(params, key, obs_stats=None) -> (loss, Episodes)`.

    Raises:
      TypeError: an argument of another kind; (when traced) a policy that doesn't return its carry.
      ValueError: (when traced) the policy's output or an observation has another shape than the environment says, or
        the carry changes its shape or dtype.

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
    player = Player(env.action, policy, carry, sample)

    def loss_fn(params, key, obs_stats=None):
        ObsStats.checked(obs_stats, env.obs_shape)
        play = lambda key: _episode(env, player, steps, params, key, obs_stats)
        returns, lengths, bad, seen = jax.vmap(play)(jax.random.split(key, episodes))
        return -returns.mean(), Episodes(returns, lengths, bad.any(), None if seen is None else ObsStats.merge(seen))

    return loss_fn


class _Moment(NamedTuple):
    """An episode between two steps: how many were played, the environment's state and observation, what the policy
    carries, and of what was played the return, whether an observation was bad, and the statistics."""

    at: jax.Array
    state: Any
    obs: Any
    carry: Any
    alive: jax.Array
    total: jax.Array
    bad: jax.Array
    seen: ObsStats | None


def _episode(
    env: Environment, player: Player, steps: int, params: Any, key: jax.Array, obs_stats: ObsStats | None
) -> Episodes:
    """One episode: `Episodes` without their axis."""
    start, moves, choices = jax.random.split(key, 3)

    def checked(obs):
        check_shapes(f"{env.name}'s observation must have shape", obs, env.obs_shape)
        return as_float32(obs)

    def step(now, _):
        sound = is_finite(now.obs)
        seen = None if now.seen is None else now.seen.add(now.obs, now.alive & sound)
        carry, action = player.act(
            params, now.carry, now.obs, obs_stats, jax.random.fold_in(choices, now.at), now.state
        )
        state, obs, reward, done = env.step(jax.random.fold_in(moves, now.at), now.state, action)
        for name, value in (("reward", reward), ("done", done)):
            if jnp.shape(value) != ():
                raise ValueError(f"{env.name}'s {name} must be a scalar, got shape {jnp.shape(value)}.")
        at, total = now.at + now.alive, now.total + jnp.where(now.alive, reward, 0)
        alive, bad = now.alive & (done == 0) & (at < steps), now.bad | now.alive & ~sound
        return _Moment(at, state, checked(obs), carry, alive, total, bad, seen), None

    state, obs = env.reset(start)
    seen = None if obs_stats is None else ObsStats.create(env.obs_shape)
    first = _Moment(
        jnp.int32(0), state, checked(obs), player.carry, jnp.bool_(True), jnp.float32(0), jnp.bool_(False), seen
    )
    # In parts, so that a population, whose members run side by side, stops when the last of them is done.
    part = lambda now: jax.lax.scan(step, now, length=min(steps, PART))[0]
    end = jax.lax.while_loop(lambda now: now.alive, part, first)
    return Episodes(jnp.where(end.bad, jnp.nan, end.total), end.at, end.bad, end.seen)
