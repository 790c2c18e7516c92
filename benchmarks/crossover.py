"""Noise on outputs against noise on weights where a loss moves by large perturbations alone: the 0/1 error of digits.

From scratch, groups of 8 members on the same images, of which a call sees 1, 8 or 64: the more there are, the more
noise on outputs one loss must credit. Both have the best std and rate of some pilots on seed 3, which isn't measured.
"""

import statistics
from collections.abc import Iterator

import jax

from .credit import EVERY, TASKS, setting, start
from .families import FAMILIES
from .tables import markdown

TASK = TASKS["digits, 0/1 error from scratch"]
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
    members = max(64, 1024 // images)
    made = setting(TASK, "plain", members=members, samples=images, group=8, rate=rate, std=std, noise=FAMILIES[method])
    params, train, held_out = start(TASK, seed)
    key, calls, curve = jax.random.key(seed + 1000), 0, []
    state = made.init(params, key)
    for check in range(1, CHECKS + 1):
        while calls * EVERY * made.evaluations * CHECKS < limit * check:
            state, calls = made.several(state, *train, jax.random.fold_in(key, calls)), calls + 1
        curve.append([calls * EVERY * made.evaluations, round(float(made.accuracy(state, *held_out)), 4)])
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
