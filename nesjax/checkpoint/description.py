"""What a checkpoint says about itself, in JSON, and which of it must agree before and after arrays are read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import instance_of
from ..paths import named_leaves
from ..population import Population
from ..train import TrainState

PROBES = (0, 1, 10, 100, 1_000, 10_000, 100_000)  # steps at which schedules are compared
MOST = 20  # lines in an error


class CheckpointError(OSError):
    """A checkpoint couldn't be written or read. The training state in memory is unchanged."""


def arrays_of(state: Any) -> dict[str, jax.Array]:
    """Lists the state's leaves by path, as JAX arrays, so that nothing of the tree's own classes is written.

    Raises:
      TypeError: a leaf is not an array or a number.
      ValueError: the step is negative.
    """
    found = {}
    for path, leaf in named_leaves(instance_of(TrainState, "state", state)):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise TypeError(f"state must hold arrays and numbers, got {type(leaf).__name__} at {path}.")
        try:
            found[path] = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        except TypeError as error:
            raise TypeError(f"state must hold arrays and numbers, got {np.asarray(leaf).dtype} at {path}.") from error
    if jnp.ndim(found["step"]) or found["step"] < 0:
        raise ValueError(f"state must have a step >= 0, got {found['step']}.")
    return found


def scalars_of(metrics: Any) -> dict[str, Any]:
    """Lists the metrics that are one number each, which are written and logged.

    Raises:
      TypeError: they are no dict, or one of them is neither an array nor a number.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a dict of arrays and numbers, got {type(metrics).__name__}.")
    for name, value in metrics.items():
        if name != "aux" and not isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Real):
            raise TypeError(f"metrics must be arrays and numbers, got {type(value).__name__} for {name!r}.")
    return {name: value for name, value in metrics.items() if name != "aux" and jnp.ndim(value) == 0}


def describe(arrays: dict[str, jax.Array], population: Population) -> dict[str, str]:
    """Describes what a checkpoint must agree with: every array's shape and dtype, the population, the kind of key."""
    fields = {field.name: getattr(population, field.name) for field in dataclasses.fields(population)}
    del fields["chunk_size"]  # changes nothing but memory
    return {
        **{f"population.{name}": _plain(value) for name, value in fields.items()},
        **{f"state.{path}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in arrays.items()},
    }


def _plain(value: Any) -> str:
    """Writes a setting as text that is the same in every process, a schedule as its values."""
    schedule: Any = value
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    if callable(value):
        return f"schedule({', '.join(f'{float(schedule(jnp.int32(step))):.6g}' for step in PROBES)} at steps {PROBES})"
    return repr(value.item() if isinstance(value, np.generic) else value)


def differences(found: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    """Yields what differs between two descriptions, one line each."""
    for name in {**found, **wanted}:
        in_checkpoint, here = found.get(name, "absent"), wanted.get(name, "absent")
        if in_checkpoint != here:
            yield f"{name}: {in_checkpoint} in the checkpoint, {here} here"


def few(lines: list[str], separator: str = ", ") -> str:
    """Joins the first of many lines, and says how many more there are."""
    more = [f"{len(lines) - MOST:,} more"] if len(lines) > MOST else []
    return separator.join(lines[:MOST] + more)


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """Takes a BLAKE2 digest of every array's bytes, but for arrays that are split over processes."""
    with ThreadPoolExecutor() as pool:  # hashing doesn't hold the interpreter's lock
        found = dict(zip(arrays, pool.map(_digest, arrays.values())))
    return {path: digest for path, digest in found.items() if digest is not None}


def _digest(leaf: jax.Array) -> str | None:
    data: Any = bytes_of(leaf)
    return None if data is None else hashlib.blake2b(memoryview(data), digest_size=16).hexdigest()


def bytes_of(leaf: jax.Array) -> np.ndarray | None:
    """A leaf's bytes, uint8; None if they are split over processes."""
    leaf = physical(leaf)
    if not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            return None
        leaf = leaf.addressable_data(0)
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)


def physical(leaf: jax.Array) -> jax.Array:
    """The numbers of a typed key; any other leaf as it is."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def sealed(about: dict[str, Any]) -> dict[str, Any]:
    """Adds to `about` a digest of itself."""
    text = json.dumps(about, sort_keys=True)
    return {**about, "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def unsealed(about: Any) -> dict[str, Any]:
    """Returns `about`, which `sealed` made; raises ValueError if a bit of it has changed since."""
    if not isinstance(about, dict) or about != sealed({name: about[name] for name in about if name != "digest"}):
        raise ValueError("its description is damaged")
    return about
