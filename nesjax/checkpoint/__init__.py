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
    """Saves one checkpoint, which is complete when this returns. All others in the folder stay. For many see `Run`.

    Args:
      folder: where checkpoints lie, created if missing.
      state: the state to save.
      population: what the steps are made with.

    Raises:
      ValueError, TypeError, CheckpointError: as in `Run` and `Run.save`.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax, optax, tempfile
      >>> state = nesjax.TrainState.create(params=jnp.ones(2), optimizer=optax.sgd(0.1), key=jax.random.key(0))
      >>> folder, population = tempfile.mkdtemp(), nesjax.Population(size=8, std=0.1)
      >>> nesjax.checkpoint.save(folder, state, population)
      >>> nesjax.checkpoint.restore(folder, state.replace(params=jnp.zeros(2)), population).params.tolist()
      [1.0, 1.0]
    """
    with Run(folder, population, _single=True) as run:
        run.save(state)


def restore(
    folder: str | pathlib.Path, state: TrainState, population: Population, *, step: int | None = None,
    verify: bool = True,
) -> TrainState:  # fmt: skip
    """Reads the newest checkpoint in `folder`, or that of `step`; safe while another process trains.

    Args:
      folder: where checkpoints lie.
      state: a state of the same form, as `TrainState.create` makes it. Arrays go to the devices of its arrays.
      population: what the steps are made with.
      step: the step of the checkpoint; None for the newest.
      verify: whether to compare every array's bytes with the digest that was taken when it was saved.

    Returns:
      The restored state.

    Raises:
      ValueError: there is no checkpoint, or it doesn't fit.
      CheckpointError: the checkpoint is damaged.

    Example:
      See `save`.
    """
    arrays_of(state)  # what is wrong with it isn't the folder's fault
    with Run(folder, population, best=None, read_only=True) as run:
        if not run.steps:
            raise ValueError(f"folder must hold checkpoints, got {folder}, which holds none.")
        return run.restore(state, step=step, verify=verify)
