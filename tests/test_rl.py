"""Rollouts, observation statistics and environments of other libraries."""

from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environments import KEY, OPTIMIZER, POPULATION, linear, start, walk

import nesjax
from nesjax.rl import (
    Environment,
    MultiBinary,
    MultiDiscrete,
    ObsStats,
    from_brax,
    from_gymnax,
    from_pgx,
    from_playground,
    make_rl_step,
    rollout,
    vector_rollout,
)


def counter(last: int, bad_at: int = -1, bad=jnp.nan) -> Environment:
    """Counts its steps, ends at `last` (after which it returns nonsense), observes something bad at `bad_at`."""

    def obs(at):
        return jnp.where((at == bad_at) | (at > last), bad, at.astype(jnp.float32))[None]

    def step(key, at, action):
        at = at + 1
        return at, obs(at), jnp.where(at > last, jnp.nan, 2.0), at == last

    return Environment(lambda key: (jnp.int32(0), obs(jnp.int32(0))), step, (1,), 2)


def test_counts_are_exact_beyond_what_float32_holds():
    """float32 adds nothing to 2**24."""
    one = ObsStats.create(()).add(jnp.float32(3), True)
    many = one.replace(count=jnp.uint32(2**24), mean=jnp.float32(1), m2=jnp.float32(2**24))
    assert many.add(jnp.float32(1), True).count == 2**24 + 1
    for before in (2**24, 10**9, 2**31 - 1):
        total = many.replace(count=jnp.uint32(before)).joined_by(jax.tree.map(lambda x: x[None], one))
        assert total.count == jnp.uint32(before + 1) and total.mean == pytest.approx(1, abs=1e-6)
    full, more = (many.replace(count=jnp.uint32(n), m2=jnp.float32(n)) for n in (2**31, 10**9))
    full = full.joined_by(jax.tree.map(lambda x: x[None], more))
    assert full.count == jnp.uint32(2**31) and full.mean == 1 and full.normalise(jnp.float32(2)) == pytest.approx(1)


def test_an_episode_ends_at_the_first_done_and_the_rest_counts_for_nothing():
    loss, played = rollout(counter(5), linear, steps=20, episodes=3)(start(2).params, KEY, ObsStats.create((1,)))
    assert loss == -10 and played.returns.tolist() == [10] * 3 and played.lengths.tolist() == [5] * 3
    assert not played.bad_obs and played.obs_stats.count == 15 and played.obs_stats.mean[0] == 2  # of 0 to 4
    loss, played = rollout(counter(50), linear, steps=20)(start(2).params, KEY)
    assert loss == -40 and played.lengths.tolist() == [20] and played.obs_stats is None


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_observation_fails_the_member_and_stays_out_of_the_statistics(bad):
    loss, played = rollout(counter(5, 3, bad), linear, steps=9)(start(2).params, KEY, ObsStats.create((1,)))
    assert jnp.isnan(loss) and played.bad_obs
    assert played.obs_stats.count == 4 and played.obs_stats.mean[0] == (0 + 1 + 2 + 4) / 4


def test_a_run_whose_observations_are_all_bad_ends_and_says_why():
    step = make_rl_step(counter(5, 3), linear, OPTIMIZER, nesjax.Population(8, std=0.1), steps=9)
    _, metrics = step(start(2))
    assert metrics["bad_obs"] == 8 and metrics["skipped"] == 1
    with pytest.raises(FloatingPointError, match="8 losses, and observations of 8 members, of the last were NaN"):
        nesjax.raise_if_skipped(metrics, 1)


def test_a_billion_observations_lose_nothing():
    """10,000 generations of 100,000, whose mean drifts from 2 to 4: as float64 has it, to 1e-4."""
    means, variances = np.linspace(2, 4, 10_000), np.linspace(0.5, 2, 10_000)
    columns = (jnp.asarray(x[:, None], jnp.float32) for x in (means, 100_000 * variances))
    one = ObsStats(jnp.full((10_000, 1), 100_000, jnp.uint32), *columns)
    stats, _ = jax.lax.scan(lambda stats, each: (stats.joined_by(each), None), ObsStats.create(()), one)
    assert stats.count == 10**9 and stats.mean == pytest.approx(means.mean(), abs=1e-4)
    assert stats.m2 / stats.count == pytest.approx(variances.mean() + means.var(), rel=1e-4)


