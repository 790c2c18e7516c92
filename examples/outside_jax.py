"""Losses that JAX never sees: a cart-pole simulated in plain Python by a pool of processes, trained by NES.

`sample_noise` is the generation, `nesjax.outside.evaluate` sends each member's parameters as ordinary arrays to the
workers of an executor (processes, Dask's, a robot's), and `estimate_gradient` turns the losses that come back into a
gradient. A worker that dies is replaced; a member that takes more than a minute counts as failed.

Expected: a mean return of at least 450 of 500 over 20 fresh episodes, in under a minute on two CPU cores.

    python examples/outside_jax.py --seed 0
"""

import concurrent.futures
import math
import multiprocessing
import random
import signal

import numpy as np

STEPS = 500  # the longest episode


def loss(params: dict[str, np.ndarray], seed: int) -> int:
    """Minus the steps for which a policy (4 inputs, 8 hidden units) keeps the pole up: a simulator without JAX."""
    draw = random.Random(int(seed))
    x, speed, angle, turn = (draw.uniform(-0.05, 0.05) for _ in range(4))
    for step in range(STEPS):
        hidden = np.tanh(np.array([x, speed, angle, turn]) @ params["w1"] + params["b1"])
        force = 10.0 if hidden @ params["w2"] > 0 else -10.0
        sine, cosine = math.sin(angle), math.cos(angle)
        push = (force + 0.05 * turn**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        x, speed = x + 0.02 * speed, speed + 0.02 * (push - 0.05 * bend * cosine / 1.1)
        angle, turn = angle + 0.02 * turn, turn + 0.02 * bend
        if abs(x) > 2.4 or abs(angle) > 0.2095:
            return -step - 1
    return -STEPS


def main():
    import jax  # here, so that the pool's processes, which import this file, don't load it
    import jax.numpy as jnp
    import optax
    import run

    import nesjax

    parser = run.options(__doc__, steps=100, minutes=5)
    parser.add_argument("--processes", type=run.at_least(1), default=2)
    args = run.parse(parser)

    key = jax.random.key(args.seed)
    params = {"w1": 0.5 * jax.random.normal(key, (4, 8)), "b1": jnp.zeros(8), "w2": jnp.zeros(8)}
    # A threshold decides the action: normal noise sees farther than signs do.
    population = nesjax.Population(size=64, std=0.3, antithetic=True, noise=nesjax.Gaussian())
    optimizer = optax.adam(0.2)
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)

    @jax.jit
    def sample(state):
        return nesjax.sample_noise(jax.random.fold_in(state.key, state.step), state.params, population)

    update = run.updated(optimizer, nesjax.centered_rank)

    def make_pool():
        ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
        return concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), *ignore)

    with nesjax.outside.Renewed(make_pool) as pool:

        def step(state):
            noise = sample(state)
            pairs = np.arange(population.size) // 2  # partners see the same episode
            seeds = pairs + population.size * (int(state.step) + 1_000_000 * args.seed)
            losses = nesjax.outside.evaluate(loss, state.params, noise, seeds, in_axes=0, executor=pool, deadline=60)
            return update(state, noise, losses), {"return": -np.nanmean(losses)}

        def evaluate(state):
            fresh = range(10**12, 10**12 + 20)  # episodes that training doesn't see
            return {"mean return": -np.mean(list(pool.map(loss, [jax.device_get(state.params)] * 20, fresh)))}

        _, figures = run.train(args, state, step, population, evaluate=evaluate, show=("return",), title="outside JAX")
    print(f"mean return {figures['mean return']:.1f} of {STEPS} over 20 fresh episodes")


if __name__ == "__main__":
    main()
