"""Checkpoints of many small arrays, and of large ones: CPU time against `numpy.savez`, and peak memory."""

import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

from .measure import in_own_process, peak_bytes
from .tables import count, figure, markdown

POPULATION = nesjax.Population(4, std=0.1)


def cases(quick: bool) -> list[dict]:
    """The second is 2 GB."""
    shapes = ((100, 8), (4, 2**16)) if quick else ((100_000, 8), (32, 2**24))
    return [{"arrays": arrays, "floats": floats} for arrays, floats in shapes]


def both_ways(arrays: int, floats: int) -> dict[str, Any]:
    """Saves and restores once, in a process that has done nothing else."""
    draw = np.random.default_rng(0)
    params = {f"w{at}": draw.normal(size=floats).astype(np.float32) for at in range(arrays)}
    key = jax.random.key(0)
    like = nesjax.TrainState.create(params=params, optimizer=optax.sgd(0.1), key=key)
    with tempfile.TemporaryDirectory() as folder:
        plain, run = pathlib.Path(folder, "plain.npz"), pathlib.Path(folder, "run")
        nesjax.checkpoint.save(pathlib.Path(folder, "first"), like.replace(params=jnp.zeros(1)), POPULATION)  # imports
        steps = {
            "savez": lambda: np.savez(plain, **params),
            "load": lambda: {name: jnp.asarray(x) for name, x in np.load(plain).items()},
            "save": lambda: nesjax.checkpoint.save(run, like, POPULATION),
            "restore": lambda: nesjax.checkpoint.restore(run, like, POPULATION),
        }
        found = {name: spent(step) for name, step in steps.items()}
    return {f"{name}_{what}": value for name, pair in found.items() for what, value in pair.items()}


def spent(run: Callable[[], Any]) -> dict[str, float]:
    begin = time.process_time()
    peak = peak_bytes(run)
    return {"seconds": time.process_time() - begin, "bytes": peak}


def measure(arrays: int, floats: int) -> Iterator[dict[str, Any]]:
    yield in_own_process(both_ways, arrays, floats)


def table(results: dict) -> str:
    def row(found: dict) -> list[str]:
        size = 4 * found["arrays"] * found["floats"]
        times = lambda ours, plain: (
            f"{figure(found[f'{ours}_seconds'])} ({figure(found[f'{ours}_seconds'] / found[f'{plain}_seconds'])})"
        )
        memory = lambda ours: f"{count(found[f'{ours}_bytes'])} ({figure(found[f'{ours}_bytes'] / size)})"
        figures = times("save", "savez"), times("restore", "load"), memory("save"), memory("restore")
        return [f"{found['arrays']:,} of {found['floats']:,} floats", count(size), *figures]

    header = ["arrays", "size", "save, s", "restore, s", "memory to save", "memory to restore"]
    return markdown(header, map(row, results["rows"]))
