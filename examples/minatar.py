"""A small convolutional network learns a MinAtar game, of pgx, from its pixels: no value function, no gradient.

Expected in Breakout: a mean return of 3.4, 4.3 and 4.3 over 128 fresh episodes (seeds 0 to 2), where random actions get
0.4, in three minutes on two CPU cores. The other games were not tried for long.

    python examples/minatar.py --game breakout --seed 0
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import run

import nesjax

LONGEST, FRESH = 500, 128
CHANNELS, HIDDEN = 8, 32
GAMES = "asterix", "breakout", "freeway", "seaquest", "space_invaders"


def create(key, env):
    """The network's weights, all of about 1, so that one std and one learning rate fit all."""
    height, width, channels = env.obs_shape
    shapes = (9 * channels, CHANNELS), ((height - 2) * (width - 2) * CHANNELS, HIDDEN), (HIDDEN, env.actions)
    return [jax.random.normal(key, shape) for key, shape in zip(jax.random.split(key, 3), shapes)]


def policy(params, obs):
    """A convolution of 3 x 3 pixels, a hidden layer, a preference for each action."""
    window, hidden, output = params
    height, width, _ = obs.shape
    # One product for all windows: every member has weights of its own, for which XLA's convolution on CPUs is slow.
    parts = [obs[row : row + height - 2, column : column + width - 2] for row in range(3) for column in range(3)]
    x = jnp.concatenate(parts, -1)
    for weights in (window, hidden):
        x = jax.nn.relu(x @ weights / len(weights) ** 0.5).reshape(-1)
    return x @ output


def at_random(env):
    """The environment where whatever the policy wants, a legal action is drawn at random."""

    def step(key, state, action):
        action = jax.random.categorical(jax.random.fold_in(key, 0), jnp.log(env.legal(state)))
        return env.step(key, state, action)

    return dataclasses.replace(env, step=step)


def main():
    parser = run.options(__doc__, steps=10_000, minutes=3)
    parser.add_argument("--game", choices=GAMES, default="breakout")
    parser.add_argument("--population", type=int, default=256, help="members, an even number")
    parser.add_argument("--length", type=run.at_least(1), default=100, help="of training's episodes")
    args = run.parse(parser)
    run.need("pgx")
    import pgx

    env = nesjax.rl.from_pgx(pgx.make(f"minatar-{args.game}"))
    key = jax.random.key(args.seed)
    # An action changes only where preferences cross: normal noise, which reaches farther than signs (not compared).
    noise = nesjax.LowRank(values="normal")
    population = run.population(parser, args.population, std=0.3, antithetic=True, noise=noise)
    optimizer = optax.adam(0.05)
    stats = nesjax.rl.ObsStats.create(env.obs_shape)  # pixels that never change vanish, rare ones weigh more
    state = nesjax.TrainState.create(params=create(key, env), optimizer=optimizer, key=key, obs_stats=stats)
    step = nesjax.rl.make_rl_step(env, policy, optimizer, population, steps=args.length, episodes=2)

    play = jax.jit(nesjax.rl.rollout(env, policy, steps=LONGEST, episodes=FRESH))
    fresh = jax.random.key(2**31 + args.seed)  # episodes that training doesn't see

    def evaluate(state):
        return {"mean return": -play(state.params, fresh, state.obs_stats)[0]}

    _, figures = run.train(
        args, state, step, population, evaluate=evaluate, show=("return", "length"), title=f"MinAtar {args.game}"
    )
    chance = jax.jit(nesjax.rl.rollout(at_random(env), policy, steps=LONGEST, episodes=FRESH))
    random = -chance(state.params, fresh)[0]
    print(f"mean return {figures['mean return']:.2f} (trained), {random:.2f} (random) over {FRESH} fresh episodes")


if __name__ == "__main__":
    main()
