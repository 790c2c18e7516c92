"""The checkpoints in one folder on disk: orbax's manager, with errors that say what was being done.

Whatever else lies in the folder is left alone: only names that begin with `PREFIX` are read, changed or removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .description import CheckpointError, differences, digests, few, physical, sealed, unsealed
from .packing import pack, packed_size, unpack

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as policies
except ImportError as error:  # an incomplete installation: Flax requires it
    raise ImportError('nesjax.checkpoint needs orbax: pip install "nesjax[checkpoint]"') from error

PREFIX = "nesjax"
REMOVED = f"{PREFIX}_removed"  # old checkpoints go there whole: one half removed would look like a damaged one
PACKED = "packed"  # the array of all small ones; no leaf of a state has this path


@contextlib.contextmanager
def clear_errors(folder: pathlib.Path, done: str) -> Iterator[None]:
    """Turns any error into a CheckpointError that says what could not be done: damaged files raise all kinds."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoints in {folder} could not be {done}: {why}. The training state in memory is unchanged, "
            "and so are the checkpoints finished before."
        ) from error


class Store:
    """Whole checkpoints by step: arrays by path, a description in JSON, and metrics.

    Args:
      folder: an existing folder.
      keep: number of most recent checkpoints that `save` leaves; None for all.
      best: a metric; the checkpoint where it was lowest stays too.

    Raises:
      ValueError: the metrics of a checkpoint are damaged.
    """

    def __init__(self, folder: pathlib.Path, keep: int | None, best: str | None) -> None:
        self.folder, self.best = folder, best
        self._saver = -1  # the process that saved
        self._check_metrics()
        kept: list[Any] = [policies.PreserveAll() if keep is None else policies.LatestN(keep)]
        quality = None
        if best is not None:
            quality = lambda metrics: -metrics.get(best, math.inf)
            kept.append(policies.BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            step_prefix=PREFIX, preservation_policy=policies.AnyPreservationPolicy(kept), create=False,
            todelete_subdir=REMOVED,
            best_fn=quality,  # without it metrics aren't written, and forgotten when the program ends
        )  # fmt: skip
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    @staticmethod
    def clear_up(folder: pathlib.Path) -> None:
        """Removes what is no checkpoint any more, and, while none is being saved, what was left half saved."""
        for left in (folder / REMOVED, *folder.glob(f"{PREFIX}_*.orbax-checkpoint-tmp*")):
            shutil.rmtree(left, ignore_errors=True)

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def best_step(self) -> int | None:
        """The step whose checkpoint has the lowest `best`; the newest without one. Raises as the constructor does."""
        self._check_metrics()
        return self.manager.best_step()

    def _check_metrics(self) -> None:
        """Raises ValueError if metrics can't be read, or are not those that were saved where `best` goes by them."""
        for folder in self.folder.glob(f"{PREFIX}_*[0-9]"):
            written, sound = folder / "metrics" / "metrics", True
            try:
                metrics = json.loads(written.read_text()) if written.exists() else {}  # orbax does, whatever `best` is
                if self.best is not None:
                    about = unsealed(json.loads((folder / "about" / "metadata").read_text()))
                    sound = about.get("metrics", metrics) == metrics  # older versions wrote them in one place alone
            except FileNotFoundError:  # removed meanwhile
                continue
            except ValueError:
                sound = False
            if not sound:
                raise ValueError(f"the metrics of {folder.name} are damaged; remove that folder to go on without it")

    def save(self, step: int, arrays: dict[str, jax.Array], about: dict[str, Any], metrics: dict[str, float]) -> None:
        """Begins to save; the arrays' memory may be reused when this returns."""
        with tempfile.TemporaryDirectory(".orbax-checkpoint-tmp", f"{PREFIX}_", self.folder) as probe:
            for at in range(8):  # orbax waits for minutes where it can't make its folders
                pathlib.Path(probe, str(at)).mkdir()
        self._saver = os.getpid()
        small, paths = pack(arrays)
        packed = set(paths)
        # On a CPU the writer would read the very memory that a step with donated state reuses.
        large = {path: leaf.copy() if _on_cpu(leaf) else leaf for path, leaf in arrays.items() if path not in packed}
        about = sealed({**about, PACKED: paths, "metrics": metrics if self.best is not None else {}})
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({PACKED: small, **large}), about=ocp.args.JsonSave(about)
        )
        with _hushed():  # that there are no metrics
            self.manager.save(step, args=items, metrics=metrics or None, force=True)

    def finish(self, end: Callable[[], None]) -> None:
        """Waits for the save under way by `end`, and clears up after it."""
        try:
            end()
        finally:
            if self._saver == os.getpid() and not jax.process_index():  # not one that was forked from it
                self.clear_up(self.folder)

    def read(
        self, step: int, wanted: dict[str, jax.Array], description: dict[str, Any], verify: bool
    ) -> dict[str, jax.Array]:
        """Reads a checkpoint's arrays to the devices of `wanted`, once its description agrees with what is wanted.

        Raises:
          ValueError: it is of something else; the message names what differs.
          CheckpointError: it is damaged.
        """
        with clear_errors(self.folder, f"read at step {step}"):
            about = self._about(step, 10 * len(json.dumps(description)) + 10_000_000)
        unlike = list(differences(about["description"], description))
        if unlike:
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} doesn't fit the state that it would replace:\n  "
                + few(unlike, "\n  ")
            )
        with clear_errors(self.folder, f"read at step {step}"):
            arrays = self._arrays(step, wanted, about.get(PACKED, []))
            found = digests(arrays) if verify else {}
            damaged = [path for path in found if about["digests"].get(path, found[path]) != found[path]]
            if damaged:
                raise ValueError(f"the bytes of {few(damaged)} are not those that were saved")
        return arrays

    def newest_sound(self, steps: list[int], wanted: dict[str, jax.Array], description: dict[str, Any]) -> int | None:
        """The last of `steps` whose checkpoint fits and is whole."""
        for step in reversed(steps):
            with contextlib.suppress(CheckpointError, ValueError):
                self.read(step, wanted, description, verify=True)
                return step
        return None

    def _about(self, step: int, limit: int) -> dict[str, Any]:
        """Reads the description of a checkpoint, of at most `limit` bytes."""
        path = self.folder / f"{PREFIX}_{step}" / "about" / "metadata"
        if (size := path.stat().st_size) > limit:
            raise ValueError(f"its description has {size:,} bytes, where at most {limit:,} make sense")
        return unsealed(json.loads(path.read_text()))

    def _arrays(self, step: int, like: dict[str, jax.Array], paths: list[str]) -> dict[str, jax.Array]:
        """Reads a checkpoint's arrays, of which those at `paths` lie in one, to the devices of `like`.

        Raises:
          ValueError: the files declare other arrays; nothing is read then.
        """
        packed = set(paths)
        wanted: dict[str, Any] = {path: _abstract(x) for path, x in like.items() if x.size and path not in packed}
        if paths:  # there are none in checkpoints of older versions
            wanted[PACKED] = np.empty(packed_size(paths, like), np.uint8)
        declared: Any = self.manager.item_metadata(step)
        _check_declared(declared.state, wanted)
        restored: Any = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
        found = restored.state
        if paths:
            numbers = unpack(found.pop(PACKED), paths, like)
            found |= {path: _placed(numbers[path], like[path]) for path in paths}
        return {path: found[path] if leaf.size else leaf for path, leaf in like.items()}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keeps orbax's log messages from the user."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _on_cpu(leaf: jax.Array) -> bool:
    return next(iter(leaf.sharding.device_set)).platform == "cpu"


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _placed(numbers: np.ndarray, like: jax.Array) -> jax.Array:
    """An array of these numbers, typed and placed like `like`."""
    sharding = _sharding(physical(like))
    leaf = jax.make_array_from_callback(numbers.shape, sharding, numbers.__getitem__)
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if is_key else leaf


def _sharding(leaf: jax.Array) -> jax.sharding.Sharding:
    if jax.process_count() > 1 and leaf.is_fully_addressable:  # not on the mesh of all processes yet
        return NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), P())
    return leaf.sharding


def _check_declared(declared: Any, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError unless the files declare the arrays that are wanted, in chunks no larger than these."""
    declared = getattr(declared, "tree", declared)
    for path, array in wanted.items():
        found = declared[path]
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.eval_shape(jax.random.key_data, array)
        chunk = getattr(getattr(found, "storage", None), "chunk_shape", None) or found.shape
        if tuple(found.shape) != array.shape or math.prod(chunk) > max(array.size, 1):
            raise ValueError(f"its files declare {path} as {list(found.shape)} in chunks of {list(chunk)}")
