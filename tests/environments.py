"""Environments, a policy and a state that several test files use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax
from nesjax.rl import Environment

KEY = jax.random.key(0)
OPTIMIZER = optax.adam(0.1)
POPULATION = nesjax.Population(4, std=0.1)


def walk(**changes) -> Environment:
    """A point on a line that starts anywhere, is rewarded for being near 0 and is lost beyond 3."""

    def reset(key):
        x = jax.random.uniform(key, (1,), minval=-2, maxval=2)
        return x, x

    def step(key, x, action):
        x = x + action + 0.1 * jax.random.normal(key, (1,))
        return x, x, 1 - jnp.abs(x[0]), jnp.abs(x[0]) > 3

    fields = {"reset": reset, "step": step, "obs_shape": (1,), "actions": (-np.ones(1), np.ones(1)), "name": "walk"}
    return Environment(**fields | changes)


def echo(actions, **fields) -> Environment:
    """Observes nothing of interest; the reward is the sum of the action."""
    step = lambda key, x, action: (x, x, jnp.sum(action * 1.0), False)
    return Environment(lambda key: (jnp.zeros(1), jnp.zeros(1)), step, (1,), actions, **fields)


def linear(params, obs):
    return obs @ params["w"] + params["b"]


def start(outputs: int = 1, obs: int = 1, **more) -> nesjax.TrainState:
    params = {"w": jnp.zeros((obs, outputs)), "b": jnp.zeros(outputs)}
    return nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=KEY, **more)
