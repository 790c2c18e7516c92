"""Brax's walker and ant learn to run with a linear policy and no gradient, with ARS's settings (Mania et al., 2018).

Expected in ten minutes on one CPU core, a mean return over 8 fresh episodes of 1,000 steps: walker2d 2,150, 2,910 and
2,620 (seeds 0 to 2), ant 4,160, 4,160 and 4,270, where standing still is worth 1,000. The rate falls to 0 over all
steps: at a constant one the walker ended in a wobble. The settings were chosen on seed 5.

    python examples/brax_locomotion.py --env ant --seed 0 --render ant.html

An H100 plays more episodes at a time (not run yet):

    python examples/brax_locomotion.py --env walker2d --population 4096
"""

import contextlib
import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import run

import nesjax

LONGEST, FRESH = 1000, 8  # evaluation: steps of an episode, and how many


@dataclasses.dataclass(frozen=True)
class Setting:
    """ARS's, found by a few short runs; `make` is how training's environment differs from that of evaluation.

    As in ARS, training has no reward for being alive, lest standing still be learned. The ant's actions cost so much
    that it would learn to fall, which ends the costs: so it can't.
    """

    population: int
    length: int
    rate: float
    make: dict


SETTINGS = {
    "walker2d": Setting(64, 1000, 0.1, {"healthy_reward": 0.0}),
    "ant": Setting(256, 100, 0.1, {"healthy_reward": 0.0, "terminate_when_unhealthy": False}),
}


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
    parser = run.options(__doc__, steps=500, minutes=10)
    parser.add_argument("--env", choices=SETTINGS, default="walker2d")
    parser.add_argument("--population", type=run.at_least(4), help="members, a multiple of 4")
    parser.add_argument("--length", type=run.at_least(1), help="of training's episodes")
    parser.add_argument("--render", type=Path, metavar="PATH", help="writes an episode of the trained policy as HTML")
    args = run.parse(parser)
    if args.render and not args.render.parent.is_dir():
        parser.error(f"argument --render: {args.render.parent} is not a folder")
    run.need("brax")
    setting = SETTINGS[args.env]
    size, length = args.population or setting.population, args.length or setting.length

    training = nesjax.rl.from_brax(make(args.env, **setting.make))
    brax_env = make(args.env)
    env = nesjax.rl.from_brax(brax_env)
    key = jax.random.key(args.seed)
    params = {"w": jnp.zeros((*env.obs_shape, *env.output_shape)), "b": jnp.zeros(env.output_shape)}
    population = run.population(parser, size, std=0.05, antithetic=True)
    optimizer = optax.sgd(optax.cosine_decay_schedule(setting.rate, args.steps))  # else it ends in a wobble
    state = nesjax.TrainState.create(
        params=params, optimizer=optimizer, key=key, obs_stats=nesjax.rl.ObsStats.create(env.obs_shape)
    )
    best = nesjax.top_k(size // 4)  # half of the pairs
    step = nesjax.rl.make_rl_step(training, policy, optimizer, population, steps=length, shaping=best)

    play = jax.jit(nesjax.rl.rollout(env, policy, steps=LONGEST, episodes=FRESH))
    fresh = jax.random.key(2**31 + args.seed)  # episodes that training doesn't see

    def evaluate(state):
        loss, episodes = play(state.params, fresh, state.obs_stats)
        return {"mean return": -loss, "mean length": episodes.lengths.mean()}

    state, figures = run.train(
        args, state, step, population, evaluate=evaluate, show=("return", "length"), title=args.env
    )
    print(
        f"mean return {figures['mean return']:.1f}, mean length {figures['mean length']:.0f} of {LONGEST} steps, "
        f"over {FRESH} fresh episodes"
    )
    if args.render:
        render(brax_env, state, fresh, args.render)


if __name__ == "__main__":
    main()
