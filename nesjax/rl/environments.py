"""What an environment is to `nesjax.rl`, and adapters that make one of gymnax's, brax's, Playground's and pgx's.

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

from .actions import Discrete, actions_of, kind_of
from .observations import checked_shapes, is_shape, shapes_of


@dataclasses.dataclass(frozen=True)
class Environment:
    """What nesjax asks of an environment. Make one of your own from two functions, or use `from_gymnax` and the like.

    Args:
      reset: `key -> (state, obs)`.
      step: `(key, state, action) -> (state, obs, reward, done)`; what it returns after the first `done` is ignored.
      obs_shape: the shape of one observation, a tuple of ints, or a tree of them where observations are; in it
        `jax.ShapeDtypeStruct(shape, jnp.uint8)` for images, of which no statistics are kept.
      actions: A, the number of discrete actions (the policy returns `[A]` preferences, the greatest is taken), or
        bounds `(low, high)` of continuous ones (the policy returns an action of their shape, or its mean and log-std;
        it is clipped), or `MultiDiscrete` or `MultiBinary`.
      legal: `state -> mask`, bool, of the output's shape: which discrete actions may be taken; None for all.
      name: how messages call the environment.

    Raises:
      ValueError: `obs_shape` is not a tuple of ints or a tree of them, or `actions` is none of these.

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
    obs_shape: Any
    actions: Any
    legal: Callable | None = None
    name: str = "environment"

    def __post_init__(self):
        object.__setattr__(self, "obs_shape", checked_shapes(self.obs_shape))
        kind = kind_of(self.actions)
        if isinstance(kind, Discrete):
            object.__setattr__(self, "actions", kind.count)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """What the policy must return."""
        return kind_of(self.actions).outputs(drawn=False)[1][0]

    def action(self, output: Any, state: Any = None, key: jax.Array | None = None) -> jax.Array:
        """The action that a policy's output means: the preferred one, or with a key one drawn.

        Raises:
          ValueError: `output` has another shape.
        """
        kind = kind_of(self.actions)
        legal = None if self.legal is None or not kind.masked else self.legal(state)
        return kind.action(output, self.name, key, legal)


def has_parts_of(kind: str, name: str, env: Any, *parts: str) -> None:
    """Raises TypeError unless `env` has the attributes that are expected of a `kind`."""
    if not all(hasattr(env, part) for part in parts):
        raise TypeError(f"{name} must be a {kind}, got {type(env).__name__}.")


def from_gymnax(env: Any, params: Any = None) -> Environment:
    """Adapts a gymnax environment, of versions whose `step` returns 5 values (to 0.0.9) or 6 (from 1.0).

    Args:
      env: the environment, which is the first of what `gymnax.make` returns.
      params: its parameters; None for its defaults.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a gymnax environment.
      ValueError: its actions or observations are of a kind that is not supported.

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

    shape = shapes_of(env.observation_space(params), env.name)
    return Environment(reset, step, shape, actions_of(env.action_space(params), env.name), name=env.name)


def from_brax(env: Any) -> Environment:
    """Adapts a brax environment; its actions lie between -1 and 1.

    Args:
      env: the environment.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a brax environment.
      ValueError: its observation size is not one.

    Example:
      >>> import brax.envs, nesjax  # doctest: +SKIP
      >>> env = nesjax.rl.from_brax(brax.envs.get_environment("ant", backend="spring"))  # doctest: +SKIP
    """
    return _of_states("brax environment", env, "observation_size", "action_size")


def from_playground(env: Any) -> Environment:
    """Adapts a MuJoCo Playground environment; its actions lie between -1 and 1.

    Its episodes have no end of their own: give `rollout` its config's `episode_length` as steps.

    Args:
      env: the environment, as `mujoco_playground.registry.load` makes it, with `impl="jax"` on a CPU.

    Returns:
      An `Environment`.

    Raises:
      TypeError: `env` is not a Playground environment.

    Example:
      >>> from mujoco_playground import registry  # doctest: +SKIP
      >>> config = {"impl": "jax"}  # doctest: +SKIP
      >>> env = nesjax.rl.from_playground(registry.load("CartpoleBalance", config_overrides=config))  # doctest: +SKIP
    """
    return _of_states("MuJoCo Playground environment", env, "observation_size", "action_size", "mjx_model")


def _of_states(kind: str, env: Any, *parts: str) -> Environment:
    """An environment whose state holds observation, reward and done."""
    has_parts_of(kind, "env", env, *parts)
    sizes = lambda size: (size,) if isinstance(size, numbers.Integral) else size
    shape = jax.tree.map(sizes, env.observation_size, is_leaf=is_shape)

    def reset(key):
        state = env.reset(key)
        return state, state.obs

    def step(key, state, action):
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0

    high = np.ones(env.action_size, np.float32)
    return Environment(reset, step, shape, (-high, high), name=type(getattr(env, "unwrapped", env)).__name__)


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
