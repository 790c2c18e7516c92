"""Training that is killed over and over, also while it saves: what lies on the disk is whole, and it goes on exactly.

`python tests/faults.py FOLDER EVERY` is the training that is killed; `python -m benchmarks faults` counts.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

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


# Where a trainee kills itself: before a call of the file system, by the name of Python's audit event.
MOMENTS = {
    "any time": (),  # by a signal from outside instead
    "saving": ("open", "os.mkdir"),
    "renaming": ("os.rename",),  # parts, whole checkpoints, and old ones that are put away
    "removing": ("os.remove", "os.rmdir"),
}


def train(folder: str, every: int, moment: str = "any time", calls: int = 0) -> None:
    """Trains until it is killed; says each step's digest, before it begins to save it.

    It kills itself at a moment of `MOMENTS`, after some such calls.
    """
    with nesjax.checkpoint.Run(folder, POPULATION, every=every, best="loss") as run:
        state = run.restore(new_state())
        print(state.step, digest(state), flush=True)
        sys.addaudithook(dying(folder, MOMENTS[moment], calls))
        while True:
            state, metrics = step(state)
            print(state.step, digest(state), flush=True)
            run.update(state, metrics)


def dying(folder: str, events: tuple[str, ...], calls: int) -> Callable[[str, tuple], None]:
    """Makes an audit hook that kills its process at one of `events` in `folder`, after some others."""
    left = itertools.count(calls, -1)

    def hook(event: str, args: tuple) -> None:
        if event in events:
            by_descriptor = event in MOMENTS["removing"] and args[-1] != -1  # of the folder that is being removed
            if (by_descriptor or str(args[0]).startswith(folder)) and next(left) <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


class Line(NamedTuple):
    step: int
    digest: str


@contextlib.contextmanager
def trainee(folder: pathlib.Path, *args: Any) -> Iterator[subprocess.Popen]:
    """`train` in a process of its own; killed at the end if it still runs."""
    command = [sys.executable, __file__, str(folder), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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

    In turn at any time, and at a random one of the calls of the file system that save, rename and remove.

    Raises:
      AssertionError: more was lost than what wasn't saved yet, or a step came out otherwise than before.
    """
    draw, known = random.Random(seed), {}
    reached, saving, least, killed = 0, False, 0, ""  # by the one killed before
    for at in range(kills + 1):
        moment = list(MOMENTS)[at % len(MOMENTS)]
        with trainee(folder, every, moment, draw.randrange(20)) as process:
            said = lines(process, until=2)  # compiled
            assert said[0].step >= least, f"lost: step {said[0].step} restored, {least} was saved"
            if moment == "any time":
                time.sleep(draw.uniform(0, 1.5))
                process.kill()
            said += lines(process)
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
        for line in said:
            assert known.setdefault(line.step, line.digest) == line.digest, f"step {line.step} came out otherwise"
        if at:
            yield {"restored": said[0].step, "lost": reached - said[0].step, "saving": saving, "killed": killed}
        reached = said[-1].step
        # The last step but one was handed over; a save begins when the one before it is finished.
        begun = (reached - 1) // every * every
        least = max(said[0].step, begun - every) if begun > said[0].step else said[0].step
        saving, killed = saving_in(folder), moment


def saving_in(folder: pathlib.Path) -> bool:
    """Whether a save is under way there, or was when it was killed."""
    return any("tmp" in path.name for path in folder.iterdir())


if __name__ == "__main__":
    folder, every, *moment = sys.argv[1:]
    train(folder, int(every), *moment[:1], *map(int, moment[1:]))
