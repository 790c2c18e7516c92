"""Policies with memory and chance, and what they observe: trees, images."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environments import KEY, POPULATION, echo, linear, start, walk
from flax import nnx

import nesjax
from nesjax.rl import Environment, MultiBinary, MultiDiscrete, ObsStats, make_rl_step, rollout, vector_rollout


def test_what_a_policy_carries_begins_anew_in_each_episode():
    count = lambda params, carry, obs: (carry + 1, carry[None])
    loss, played = rollout(echo((-np.ones(1), 9 * np.ones(1))), count, steps=5, episodes=2, carry=0.0)(None, KEY)
    assert loss == -10 and played.returns.tolist() == [10, 10]


def linen_gru():
    cell, carry = nn.GRUCell(3), jnp.zeros(3)

    def policy(params, carry, obs):
        carry, x = cell.apply(params, carry, obs)
        return carry, x[:1]

    return cell.init(KEY, carry, jnp.zeros(1)), carry, policy


def nnx_lstm():
    cell = nnx.LSTMCell(1, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell, nnx.Param)

    def policy(params, carry, obs):
        carry, x = nnx.merge(graph, params)(carry, obs)
        return carry, x[:1]

    return params, cell.initialize_carry((1,), nnx.Rngs(0)), policy


def equinox_gru():
    params, static = eqx.partition(eqx.nn.GRUCell(1, 3, key=KEY), eqx.is_inexact_array)

    def policy(params, carry, obs):
        carry = eqx.combine(params, static)(obs, carry)
        return carry, carry[:1]

    return params, jnp.zeros(3), policy


@pytest.mark.parametrize("cell", [linen_gru, nnx_lstm, equinox_gru])
def test_recurrent_cells_of_every_library(cell):
    """A member plays as its materialised parameters do, and otherwise than without memory."""
    params, carry, policy = cell()
    loss_fn = rollout(walk(), policy, steps=4, carry=carry)
    noise = nesjax.sample_noise(KEY, params, nesjax.Population(2, std=0.5))
    losses, _ = jax.jit(lambda: nesjax.population_apply(loss_fn, params, noise, KEY))()
    expected, _ = jax.jit(lambda: loss_fn(nesjax.materialise(params, noise, 1), KEY))()
    assert losses[1] == pytest.approx(float(expected), rel=1e-4)
    forgetful = rollout(walk(), lambda params, obs: policy(params, carry, obs)[1], steps=4)
    assert abs(jax.jit(forgetful)(nesjax.materialise(params, noise, 1), KEY)[0] - expected) > 1e-4


@pytest.mark.parametrize(
    "actions, output, preferred, mean, deviation",
    [
        (3, np.log([0.5, 0.2, 0.3]), 0, 0.8, 0.87),
        ((-9 * np.ones(2), 9 * np.ones(2)), (np.array([2.0, -1.0]), np.log([0.5, 1.0])), 1, 1, 1.12),
        (MultiDiscrete((2, 3)), np.log([0.3, 0.7, 0.5, 0.2, 0.3]), 1, 1.5, 0.98),
        (MultiBinary((1, 2)), np.array([[0.0, 2.0]]), 1, 1.38, 0.6),
    ],
)
def test_actions_are_preferred_or_drawn(actions, output, preferred, mean, deviation):
    policy = lambda params, obs: jax.tree.map(jnp.asarray, output)
    play = lambda **options: rollout(echo(actions), policy, steps=1, **options)(None, KEY)[1].returns
    assert play().tolist() == [preferred]
    drawn = play(sample=True, episodes=4000)
    assert drawn.mean() == pytest.approx(mean, abs=0.07) and drawn.std() == pytest.approx(deviation, abs=0.05)


def test_partners_draw_the_same_and_others_do_not():
    population = nesjax.Population(8, std=optax.constant_schedule(0.0), antithetic=True)
    loss_fn = rollout(echo(1000), lambda params, obs: jnp.zeros(1000) + params["b"], steps=5, sample=True)
    noise = nesjax.sample_noise(KEY, start().params, population, step=0)
    losses, _ = nesjax.population_apply(loss_fn, start().params, noise, nesjax.member_keys(KEY, population), in_axes=0)
    pairs = losses.reshape(4, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() and len(np.unique(losses)) == 4


def test_illegal_actions_are_not_drawn():
    legal = lambda x: jnp.array([False, True, False])
    loss, _ = rollout(echo(3, legal=legal), lambda params, obs: jnp.zeros(3), steps=8, sample=True)(None, KEY)
    assert loss == -8


SEEN = {"camera": jax.ShapeDtypeStruct((2, 2), jnp.uint8), "joints": {"left": (3,), "right": ()}}


def looking() -> Environment:
    """Observes a tree: an image, and two kinds of joints that count the steps."""

    def obs(at):
        joints = {"left": at * jnp.arange(3), "right": -at}
        return {"camera": jnp.full((2, 2), 51 * at, jnp.uint8), "joints": joints}

    step = lambda key, at, action: (at + 1, obs(at + 1), action[0], False)
    return Environment(lambda key: (jnp.int32(0), obs(jnp.int32(0))), step, SEEN, (-np.ones(1), np.ones(1)))


@pytest.mark.parametrize("declared", [True, False])
def test_observations_are_trees_with_statistics_per_leaf_and_none_of_images(declared):
    env, stats = looking(), ObsStats.create(SEEN)
    if not declared:
        env = dataclasses.replace(env, obs_shape=SEEN | {"camera": (2, 2)})
        stats = ObsStats.create(env.obs_shape)
    pixels = lambda params, obs: obs["camera"][0, :1]  # 0, 0.2, 0.4 ...
    loss, played = rollout(env, pixels, steps=5)(None, KEY)
    assert loss == pytest.approx(-2) and played.obs_stats is None
    loss, played = rollout(env, pixels, steps=5, episodes=2)(None, KEY, stats)
    mean, m2 = played.obs_stats.mean, played.obs_stats.m2
    assert loss == pytest.approx(-2) and played.obs_stats.count == 10
    assert mean["joints"]["left"].tolist() == [0, 2, 4] and mean["joints"]["right"] == -2
    assert m2["joints"]["right"] == 20 and not mean["camera"].any()
    seen = played.obs_stats.normalise({"camera": jnp.full((2, 2), 255, jnp.uint8), "joints": mean["joints"]})
    assert (seen["camera"] == 1).all() and not seen["joints"]["left"].any()


class Panel(gymnasium.Env):
    """Observes a dict, takes two choices; the reward is how many are as the observation says."""

    observation_space = gymnasium.spaces.Dict(
        asked=gymnasium.spaces.Box(0, 9, (2,)), camera=gymnasium.spaces.Box(0, 255, (2, 2), np.uint8)
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def _obs(self):
        self.asked = self.np_random.integers(2, size=2)
        return {"asked": self.asked.astype(np.float32), "camera": np.full((2, 2), 255, np.uint8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        reward = float((action == self.asked).sum())
        return self._obs(), reward, False, False, {}


@pytest.mark.parametrize("sample", [False, True])
def test_vector_environments_with_trees_choices_and_memory(sample):
    """The policy does as asked until it has played three steps; with doubts, if it draws."""

    def policy(params, carry, obs):
        asked = obs["asked"] * obs["camera"][0, 0]
        wanted = jnp.concatenate([jnp.arange(2) == asked[0], jnp.arange(3) == asked[1]])
        return carry + 1, jnp.where(carry < 3, 1.0, -1.0) * (10.0 - 9 * sample) * wanted + params["b"]

    envs = gymnasium.vector.SyncVectorEnv([Panel] * 4)
    population = nesjax.Population(4, std=optax.constant_schedule(0.0), antithetic=True)
    noise = nesjax.sample_noise(KEY, {"b": jnp.zeros(5)}, population, step=0)
    play = vector_rollout(envs, policy, population, steps=6, carry=0, sample=sample)
    losses, _ = play({"b": jnp.zeros(5)}, noise, seed=0)
    assert losses[0] == losses[1] and losses[2] == losses[3] and (losses <= -3).all()
    assert (losses != -6).any() if sample else (losses == -6).all()
    if not sample:
        shape = {"asked": (2,), "camera": jax.ShapeDtypeStruct((2, 2), jnp.uint8)}
        stats = play({"b": jnp.zeros(5)}, noise, seed=0, obs_stats=ObsStats.create(shape))[1].obs_stats
        assert stats.count == 24 and stats.mean["asked"].shape == (2,) and stats.mean["camera"].shape == ()


def test_many_runs_at_once_and_many_generations_in_one_scan():
    """Under an outer vmap over keys and rates, and inside `lax.scan`, a run is what it is alone."""
    optimizer = optax.inject_hyperparams(optax.adam)(0.1)
    policy = lambda params, carry, obs: (carry + obs, (linear(params, obs + carry), jnp.zeros(1)))
    play = make_rl_step(walk(), policy, optimizer, POPULATION, steps=4, carry=jnp.zeros(1), sample=True)

    def create(key, rate):
        state = nesjax.TrainState.create(
            params=start().params, optimizer=optimizer, key=key, obs_stats=ObsStats.create((1,))
        )
        state.opt_state.hyperparams["learning_rate"] = rate
        return state

    def train(state):
        return jax.lax.scan(lambda state, _: play(state), state, length=3)

    keys, rates = jax.random.split(KEY, 2), jnp.array([0.1, 0.01])
    runs, metrics = jax.jit(jax.vmap(train))(jax.vmap(create)(keys, rates))
    assert metrics["return"].shape == (2, 3)
    for i in range(2):
        state = create(keys[i], rates[i])
        for at in range(3):
            state, alone = play(state)
            assert alone["return"] == pytest.approx(float(metrics["return"][i, at]), rel=1e-4)
        together = jax.tree.map(lambda x, i=i: x[i], (runs.params, runs.obs_stats))
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        jax.tree.map(same, together, (state.params, state.obs_stats))
    assert play._cache_size() == 1


def play(policy=linear, **options):
    return rollout(walk(), policy, steps=3, **options)(start().params, KEY)


@pytest.mark.parametrize(
    "do, error, message",
    [
        (lambda: play(policy=3), TypeError, "policy must be a function of .*, got int"),
        (lambda: play(carry="none"), TypeError, "carry must be a tree of arrays, got 'none'"),
        (
            lambda: play(policy=lambda params, carry, obs: obs, carry=jnp.zeros(2)), TypeError,
            r"policy must return \(carry, output\) where there is a carry, got \w*Tracer",
        ),
        (
            lambda: play(policy=lambda params, carry, obs: (carry, obs, obs), carry=jnp.zeros(2)), TypeError,
            r"policy must return \(carry, output\) where there is a carry, got a tuple of 3",
        ),
        (
            lambda: play(policy=lambda params, carry, obs: (carry[:1], obs), carry=jnp.zeros(2)), ValueError,
            r"policy must return a carry like the one it is given, float32\[2\], got float32\[1\]",
        ),
        (
            lambda: play(policy=lambda params, carry, obs: (carry + 0.5, obs), carry=0), ValueError,
            r"policy must return a carry like the one it is given, int32\[\], got float32\[\]",
        ),
        (
            lambda: play(policy=lambda params, carry, obs: ({"h": carry}, obs), carry=jnp.zeros(2)), ValueError,
            r"a carry like the one it is given, float32\[2\], got {'h': 'float32\[2\]'}",
        ),
        (
            lambda: play(sample=True), ValueError,
            r"policy must return the mean and log-std of an action of walk, shape \(\(1,\), \(1,\)\), got \(1,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(do, error, message):
    with pytest.raises(error, match=message):
        do()
