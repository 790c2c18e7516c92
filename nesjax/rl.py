"""Reinforcement learning: the return of a policy in an environment as a loss, for whole populations in one jit.

A JAX environment is played by `rollout`, under `lax.scan`; a Gymnasium vector environment, which JAX never sees, by
`vector_rollout`. Observations can be normalised by statistics that all members share (ARS, Mania et al., 2018,
arXiv:1803.07055, algorithm 2, V2). Letters: `N` members, `A` actions or their numbers.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .devices import Axis
from .environments import Environment, actions_of, from_brax, from_gymnax, from_pgx, has_parts_of, obs_shape_of
from .estimator import checked_losses
from .fitness import Shaping, centered_rank
from .forward import population_apply
from .members import member_keys
from .noise.base import positive_int
from .obs_stats import ObsStats
from .population import Population, checked_population
from .train import TrainState, checked_state, make_train_step

__all__ = [
    "Environment", "Episodes", "ObsStats", "from_brax", "from_gymnax", "from_pgx", "make_rl_step", "rollout",
    "vector_rollout",
]  # fmt: skip
PART = 20  # steps of an episode between two looks at whether it is over


class Episodes(NamedTuple):
    """What one member played: return and length (in steps) of each of `E` episodes, whether an observation was NaN or
    infinite, and the statistics of all its observations (None without `obs_stats`)."""

    returns: jax.Array
    lengths: jax.Array
    bad_obs: jax.Array
    obs_stats: ObsStats | None


def rollout(env: Environment, policy: Callable, *, steps: int, episodes: int = 1) -> Callable:
    """The loss of a policy: minus its mean return, `loss_fn(params, key, obs_stats=None) -> (loss, Episodes)`.

    For `value_and_grad` or `make_train_step` with `has_aux=True`, or to evaluate plain params. An episode ends at its
    first `done`, or after `steps`. An observation that is NaN or infinite makes the loss NaN, and isn't counted.

    Args:
      env: the environment.
      policy: `policy(params, obs) -> output`, see `Environment.actions`; `obs` is float32.
      steps: the longest episode.
      episodes: how many are played, with keys of their own.

    Raises:
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


def make_rl_step(
    env: Environment, policy: Callable, optimizer: optax.GradientTransformation, population: Population, *,
    steps: int, episodes: int = 1, shaping: Shaping | None = centered_rank, baseline: str | None = "mean",
    mesh: Mesh | None = None, axis_name: str | None = None,
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """`make_train_step` for an environment: `state, metrics = step(state)`.

    Every member plays `episodes` fresh episodes a generation, its antithetic partner or group the same ones (common
    random numbers). If the state has `obs_stats`, observations are normalised by those of the generations before, and
    all members' observations are merged into them. With `axis_name` alone use the step inside `jax.pmap`, or inside
    `jax.shard_map` with `check_vma=False`, as episodes are loops.

    Returns:
      A function whose metrics are those of `make_train_step`, and `return` and `length`, the means over members and
      episodes, `return_max`, the best member's, and `bad_obs`, the members that saw a NaN or infinite observation.
    """
    loss_fn = rollout(env, policy, steps=steps, episodes=episodes)
    inner = make_train_step(
        loss_fn, optimizer, population, shaping=shaping, baseline=baseline, in_axes=(0, None), has_aux=True,
        mesh=mesh, axis_name=axis_name,
    )  # fmt: skip

    axis, each = Axis.of(mesh, axis_name, population), dataclasses.replace(population, group_size=1)

    def finish(whole, args):
        (state, metrics), (played,) = whole, args
        returns, lengths = (axis.gather(x.mean(1)) for x in (played.returns, played.lengths))
        bad = axis.gather(played.bad_obs)
        metrics |= {
            "return": jnp.nanmean(returns), "return_max": jnp.nanmax(returns), "length": lengths.mean(),
            "bad_obs": bad.sum(),
        }  # fmt: skip
        if state.obs_stats is not None:
            of_devices = jax.tree.map(lambda x: axis.gather(x[None]), ObsStats.merge(played.obs_stats))
            state = state.replace(obs_stats=state.obs_stats.joined_by(of_devices))
        return (state, metrics), ()

    finish = finish if mesh is None else axis.spread(finish, each, 0)
    keys_of = jax.jit(lambda state: member_keys(jax.random.fold_in(checked_state(state).key, state.step), population))

    def step(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = keys_of(state)
        if axis_name is not None and mesh is None:  # this device's, as the caller's pmap or shard_map would cut them
            index, count = axis.shard(population)
            keys = jax.lax.dynamic_slice_in_dim(keys, index * (len(keys) // count), len(keys) // count)
        new, metrics = inner(state, keys, state.obs_stats)
        return finish((new, metrics), (metrics.pop("aux"),))[0]

    return jax.jit(step) if mesh is None else step


def vector_rollout(envs: Any, policy: Callable, population: Population, *, steps: int) -> Callable:
    """A generation in a Gymnasium vector environment, a member in each of its N environments.

    The population's forward pass is one jitted call a step, `policy` on each member's observation; what the
    environments do is outside JAX. Antithetic partners get the same seed, and so the same episode.

    Args:
      envs: a `gymnasium.vector.VectorEnv` of N environments, with Discrete or Box actions and Box observations.
      policy, steps: as in `rollout`.
      population: of N members.

    Returns:
      A function `(params, noise, seed, obs_stats=None) -> (losses, obs_stats)`: losses `[N]` for `estimate_gradient`,
      and, where there are statistics to normalise by, those with this generation's observations merged in. A member
      that saw a NaN or infinite observation has the loss NaN.

    Raises:
      TypeError: `envs` that are none.
      ValueError: spaces that are not supported, a number of environments that is not N, or groups.
    """
    positive_int("steps", steps)
    has_parts_of("gymnasium.vector.VectorEnv", "envs", envs, "num_envs", "single_action_space")
    name = f"{type(envs).__name__}'s environment"
    actions = actions_of(envs.single_action_space, name)
    env = Environment(None, None, obs_shape_of(envs.single_observation_space, name), actions, name=name)
    if envs.num_envs != checked_population(population).size:
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
        return checked_losses("losses", -totals, population), obs_stats

    return play
