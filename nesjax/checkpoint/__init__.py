"""A run that can be killed: exact checkpoints of the training state, validated when they are restored.

A checkpoint holds a `TrainState` (arrays, as orbax writes them) and a description of it in JSON: every array's shape,
dtype and digest, and the population. Nothing in it is code, so none is run when it is read.
"""

from .description import CheckpointError
from .run import Run, restore, save

__all__ = ["CheckpointError", "Run", "restore", "save"]
