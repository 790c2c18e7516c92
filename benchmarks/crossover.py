"""Noise on outputs against noise on weights where a loss moves by large perturbations alone: the 0/1 error of digits.

From scratch, groups of 8 members on the same images, of which a call sees 1, 8 or 64: the more there are, the more
noise on outputs one loss must credit. Both have the best std and rate of some pilots on seed 3, which isn't measured.
"""

import functools
import math
import statistics
from collections.abc import Iterator

import jax
import optax

import nesjax

from .credit import TASKS, Net, start
from .tables import markdown

GROUP = 8
NOISE = {"LowRank": nesjax.LowRank(), "Node": {"kernel": nesjax.Node(), "": nesjax.LowRank()}}
SETTINGS = {  # by images a call: std and rate
    1: {"LowRank": (0.06, 0.01), "Node": (0.3, 0.001)},
    8: {"LowRank": (0.06, 0.01), "Node": (0.3, 0.001)},
    64: {"LowRank": (0.06, 0.01), "Node": (0.3, 0.003)},
}
LIMIT, CHECKS = 401_408, 4  # images evaluated in a run, and evaluations of it


def cases(quick: bool) -> list[dict]:
    return [
        {"images": images, "method": method, "std": std, "rate": rate, "seed": seed, "limit": 1 if quick else LIMIT}
        for images, methods in SETTINGS.items()
        for method, (std, rate) in methods.items()
        for seed in range(1 if quick else 3)
    ]


def measure(images: int, method: str, std: float, rate: float, seed: int, limit: int) -> Iterator[dict]:
    """A row: held-out accuracy at parts of the limit."""
    task, members, optimizer = TASKS["digits, 0/1 error from scratch"], max(64, 1024 // images), optax.adam(rate)
    params, (x, y), (test_x, test_y) = start(task, seed)
    net = Net((256, 256, 10), task.activation)
    population = nesjax.Population(members, std, group_size=GROUP, noise=NOISE[method])
    loss_fn = lambda params, x, y: task.loss(net.apply(params, x), y)
    train = nesjax.make_train_step(loss_fn, optimizer, population, in_axes=0)

    @functools.partial(jax.jit, static_argnums=2)
    def several(state, key, generations):
        def step(state, key):
            rows = jax.random.randint(key, (members // GROUP, images), 0, len(x))
            return train(state, x[rows], y[rows])[0], None

        return jax.lax.scan(step, state, jax.random.split(key, generations))[0]

    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=jax.random.key(seed))
    generations, curve = math.ceil(limit / (CHECKS * members * images)), []
    for key in jax.random.split(jax.random.key(seed + 1000), CHECKS):
        state = several(state, key, generations)
        reached = (net.apply(state.params, test_x).argmax(-1) == test_y).mean()
        curve.append([(len(curve) + 1) * generations * members * images, round(float(reached), 4)])
    yield {"members": members, "curve": curve}


def table(results: dict) -> str:
    """Held-out accuracies at parts of the limit: median and range of the seeds."""
    lines = []
    for images, method in dict.fromkeys((row["images"], row["method"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["images"], row["method"]) == (images, method)]
        cells = []
        for checks in zip(*(row["curve"] for row in rows)):
            ends = sorted(reached for _, reached in checks)
            cells.append(
                f"{statistics.median(ends):.3f} ({ends[0]:.3f} to {ends[-1]:.3f}) at {checks[0][0] / 1e3:,.0f}k"
            )
        first = rows[0]
        setting = f"N {first['members']}, std {first['std']}, rate {first['rate']}"
        lines.append([str(images), method, setting, *cells])
    header = ["images a call", "noise", "setting", "held-out accuracy at images", *[""] * (CHECKS - 1)]
    return markdown(header, lines)
