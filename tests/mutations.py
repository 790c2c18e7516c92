"""Checkpoints damaged in every way, one change at a time: what is restored is right, or it is refused."""

import pathlib
import random
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

POPULATION = nesjax.Population(4, std=0.1)
KINDS = ("flip", "truncate", "delete", "zero")


def new_state() -> nesjax.TrainState:
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (160, 160)), "b": jax.random.normal(key, (33,)).astype(jnp.bfloat16)}
    return nesjax.TrainState.create(params=params, optimizer=optax.adam(0.1), key=key)


def damage(path: pathlib.Path, kind: str, draw: random.Random) -> None:
    """Flips one bit, cuts the end off, deletes the file, or writes zeros over a part of it."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(max(len(content), 1))
    if kind == "delete":
        path.unlink()
        return
    if kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del content[place:]
    elif kind == "zero":
        stop = min(len(content), place + draw.randint(1, 64))
        content[place:stop] = bytes(stop - place)
    path.write_bytes(content)


def mutate(folder: pathlib.Path, count: int, seed: int) -> Iterator[dict]:
    """Damages `count` copies of one checkpoint, every file in turn. A row each: file, kind and outcome.

    The outcome is "right" (restored to the bit, and the best one by its metrics), "refused" (ValueError or
    CheckpointError), or what came otherwise.
    """
    whole, broken, draw, state = folder / "whole", folder / "broken", random.Random(seed), new_state()
    with nesjax.checkpoint.Run(whole, POPULATION, keep=2, best="loss") as run:
        run.save(state, {"loss": 1.0})
        run.save(state.replace(step=jnp.int32(1)), {"loss": 2.0})  # so that the metrics decide which is the best
    later = whole / "nesjax_1"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and later not in path.parents)
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))]
    for at in range(count):
        file, kind = files[at % len(files)], KINDS[at // len(files) % len(KINDS)]
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        damage(broken / file, kind, draw)
        yield {"file": anonymous(file), "kind": kind, "outcome": outcome(broken, state, expected)}


def outcome(folder: pathlib.Path, state: nesjax.TrainState, expected: list[np.ndarray]) -> str:
    try:
        with nesjax.checkpoint.Run(folder, POPULATION, best="loss", read_only=True) as run:
            found, best = run.restore(state, step=0), run.best_step
    except (ValueError, nesjax.checkpoint.CheckpointError):
        return "refused"
    except Exception as error:
        return type(error).__name__
    leaves = jax.tree.leaves(found.replace(key=jax.random.key_data(found.key)))
    same = all(
        np.array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8)) for a, b in zip(leaves, expected) if a.ndim
    )
    return "right" if same and (found.step, best) == (0, 0) else "WRONG"


def anonymous(file: pathlib.Path) -> str:
    """A file's name without the random part of those that hold arrays."""
    return str(file.parent / "*") if file.parent.name == "d" else str(file)
