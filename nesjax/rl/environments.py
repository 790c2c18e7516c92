"""What an environment is to `nesjax.rl`, and adapters that make one of gymnax's, brax's and pgx's.

Letters: `A` actions or their numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import positive_int


@dataclasses.dataclass(frozen=True)
class Environment:
    """What nesjax asks of an environment. Make one of your own from two functions, or use `from_gymnax` and the like.

    Args:
      reset: `key -> (state, obs)`.
      step: `(key, state, action) -> (state, obs, reward, done)`; what it returns after the first `done` is ignored.
      obs_shape: the shape of one observation.
      actions: A, the number of discrete actions (the policy returns `[A]` preferences, and the greatest is taken), or
        bounds `(low, high)` of continuous ones (the policy returns an action of their shape, which is clipped).
      legal: `state -> [A]` bool, which says which discrete actions may be taken; None for all.
      name: how messages call the environment.

    Raises:
      ValueError: `obs_shape` is not a tuple of ints, or `actions` is neither a count nor bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> env = Environment(  # stay near 0
      ...     reset=lambda key: (jnp.zeros(1), jnp.zeros(1)),
      ...     step=lambda key, x, action: (x + action, x + action, -jnp.abs(x[0]), jnp.abs(x[0]) > 3),
      ...     obs_shape=(1,), actions=(-jnp.ones(1), jnp.ones(1)))
      >>> env.action(jnp.array([7.0])).tolist()
      [1.0]
    """

    reset: Callable
    step: Callable
    obs_shape: tuple[int, ...]
    actions: Any
    legal: Callable | None = None
    name: str = "environment"

    def __post_init__(self):
        sizes = self.obs_shape if isinstance(self.obs_shape, (tuple, list)) else (None,)
        if not all(isinstance(size, numbers.Integral) for size in sizes):
            raise ValueError(f"obs_shape must be a tuple of ints, got {self.obs_shape!r}.")
        object.__setattr__(self, "obs_shape", tuple(self.obs_shape))
        if not isinstance(self.actions, (tuple, list)):
            object.__setattr__(self, "actions", positive_int("actions (without bounds)", self.actions))
        elif len(self.actions) != 2 or np.shape(self.actions[0]) != np.shape(self.actions[1]):
            raise ValueError(f"actions must be bounds (low, high) of one shape, got {self.actions!r}.")
        elif np.any(np.asarray(self.actions[0]) > np.asarray(self.actions[1])):
            raise ValueError(f"actions must be bounds low <= high, got {self.actions!r}.")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of what the policy must return."""
        return (self.actions,) if isinstance(self.actions, int) else np.shape(self.actions[0])

    def action(self, output: jax.Array, state: Any = None) -> jax.Array:
        """Turns a policy's output into an action.

        Args:
          output: of `output_shape`.
          state: the environment's state, for its legal actions.

        Returns:
          The number of a discrete action, or a continuous action within its bounds.

        Raises:
          ValueError: `output` has another shape.
        """
        if jnp.shape(output) != self.output_shape:
            what = "a preference for each action" if isinstance(self.actions, int) else "an action"
            raise ValueError(
                f"policy must return {what} of {self.name}, shape {self.output_shape}, got {jnp.shape(output)}."
            )
        if not isinstance(self.actions, int):
            return jnp.clip(output, *self.actions)
        if self.legal is not None:
            output = jnp.where(self.legal(state), output, -jnp.inf)
        return output.argmax(-1)


def has_parts_of(kind: str, name: str, env: Any, *parts: str) -> None:
    """Raises TypeError unless `env` has the attributes that are expected of a `kind`."""
    if not all(hasattr(env, part) for part in parts):
        raise TypeError(f"{name} must be a {kind}, got {type(env).__name__}.")


def actions_of(space: Any, name: str) -> Any:
    """Turns a Gymnasium or gymnax space into `Environment.actions`."""
    if hasattr(space, "n") and getattr(space, "shape", ()) == () and getattr(space, "start", 0) == 0:
        return space.n
    if all(hasattr(space, part) for part in ("low", "high", "shape")):
        return np.broadcast_to(space.low, space.shape), np.broadcast_to(space.high, space.shape)
    raise ValueError(f"{name} must have Discrete (from 0) or Box actions, got {space}: wrap it so that it has.")


def obs_shape_of(space: Any, name: str) -> tuple[int, ...]:
    shape = getattr(space, "shape", None)
    if not isinstance(shape, tuple) or hasattr(space, "spaces"):
        raise ValueError(f"{name} must have array (Box) observations, got {space}: flatten them in a wrapper.")
    return shape


def from_gymnax(env: Any, params: Any = None) -> Environment:
    """Adapts a gymnax environment, of versions whose `step` returns 5 values (to 0.0.9) or 6 (from 1.0).

    Args:
      env: the environment, which is the first of what `gymnax.make` returns.
      params: its parameters; None for its defaults.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a gymnax environment.
      ValueError: its actions or observations are not arrays.

    Example:
      >>> import gymnax, nesjax  # doctest: +SKIP
      >>> env = nesjax.rl.from_gymnax(gymnax.make("CartPole-v1")[0])  # doctest: +SKIP
    """
    has_parts_of("gymnax environment", "env", env, "default_params", "action_space", "observation_space")
    params = env.default_params if params is None else params

    def reset(key):
        obs, state = env.reset(key, params)
        return state, obs

    def step(key, state, action):
        obs, state, reward, *ends, _ = env.step(key, state, action, params)
        return state, obs, reward, functools.reduce(jnp.logical_or, ends)

    shape = obs_shape_of(env.observation_space(params), env.name)
    return Environment(reset, step, shape, actions_of(env.action_space(params), env.name), name=env.name)


def from_brax(env: Any) -> Environment:
    """Adapts a brax environment; its actions lie between -1 and 1.

    Args:
      env: the environment.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a brax environment.
      ValueError: its observations are not one array.

    Example:
      >>> import brax.envs, nesjax  # doctest: +SKIP
      >>> env = nesjax.rl.from_brax(brax.envs.get_environment("ant", backend="spring"))  # doctest: +SKIP
    """
    has_parts_of("brax environment", "env", env, "observation_size", "action_size")
    name = type(getattr(env, "unwrapped", env)).__name__
    if not isinstance(env.observation_size, int):
        raise ValueError(f"{name} must have one array as observation, got {env.observation_size}: choose one.")

    def reset(key):
        state = env.reset(key)
        return state, state.obs

    def step(key, state, action):
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0

    high = np.ones(env.action_size, np.float32)
    return Environment(reset, step, (env.observation_size,), (-high, high), name=name)


def from_pgx(env: Any) -> Environment:
    """Adapts a pgx environment for one player (the MinAtar games, 2048).

    Args:
      env: the environment.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a pgx environment.
      ValueError: the game has several players.

    Example:
      >>> import nesjax, pgx  # doctest: +SKIP
      >>> env = nesjax.rl.from_pgx(pgx.make("minatar-breakout"))  # doctest: +SKIP
    """
    has_parts_of("pgx environment", "env", env, "num_players", "num_actions", "observation_shape")
    if env.num_players != 1:
        raise ValueError(f"{env.id} must be a game of one player, got {env.num_players}: a return needs one player.")

    def reset(key):
        state = env.init(key)
        return state, state.observation

    def step(key, state, action):
        state = env.step(state, action, key)
        return state, state.observation, state.rewards[0], state.terminated | state.truncated

    legal = lambda state: state.legal_action_mask
    return Environment(reset, step, env.observation_shape, env.num_actions, legal, name=env.id)
