"""Brax's walker learns to run with a linear policy and no gradient, nearly as ARS does (Mania et al., 2018).

Expected: a mean return of about 1,600 over 8 fresh episodes of at most 1,000 steps (573 on average), after 255
generations or 8 million steps: seed 0 alone, in ten minutes on two CPU cores that were mostly busy with other work. The
ant (`--env ant`) did not learn to walk in 4 million steps: it stands, for about 800.

    python examples/brax_locomotion.py --seed 0 --render walker.html

An H100 plays more and longer episodes at a time (not run yet):

    python examples/brax_locomotion.py --population 4096 --length 1000 --minutes 10
"""

import contextlib
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import run

import nesjax

LONGEST, FRESH = 1000, 8
# Training's reward for a step on its feet; in evaluation it is 1. ARS leaves it out, lest standing still be learned.
# The ant, whose actions cost more, then learns to fall, which ends the costs.
ALIVE = {"walker2d": 0.0, "ant": 1.0}


def make(name: str, **settings):
    """Brax's environment, with nothing of what it and MuJoCo say as they are imported (on what we don't use)."""
    with contextlib.redirect_stdout(None), warnings.catch_warnings(action="ignore"):
        from brax import envs

        return envs.get_environment(name, backend="spring", **settings)


def policy(params, obs):
    return obs @ params["w"] + params["b"]


def render(brax_env, state, key, path: Path) -> None:
    """Writes an episode as a page for a browser, which then loads brax's viewer from the network."""
    from brax.io import html

    env = nesjax.rl.from_brax(brax_env)

    def move(carry, _):
        world, obs, alive = carry
        action = env.action(policy(state.params, state.obs_stats.normalise(obs)))
        after, obs, _, done = env.step(key, world, action)
        return (after, obs, alive & ~done), (world.pipeline_state, alive)

    film = jax.jit(lambda: jax.lax.scan(move, (*env.reset(key), True), length=LONGEST)[1])
    worlds, alive = jax.device_get(film())
    frames = [jax.tree.map(lambda x, at=at: x[at], worlds) for at in range(alive.sum())]
    path.write_text(html.render(brax_env.sys.tree_replace({"opt.timestep": brax_env.dt}), frames))


def main():
    parser = run.options(__doc__, steps=10_000, minutes=5)
    parser.add_argument("--env", choices=ALIVE, default="walker2d")
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--length", type=int, default=500, help="of training's episodes; evaluation's have 1,000 steps")
    parser.add_argument("--render", type=Path, metavar="PATH", help="writes an episode of the trained policy as HTML")
    args = run.parse(parser)

    training = nesjax.rl.from_brax(make(args.env, healthy_reward=ALIVE[args.env]))
    brax_env = make(args.env)
    env = nesjax.rl.from_brax(brax_env)
    key = jax.random.key(args.seed)
    params = {"w": jnp.zeros((*env.obs_shape, *env.output_shape)), "b": jnp.zeros(env.output_shape)}
    population = nesjax.Population(args.population, std=0.05, antithetic=True)
    optimizer = optax.adam(0.03)
    state = nesjax.TrainState.create(
        params=params, optimizer=optimizer, key=key, obs_stats=nesjax.rl.ObsStats.create(env.obs_shape)
    )
    step = nesjax.rl.make_rl_step(training, policy, optimizer, population, steps=args.length)

    play = jax.jit(nesjax.rl.rollout(env, policy, steps=LONGEST, episodes=FRESH))
    fresh = jax.random.key(2**31 + args.seed)  # episodes that training doesn't see

    def evaluate(state):
        loss, episodes = play(state.params, fresh, state.obs_stats)
        return {"mean return": -loss, "mean length": episodes.lengths.mean()}

    state, figures = run.train(
        args, state, step, population, evaluate=evaluate, show=("return", "length"), title=args.env
    )
    print(
        f"mean return {figures['mean return']:.0f}, mean length {figures['mean length']:.0f} of {LONGEST} steps, "
        f"over {FRESH} fresh episodes"
    )
    if args.render:
        render(brax_env, state, fresh, args.render)


if __name__ == "__main__":
    main()
