"""A run that can be killed: exact checkpoints of the training state, validated when they are restored.

A checkpoint holds a `TrainState` (arrays, as orbax writes them) and a description of it in JSON: every array's shape,
dtype and digest, and the population. Nothing in it is code, so none is run when it is read.
"""

from __future__ import annotations

import pathlib

from ..population import Population
from ..train import TrainState
from .description import CheckpointError, arrays_of
from .run import Run

__all__ = ["CheckpointError", "Run", "restore", "save"]


def save(folder: str | pathlib.Path, state: TrainState, population: Population) -> None:
    """Saves one checkpoint, which is there when this returns. All others in the folder stay: see `Run` for many.

    Raises:
      ValueError, TypeError, CheckpointError: as in `Run` and `Run.save`.
    """
    with Run(folder, population, _single=True) as run:
        run.save(state)


def restore(
    folder: str | pathlib.Path, state: TrainState, population: Population, *, step: int | None = None,
    verify: bool = True,
) -> TrainState:  # fmt: skip
    """Reads the newest checkpoint in `folder`, or that of `step`: see `Run.restore`.

    Raises:
      ValueError: there is none, or it doesn't fit.
      CheckpointError: it is damaged.
    """
    arrays_of(state)  # what is wrong with it isn't the folder's fault
    with Run(folder, population, read_only=True) as run:
        if not run.steps:
            raise ValueError(f"folder must hold checkpoints, got {folder}, which holds none.")
        return run.restore(state, step=step, verify=verify)
