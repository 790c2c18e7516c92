"""Cart-pole with its velocities hidden: a recurrent network balances it, the same network without memory can't.

Observed are the cart's place and the pole's angle alone. How fast they move has to be told from what was seen before,
which a GRU, of Flax Linen here, may remember: it is `policy(params, carry, obs) -> (carry, output)`.

Expected: a mean return of 500 of 500 over 100 fresh episodes (seeds 0 to 9), in half a minute from a cold start on two
CPU cores; with `--forget` 44 to 45 (seeds 0 to 2). The settings were chosen on seeds 3, 104 and 105.

    python examples/memory.py --seed 0
    python examples/memory.py --seed 0 --forget --out runs/forget
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import run
from cartpole import ENVIRONMENT, LONGEST

import nesjax

UNITS, STEPS = 16, 120


def reset(key):
    state, obs = ENVIRONMENT.reset(key)
    return state, obs[::2]


def move(key, state, action):
    state, obs, reward, done = ENVIRONMENT.step(key, state, action)
    return state, obs[::2], reward, done


HIDDEN = dataclasses.replace(ENVIRONMENT, reset=reset, step=move, obs_shape=(2,), name="cart-pole without velocities")


class Recurrent(nn.Module):
    """A recurrent cell and a preference for each action."""

    @nn.compact
    def __call__(self, carry, obs):
        carry, x = nn.GRUCell(UNITS)(carry, obs)
        return carry, nn.Dense(HIDDEN.actions)(x)


NETWORK, BLANK = Recurrent(), jnp.zeros(UNITS)


def forgetful(params, obs):
    return NETWORK.apply(params, BLANK, obs)[1]


def main():
    parser = run.options(__doc__, steps=STEPS, minutes=2)
    parser.add_argument("--forget", action="store_true", help="the same network without its memory")
    args = run.parse(parser)

    key, fresh = jax.random.key(args.seed), jax.random.key(2**31 + args.seed)  # of episodes that training doesn't see
    policy, carry = (forgetful, None) if args.forget else (NETWORK.apply, BLANK)
    params = NETWORK.init(key, BLANK, jnp.zeros(HIDDEN.obs_shape))
    population = nesjax.Population(size=256, std=0.1, antithetic=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
    state = nesjax.TrainState.create(
        params=params, optimizer=optimizer, key=key, obs_stats=nesjax.rl.ObsStats.create(HIDDEN.obs_shape)
    )
    # Longer episodes than are asked for: a cart that drifts would leave later.
    step = nesjax.rl.make_rl_step(HIDDEN, policy, optimizer, population, steps=2 * LONGEST, carry=carry)
    play = jax.jit(nesjax.rl.rollout(HIDDEN, policy, steps=LONGEST, episodes=100, carry=carry))

    def evaluate(state):
        return {"mean return": -play(state.params, fresh, state.obs_stats)[0]}

    _, figures = run.train(
        args, state, step, population, evaluate=evaluate, show=("return", "length"), title=HIDDEN.name
    )
    print(f"mean return {figures['mean return']:.1f} of {LONGEST} over 100 fresh episodes")


if __name__ == "__main__":
    main()
