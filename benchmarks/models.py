"""Whole models, with one sample per member: what a population costs to compile and to run, over the plain model.

Compiling (tracing, lowering, XLA) `value_and_grad`, and what draws its noise alone, is compared with compiling the
plain model mapped over the same samples, in CPU time, each from empty caches. Running the population's losses, noise
drawn, and `value_and_grad` is compared with the plain model on the samples as one batch. The loss is the mean of a
sample's outputs.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nesjax

from .architectures import MODELS
from .measure import compiled, interleave, summary
from .tables import figure, pivot

# Noise on outputs is for what is multiplied or looked up.
NOISE: dict[str, Any] = {
    "LowRank": nesjax.LowRank(),
    "Permuted": nesjax.Permuted(),
    "Node": {"kernel|embedding": nesjax.Node(), "": nesjax.LowRank()},
}


def cases(quick: bool) -> list[dict]:
    chosen = [("brax PPO", "Node")] if quick else [(model, noise) for model in MODELS for noise in NOISE]
    members, compiles = (8, 1) if quick else (256, 3)
    return [{"model": model, "noise": noise, "members": members, "compiles": compiles} for model, noise in chosen]


def measure(model: str, noise: str, members: int, compiles: int) -> Iterator[dict]:
    """One row: CPU seconds of compiling, and seconds of running, each with its multiple of the plain model."""
    params, fn, x = MODELS[model](members)
    each = x[:, None]  # a batch of one sample per member
    population = nesjax.Population(members, std=0.02, noise=NOISE[noise])
    loss_fn = lambda params, x: fn(params, x).mean()
    generation = nesjax.value_and_grad(loss_fn, population, in_axes=0)

    def losses(params, key, x):
        noise = nesjax.sample_noise(key, params, population)
        return nesjax.population_apply(loss_fn, params, noise, x, in_axes=0)

    def draw(params, key):
        return jax.vmap(nesjax.sample_noise(key, params, population).direction)(jnp.arange(members))

    keys = [jax.random.key(at) for at in range(2)]
    programs = {
        "plain": (jax.vmap(loss_fn, (None, 0)), params, each),
        "drawing": (draw, params, keys[0]),
        "generation": (generation, params, keys[0], each),
    }
    rounds = [{name: compile_timed(*program) for name, program in programs.items()} for _ in range(compiles)]
    whole = rounds[-1]["generation"][0]
    seconds = {name: [took[name][1] for took in rounds] for name in programs}
    multiple = lambda name: statistics.median(b / a for a, b in zip(seconds["plain"], seconds[name]))
    evaluate, _ = compiled(losses, params, keys[0], each)
    batch, _ = compiled(lambda params, x: jax.vmap(lambda y: y.mean())(fn(params, x)), params, x)
    functions = {
        "plain": lambda key: batch(params, x),
        "losses": lambda key: evaluate(params, key, each),
        "generation": lambda key: whole(params, key, each),
    }
    times = interleave(functions, [(key,) for key in keys], rounds=9, seconds=8)
    yield {
        "compile": {**{name: statistics.median(all_) for name, all_ in seconds.items()},
                    "multiple": multiple("generation"), "multiple_of_drawing": multiple("drawing")},
        "plain": summary(times["plain"]),
        "losses": summary(times["losses"], times["plain"]),
        "generation": summary(times["generation"], times["plain"]),
    }  # fmt: skip


def compile_timed(function: Callable, *arguments: Any) -> tuple[Callable, float]:
    """A function compiled, and the CPU seconds of its tracing, lowering and compiling from empty caches."""
    jax.clear_caches()
    start = time.process_time()
    program, _ = compiled(function, *arguments)
    return program, time.process_time() - start


def table(results: dict) -> str:
    """Multiples of the plain model, by model and noise: compiling (drawing alone) / losses / losses and gradient."""

    def value(row):
        compiling, parts = row["compile"], (row["losses"]["multiple"][0], row["generation"]["multiple"][0])
        head = f"{figure(compiling['multiple'], 2)} ({figure(compiling['multiple_of_drawing'], 2)})"
        return " / ".join([head, *(figure(part, 2) for part in parts)])

    return pivot(results["rows"], "model", lambda row: row["noise"], value)
