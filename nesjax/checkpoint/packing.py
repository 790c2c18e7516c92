"""Many small arrays as one on disk, where each array costs milliseconds, whatever its size."""

from __future__ import annotations

import jax
import numpy as np

from .description import bytes_of, physical

SMALL = 2**16  # bytes; what is larger is an array of its own on disk


def pack(arrays: dict[str, jax.Array]) -> tuple[np.ndarray, list[str]]:
    """Joins the bytes of all arrays that are small and not split over processes; also lists their paths, in order."""
    small = {path: bytes_of(leaf) for path, leaf in arrays.items() if physical(leaf).nbytes <= SMALL}
    parts = {path: part for path, part in small.items() if part is not None}
    return np.concatenate([np.empty(0, np.uint8), *parts.values()]), list(parts)


def packed_size(paths: list[str], like: dict[str, jax.Array]) -> int:
    """Counts the bytes that `pack` joined."""
    return sum(physical(like[path]).nbytes for path in paths)


def unpack(data: np.ndarray, paths: list[str], like: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Splits what `pack` joined into the numbers of arrays like those of `like`."""
    found, at = {}, 0
    for path in paths:
        numbers = physical(like[path])
        found[path] = data[at : at + numbers.nbytes].copy().view(numbers.dtype).reshape(numbers.shape)
        at += numbers.nbytes
    return found