def stats_of(x: np.ndarray) -> ObsStats:
    one = lambda rows: jax.lax.scan(
        lambda stats, row: (stats.add(row, True), None), ObsStats.create(x.shape[2:]), rows
    )[0]
    return jax.vmap(one)(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_statistics_are_those_of_all_observations(offset):
    x = np.random.default_rng(0).normal(offset, 2.0, size=(6, 50, 3))
    merged = ObsStats.merge(stats_of(x))
    np.testing.assert_allclose(merged.mean, x.mean((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged.m2 / merged.count, x.var((0, 1)), rtol=1e-3)
    again = ObsStats.merge(jax.tree.map(lambda a, b: jnp.stack([a, b]), merged, ObsStats.create((3,))))
    np.testing.assert_allclose(again.m2, merged.m2, rtol=1e-6)
    np.testing.assert_allclose(
        merged.normalise(jnp.asarray(x[0, 0])), (x[0, 0] - x.mean((0, 1))) / x.std((0, 1)), atol=1e-2
    )


def test_statistics_that_overflowed_are_left_out():
    x = np.random.default_rng(0).normal(size=(4, 10, 2))
    x[1, 3, 0] = 1e30
    np.testing.assert_allclose(ObsStats.merge(stats_of(x)).mean, x[[0, 2, 3]].mean((0, 1)), atol=1e-6)


def test_what_was_not_seen_or_never_varies_is_safe_to_normalise():
    new = ObsStats.create((2,))
    assert new.normalise(jnp.array([3.0, -50.0])).tolist() == [3, -10]
    constant = ObsStats(jnp.float32(9), jnp.ones(2), jnp.zeros(2))
    assert constant.normalise(jnp.array([1.0, 5.0])).tolist() == [0, 0]
    always, stats = jnp.array([100.3, 1234.5]), ObsStats.create((2,))
    for _ in range(20):  # generations of 64 members' episodes of 50 steps
        episodes = jax.vmap(lambda _: ObsStats(jnp.float32(50), always, jnp.zeros(2)))(jnp.arange(64))
        stats = ObsStats.merge(jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), stats, episodes))
    assert stats.count == 20 * 64 * 50 and stats.normalise(always).tolist() == [0, 0]


@pytest.mark.parametrize("options", [{"antithetic": True}, {"group_size": 4}, {"group_size": 4, "antithetic": True}])
def test_partners_and_groups_play_the_same_episodes(options):
    """Zero std: what differs is the episodes alone."""
    population = nesjax.Population(8, std=optax.constant_schedule(0.0), **options)
    loss_fn = rollout(walk(), linear, steps=5, episodes=2)
    keys = nesjax.member_keys(KEY, population)
    noise = nesjax.sample_noise(KEY, start().params, population, step=0)
    losses, _ = nesjax.population_apply(loss_fn, start().params, noise, keys, in_axes=0)
    together = np.asarray(losses).reshape(-1, options.get("group_size", 2))
    assert (together == together[:, :1]).all() and len(np.unique(losses)) == len(together)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_policy_learns_and_a_second_step_compiles_nothing(normalised):
    state = start(obs_stats=ObsStats.create((1,))) if normalised else start()
    step = make_rl_step(
        walk(), linear, OPTIMIZER, nesjax.Population(64, std=0.1, antithetic=True), steps=20, episodes=2
    )
    state, first = step(state)
    size = step._cache_size()
    for _ in range(40):
        state, metrics = step(state)
    assert step._cache_size() == size
    assert metrics["return"] > 14 > 5 > first["return"] and metrics["length"] == 20
    assert first["return_max"] > first["return"] and metrics["bad_obs"] == 0
    assert state.obs_stats is None or state.obs_stats.count == pytest.approx(41 * 64 * 2 * 20, rel=0.2)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_change_neither_returns_nor_statistics(devices):
    population = nesjax.Population(16, std=0.1, antithetic=True, chunk_size=2)
    mesh = jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])
    states = []
    for options in ({}, {"mesh": mesh}):
        step, state = (
            make_rl_step(walk(), linear, OPTIMIZER, population, steps=5, **options),
            start(obs_stats=ObsStats.create((1,))),
        )
        for _ in range(3):
            state, metrics = step(state)
        states.append((state.params, state.obs_stats, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *states)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_a_step_inside(how):
    population = nesjax.Population(16, std=0.1, antithetic=True)
    plain = make_rl_step(walk(), linear, OPTIMIZER, population, steps=5)
    step = make_rl_step(walk(), linear, OPTIMIZER, population, steps=5, axis_name="devices")
    state = start(obs_stats=ObsStats.create((1,)))
    if how == "pmap":
        spread = jax.pmap(lambda _: step(state), "devices", devices=jax.devices()[:4])(jnp.arange(4))
        spread = jax.tree.map(lambda x: x[0], spread)
    else:
        mesh = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
        whole = jax.sharding.PartitionSpec()
        spread = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))(state)
    for got, expected in zip(spread, plain(state)):
        got, expected = (tree.params if hasattr(tree, "params") else tree for tree in (got, expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_illegal_actions_are_not_taken():
    taken = walk(step=lambda key, x, action: (x, x, action.astype(jnp.float32), False), actions=4,
                 legal=lambda x: jnp.array([True, False, True, False]))  # fmt: skip
    loss, _ = rollout(taken, lambda params, obs: jnp.arange(4.0), steps=3)(None, KEY)
    assert loss == -6


class FiveValues:
    """As gymnax up to 0.0.9: one `done`."""

    name, default_params = "five", None

    def action_space(self, params):
        return gymnasium.spaces.Discrete(2)

    def observation_space(self, params):
        return gymnasium.spaces.Box(-1, 1, (3,))

    def reset(self, key, params):
        return jnp.zeros(3), jnp.int32(0)

    def step(self, key, state, action, params):
        return jnp.zeros(3), state + 1, 1.0, state == 3, {}


class SixValues(FiveValues):
    """As gymnax from 1.0: terminated and truncated."""

    def step(self, key, state, action, params):
        return jnp.zeros(3), state + 1, 1.0, False, state == 3, {}


@pytest.mark.parametrize("env", [FiveValues(), SixValues()])
def test_gymnax_steps_of_both_kinds(env):
    loss, played = rollout(from_gymnax(env), linear, steps=9)(start(2, 3).params, KEY)
    assert loss == -4 and played.lengths.tolist() == [4]


@pytest.mark.parametrize("name, outputs, obs", [("CartPole-v1", 2, 4), ("Pendulum-v1", 1, 3)])
def test_gymnax_environments(name, outputs, obs):
    gymnax = pytest.importorskip("gymnax")
    env = from_gymnax(*gymnax.make(name))
    loss, played = jax.jit(rollout(env, linear, steps=30))(start(outputs, obs).params, KEY)
    assert (loss == -played.lengths[0]) if outputs == 2 else (loss > 0)
    if outputs == 2:
        assert 5 < played.lengths[0] < 30  # always to one side: it falls


class BraxState(NamedTuple):
    obs: jax.Array
    reward: jax.Array
    done: jax.Array


class LikeBrax:
    observation_size, action_size = 3, 2

    def reset(self, key):
        return BraxState(jnp.zeros(3), jnp.float32(0), jnp.float32(0))

    def step(self, state, action):
        return BraxState(state.obs + 1, action.sum(), jnp.float32(state.obs[0] == 4))


class LikePlayground(LikeBrax):
    mjx_model = None


@pytest.mark.parametrize("env", [from_brax(LikeBrax()), from_playground(LikePlayground())])
def test_environments_with_states_take_actions_within_one(env):
    policy = lambda params, obs: jnp.array([5.0, 0.5])
    loss, played = rollout(env, policy, steps=9)(None, KEY)
    assert loss == -5 * 1.5 and played.lengths.tolist() == [5]


def test_a_pgx_environment():
    pgx = pytest.importorskip("pgx")
    env = from_pgx(pgx.make("minatar-breakout"))
    params = {"w": jnp.zeros((400, 3)), "b": jnp.arange(3.0)}
    policy = lambda params, obs: linear(params, obs.reshape(-1))
    loss, played = jax.jit(rollout(env, policy, steps=50, episodes=2))(params, KEY)
    assert env.obs_shape == (10, 10, 4) and 0 < played.lengths.max() <= 50 and loss <= 0
    with pytest.raises(ValueError, match="tic_tac_toe must be a game of one player, got 2"):
        from_pgx(pgx.make("tic_tac_toe"))


def test_gymnasium_vector_environments():
    population = nesjax.Population(8, std=0.3, antithetic=True)
    envs = gymnasium.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync")
    play = vector_rollout(envs, linear, population, steps=500)
    params = start(2, 4).params
    noise = nesjax.sample_noise(KEY, params, population)
    losses, played = play(params, noise, seed=3)
    assert played.obs_stats is None and not played.bad_obs.any()
    assert (played.returns == -losses).all() and (played.lengths == played.returns).all()  # a reward of 1 a step
    single, expected = gymnasium.make("CartPole-v1"), []
    for i in range(8):
        theta = jax.tree.map(np.asarray, nesjax.materialise(params, noise, i))
        (obs, _), total, done = single.reset(seed=3 + i // 2), 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = single.step(int(linear(theta, obs).argmax()))
            total, done = total + reward, terminated or truncated
        expected.append(-total)
    assert losses.tolist() == expected
    _, played = play(params, noise, seed=3, obs_stats=ObsStats.create((4,)))
    assert played.obs_stats.count == played.lengths.sum() > 8 * 5


def test_gymnasium_with_continuous_actions_learns_by_hand():
    population = nesjax.Population(8, std=0.3, antithetic=True)
    envs = gymnasium.make_vec("Pendulum-v1", num_envs=8)
    play, state = vector_rollout(envs, linear, population, steps=10), start(1, 3)
    noise = nesjax.sample_noise(KEY, state.params, population)
    losses, _ = play(state.params, noise, seed=0)
    grads = nesjax.estimate_gradient(noise, losses, shaping=nesjax.centered_rank)
    assert losses.shape == (8,) and (losses > 0).all() and jnp.abs(grads["w"]).max() > 0


SPACES = gymnasium.spaces


def spaces(**spaces):
    """A gymnax environment of these spaces."""
    env = FiveValues()
    for name, space in spaces.items():
        setattr(env, f"{name}_space", lambda params, space=space: space)
    return from_gymnax(env)


def test_spaces_become_trees_of_shapes():
    box = lambda *shape, dtype=np.float32: SPACES.Box(0, 255, shape, dtype)
    env = spaces(observation=SPACES.Dict(a=box(2), b=SPACES.Tuple([box(4, 4, dtype=np.uint8), SPACES.Discrete(3)])))
    assert env.obs_shape == {"a": (2,), "b": (jax.ShapeDtypeStruct((4, 4), jnp.uint8), ())}
    multi = spaces(action=SPACES.MultiDiscrete([2, 3])), spaces(action=SPACES.MultiBinary(4))
    assert [env.output_shape for env in multi] == [(5,), (4,)]
    trees = type("Trees", (LikeBrax,), {"observation_size": {"state": (3,), "pixels": 4}})
    assert from_brax(trees()).obs_shape == {"state": (3,), "pixels": (4,)}


def play(env=None, policy=linear, params=None, obs_stats=None, **options):
    return rollout(env or walk(), policy, **{"steps": 3, **options})(params or start().params, KEY, obs_stats)


@pytest.mark.parametrize(
    "do, error, message",
    [
        (lambda: spaces(action=SPACES.Discrete(2, start=1)), ValueError, r"Discrete \(from 0\)"),
        (lambda: spaces(action=SPACES.MultiDiscrete([2], start=[1])), ValueError, r"MultiDiscrete \(from 0\)"),
        (lambda: spaces(action=SPACES.Text(4)), ValueError, r"five must have Discrete .* actions, got Text"),
        (lambda: MultiDiscrete((2, 0)), ValueError, r"counts must be ints >= 1, got \(2, 0\)"),
        (lambda: MultiBinary(2.0), ValueError, "shape must be an int >= 1, got 2.0"),
        (lambda: from_gymnax((FiveValues(), None)), TypeError, "env must be a gymnax environment, got tuple"),
        (lambda: from_brax(FiveValues()), TypeError, "env must be a brax environment, got FiveValues"),
        (
            lambda: from_playground(LikeBrax()), TypeError,
            "env must be a MuJoCo Playground environment, got LikeBrax",
        ),
        (lambda: from_pgx(FiveValues()), TypeError, "env must be a pgx environment, got FiveValues"),
        (
            lambda: make_rl_step(walk(), linear, OPTIMIZER, POPULATION, steps=2)({}), TypeError,
            "state must be a nesjax.TrainState, got dict",
        ),
        (lambda: play(obs_stats={}), TypeError, "obs_stats must be a nesjax.rl.ObsStats or None, got dict"),
        (
            lambda: play(obs_stats=ObsStats.create(())), ValueError,
            r"obs_stats must be of observations of shape \(1,\), got \(\)",
        ),
        (
            lambda: play(obs_stats=ObsStats.create({"a": (1,)})), ValueError,
            r"obs_stats must be of observations of shape \(1,\), got {'a': \(1,\)}",
        ),
        (
            lambda: play(walk(obs_shape={"a": (1,)})), ValueError,
            r"walk's observation must have shape {'a': \(1,\)}, got \(1,\)",
        ),
        (lambda: spaces(observation=SPACES.Dict(a=SPACES.Text(2))), ValueError, "five must have observations that"),
        (lambda: play(walk(), lambda p, obs: jnp.zeros(3)), ValueError, r"action of walk, shape \(1,\), got \(3,\)"),
        (
            lambda: play(counter(3), lambda params, obs: jnp.zeros(())), ValueError,
            r"a preference for each action of environment, shape \(2,\), got \(\)",
        ),
        (lambda: play(walk(obs_shape=(2,))), ValueError, r"walk's observation must have shape \(2,\), got \(1,\)"),
        (
            lambda: play(walk(step=lambda key, x, action: (x, x, x, False))), ValueError,
            r"walk's reward must be a scalar, got shape \(1,\)",
        ),
        (lambda: walk(actions=(1.0, 0.0)), ValueError, r"actions must be bounds low <= high, got \(1.0, 0.0\)"),
        (lambda: walk(obs_shape=(2.5,)), ValueError, r"obs_shape must be a tuple of ints, got \(2.5,\)"),
        (lambda: walk(obs_shape=3), ValueError, "obs_shape must be a tuple of ints, got 3"),
        (lambda: walk(actions=1.5), ValueError, r"actions \(without bounds\) must be an int >= 1, got 1.5"),
        (lambda: walk(actions=(0.0, np.ones(1))), ValueError, r"actions must be bounds \(low, high\) of one shape"),
        (lambda: play(FiveValues()), TypeError, "env must be a nesjax.rl.Environment .*, got FiveValues"),
        (lambda: play(steps=0), ValueError, "steps must be an int >= 1, got 0"),
        (lambda: vector_rollout(None, linear, POPULATION, steps=0), ValueError, "steps must be an int >= 1, got 0"),
        (lambda: play(episodes=2.0), ValueError, "episodes must be an int >= 1, got 2.0"),
        (
            lambda: vector_rollout(gymnasium.make_vec("CartPole-v1", 3), linear, POPULATION, steps=5),
            ValueError, "envs must have an environment for each of 4 members, got 3",
        ),
        (
            lambda: vector_rollout(gymnasium.make_vec("CartPole-v1", 4), linear, POPULATION, steps=5)(0, 0, seed=0),
            ValueError, 'envs must take a list of seeds.*vectorization_mode="sync"',
        ),
        (
            lambda: vector_rollout(
                gymnasium.make_vec("CartPole-v1", 4), linear, nesjax.Population(4, std=0.1, group_size=2), steps=5
            ),
            ValueError, "group_size must be 1, .* got 2",
        ),
        (
            lambda: vector_rollout(gymnasium.make("CartPole-v1"), linear, POPULATION, steps=5),
            TypeError, "envs must be a gymnasium.vector.VectorEnv, got TimeLimit",
        ),
        (
            lambda: vector_rollout(gymnasium.make_vec("CartPole-v1", 4), linear, POPULATION, steps=5)(0, 0, seed=-1),
            ValueError, "seed must be an int >= 0, got -1",
        ),
        (
            lambda: vector_rollout(gymnasium.make_vec("CartPole-v1", 4), linear, 4, steps=5),
            TypeError, "population must be a nesjax.Population, got int",
        ),
    ],
)  # fmt: skip
def test_bad_input(do, error, message):
    with pytest.raises(error, match=message):
        do()
