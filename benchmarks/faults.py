"""Training that is killed over and over, also while it saves: what lies on the disk is whole, and it goes on exactly.

`python -m benchmarks.faults FOLDER EVERY` is the training that is killed.
"""

import contextlib
import hashlib
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

from .measure import ROOT
from .tables import markdown

POPULATION = nesjax.Population(4, std=0.1, antithetic=True)
OPTIMIZER = optax.adam(0.01)


def new_state() -> nesjax.TrainState:
    """12 MB of it, so that saving takes a good part of the time."""
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (1024, 1024)) / 32}
    return nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=key)


step = nesjax.make_train_step(lambda params: jnp.mean((jnp.ones(1024) @ params["w"]) ** 2), OPTIMIZER, POPULATION)


def digest(state: nesjax.TrainState) -> str:
    """Of every bit of the state."""
    state = state.replace(key=jax.random.key_data(state.key))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()[:16]


def train(folder: str, every: int) -> None:
    """Trains until it is killed; says each step's digest, before it begins to save it."""
    with nesjax.checkpoint.Run(folder, POPULATION, every=every) as run:
        state = run.restore(new_state())
        print(state.step, digest(state), flush=True)
        while True:
            state, metrics = step(state)
            print(state.step, digest(state), flush=True)
            run.update(state, metrics)


MOMENTS = ("any time", "saving", "removing")


class Line(NamedTuple):
    step: int
    digest: str


@contextlib.contextmanager
def trainee(folder: pathlib.Path, every: int) -> Iterator[subprocess.Popen]:
    """`train` in a process of its own; killed at the end if it still runs."""
    command = [sys.executable, "-m", "benchmarks.faults", str(folder), str(every)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen, until: int | None = None) -> list[Line]:
    """What a trainee says, up to a number of lines or its end; the half line of a killed one isn't counted."""
    found = []
    while len(found) != until and (text := process.stdout.readline()).endswith("\n"):
        at, digest = text.split()
        found.append(Line(int(at), digest))
    if until is not None and len(found) < until:
        raise RuntimeError(f"the trainee ended:\n{process.stderr.read()}")
    return found


def kill(folder: pathlib.Path, kills: int, every: int, seed: int) -> Iterator[dict[str, Any]]:
    """Starts training in `folder` and kills it, `kills` times, and a last time looks what is there. A row a kill.

    In turn: at any time, as soon as a save is under way, and as soon as an old checkpoint is being removed.

    Raises:
      AssertionError: more was lost than what wasn't saved yet, or a step came out otherwise than before.
    """
    draw, known = random.Random(seed), {}
    reached, saving, least, killed = 0, False, 0, ""  # by the one killed before
    for at in range(kills + 1):
        with trainee(folder, every) as process:
            first, second = lines(process, until=2)  # compiled
            assert first.step >= least, f"lost: step {first.step} restored, {least} was saved"
            time.sleep(draw.uniform(0, 1.5))
            moment, there = MOMENTS[at % 3], set(checkpoints_in(folder))
            while (moment == "saving" and not saving_in(folder)) or (
                moment == "removing" and there <= set(checkpoints_in(folder))
            ):
                assert process.poll() is None, "the trainee ended"
                there |= set(checkpoints_in(folder))
                time.sleep(0.001)
            process.kill()
            said = [first, second, *lines(process)]
        for line in said:
            assert known.setdefault(line.step, line.digest) == line.digest, f"step {line.step} came out otherwise"
        if at:
            yield {"restored": first.step, "lost": reached - first.step, "saving": saving, "killed": killed}
        reached = said[-1].step
        # The last step but one was handed over; a save begins when the one before it is finished.
        begun = (reached - 1) // every * every
        least = max(first.step, begun - every) if begun > first.step else first.step
        saving, killed = saving_in(folder), moment


def checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of all whole checkpoints."""
    return list(folder.glob("nesjax_*[0-9]/**/*"))


def saving_in(folder: pathlib.Path) -> bool:
    """Whether a save is under way there, or was when it was killed."""
    return any("tmp" in path.name for path in folder.iterdir())


def cases(quick: bool) -> list[dict]:
    """Each goes on in one folder of its own."""
    return [
        {"every": every, "kills": 2 if quick else 10, "seed": every} for every in ((1,) if quick else (1, 2, 3, 5, 8))
    ]


def measure(every: int, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        yield from kill(pathlib.Path(folder), kills, every, seed)


def table(results: dict) -> str:
    chains = {}
    for row in results["rows"]:
        chains.setdefault(row["every"], []).append(row)
    rows = [
        [f"{every}", f"{len(chain)}", f"{sum(row['saving'] for row in chain)}",
         f"{sum(row.get('killed') == 'removing' for row in chain)}", f"{len(chain)}",
         f"{max(row['lost'] for row in chain)}", f"{chain[-1]['restored']:,}"]
        for every, chain in chains.items()
    ]  # fmt: skip
    header = [
        "saved every",
        "kills",
        "while saving",
        "while removing",
        "went on exactly",
        "most steps lost",
        "steps reached",
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
