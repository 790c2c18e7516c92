"""A task of MuJoCo Playground's dm_control suite, learned by a small network without a gradient.

Expected for CartpoleBalance: a mean return of 999 of 1,000 over 16 fresh episodes (seeds 0 to 2), in two minutes on two
CPU cores, of which compiling is half. The settings were chosen on seeds 0 and 100. PendulumSwingup and ReacherEasy are
not solved by them. CheetahRun and HopperHop, which have contacts, run as well: compiling takes a CPU minute. Two
generations of 8 members are all that was tried of these.

    pip install -e ".[playground]"
    python examples/playground.py --env CartpoleBalance --seed 0
"""

import contextlib
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import run

import nesjax

FRESH = 16  # episodes of an evaluation
STEPS = 150


def make(name: str):
    """Playground's environment and its longest episode, with nothing of what it says as it is imported."""
    with contextlib.redirect_stdout(None), warnings.catch_warnings(action="ignore"):
        from mujoco_playground import registry

        config = registry.get_default_config(name)
        env = registry.load(name, config=config, config_overrides={"impl": "jax"})  # it runs on a CPU too
        return nesjax.rl.from_playground(env), config.episode_length


def main():
    parser = run.options(__doc__, steps=STEPS, minutes=5)
    parser.add_argument(
        "--env", default="CartpoleBalance", help="of the dm_control suite; CartpoleBalance if not given"
    )
    parser.add_argument("--population", type=int, default=128, help="members, an even number")
    args = run.parse(parser)
    run.need("playground", extra="playground")
    env, longest = make(args.env)

    key = jax.random.key(args.seed)
    network = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(*env.output_shape)])
    population = run.population(parser, args.population, std=0.1, antithetic=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, STEPS))
    # Observations are of about 1 as they are. Statistics would be those of the falls that learning begins with.
    params = network.init(key, jnp.zeros(env.obs_shape))
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)
    step = nesjax.rl.make_rl_step(env, network.apply, optimizer, population, steps=longest)

    play = jax.jit(nesjax.rl.rollout(env, network.apply, steps=longest, episodes=FRESH))
    fresh = jax.random.key(2**31 + args.seed)  # episodes that training doesn't see

    def evaluate(state):
        return {"mean return": -play(state.params, fresh)[0]}

    _, figures = run.train(args, state, step, population, evaluate=evaluate, show=("return",), title=args.env)
    print(f"mean return {figures['mean return']:.1f} of {longest} over {FRESH} fresh episodes")


if __name__ == "__main__":
    main()
