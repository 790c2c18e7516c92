"""Cart-pole balanced by a small network that never saw a gradient. The environment is one of your own, in plain JAX.

Expected: a mean return of 500 of 500 over 100 fresh episodes, in under a minute from a cold start on two CPU cores.

    python examples/cartpole.py --seed 0
"""

import jax
import jax.numpy as jnp
import optax
import run

import nesjax

LONGEST = 500


def reset(key):
    state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return state, state


def move(key, state, action):
    """Barto, Sutton and Anderson's cart and pole (1983), with Gymnasium's CartPole-v1's constants."""
    _, speed, angle, turn = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turn**2 * sine) / 1.1
    bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    state = state + 0.02 * jnp.stack([speed, push - 0.05 * bend * cosine / 1.1, turn, bend])
    return state, state, 1.0, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.2095)


ENVIRONMENT = nesjax.rl.Environment(reset, move, obs_shape=(4,), actions=2, name="cart-pole")


def policy(params, obs):
    hidden = jnp.tanh(obs @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def main():
    parser = run.options(__doc__, steps=60, minutes=2)
    parser.add_argument("--population", type=int, default=256, help="members, an even number")
    args = run.parse(parser)

    key = jax.random.key(args.seed)
    params = {"w1": 0.5 * jax.random.normal(key, (4, 16)), "b1": jnp.zeros(16), "w2": jnp.zeros((16, 2))}
    population = run.population(parser, args.population, std=0.3, antithetic=True)
    optimizer = optax.adam(0.1)
    state = nesjax.TrainState.create(
        params=params, optimizer=optimizer, key=key, obs_stats=nesjax.rl.ObsStats.create(ENVIRONMENT.obs_shape)
    )
    step = nesjax.rl.make_rl_step(ENVIRONMENT, policy, optimizer, population, steps=LONGEST)

    play = jax.jit(nesjax.rl.rollout(ENVIRONMENT, policy, steps=LONGEST, episodes=100))
    fresh = jax.random.key(2**31 + args.seed)  # episodes that training doesn't see

    def evaluate(state):
        return {"mean return": -play(state.params, fresh, state.obs_stats)[0]}

    _, figures = run.train(
        args, state, step, population, evaluate=evaluate, show=("return", "length"), title="cart-pole"
    )
    print(f"mean return {figures['mean return']:.1f} of {LONGEST} over 100 fresh episodes")


if __name__ == "__main__":
    main()
