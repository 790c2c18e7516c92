"""A run's checkpoints in one folder: saved in the background, found again, and never mixed with anything else's."""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import uuid
from collections.abc import Callable
from typing import Any

import jax

from ..checks import instance_of, positive_int
from ..population import Population
from ..train import TrainState, raise_if_skipped
from . import record
from .description import CheckpointError, arrays_of, describe, digests, scalars_of, sealed
from .lock import Lock
from .store import PREFIX, Store, clear_errors
from .termination import Termination

RECORD, LOCK = f"{PREFIX}_run.json", f"{PREFIX}_run.lock"


class Run:
    """A run's checkpoints in one folder: restores the newest, saves regularly and at SIGTERM, and stops a stuck run.

    A save appears whole or not at all, and holds all that training needs: `n` steps in one go and `n` steps with a kill
    in between give the same parameters to the bit, on the same devices. Within a `with` block, saves are written in the
    background; without one, each is finished when `save` or `update` returns. Whatever else lies in the folder is left
    alone: names that nesjax writes begin with "nesjax_".

    Args:
      folder: where checkpoints lie, created if missing; use one folder per run.
      population: what the steps are made with; a checkpoint of another one is refused (`chunk_size` may differ).
      every: number of steps between saves.
      keep: number of most recent checkpoints to keep, None for all, or "recorded" for what this folder's run was begun
        with (3 for a new one).
      best: a metric; the checkpoint where it was lowest is kept too. None for none; "recorded" as above.
      log: `log(step, metrics)`, called by every `update` with the scalar metrics as floats, on the first process alone.
      max_skipped: number of steps skipped in a row after which `update` raises FloatingPointError; None for never.
      read_only: whether to restore only, which is safe while another process trains. Otherwise an unfinished save found
        there is deleted.
      take_over: "host:pid" of a writer on another machine that no longer runs, as the refusal named it.

    Raises:
      ValueError: another process writes there, or `keep` or `best` would delete checkpoints that are kept so far.
      CheckpointError: the folder can't be read or written, or the metrics that `best` goes by are damaged.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax, optax, tempfile
      >>> optimizer, population = optax.sgd(0.1), nesjax.Population(size=8, std=0.1)
      >>> step = nesjax.make_train_step(lambda w: jnp.sum(w**2), optimizer, population)
      >>> folder = tempfile.mkdtemp()
      >>> for steps in (4, 8):  # the second time it goes on where the first one ended
      ...     state = nesjax.TrainState.create(params=jnp.ones(3), optimizer=optimizer, key=jax.random.key(0))
      ...     with nesjax.checkpoint.Run(folder, population, every=2) as run:
      ...         state = run.restore(state)
      ...         print("from step", state.step)
      ...         while state.step < steps:
      ...             state, metrics = step(state)
      ...             run.update(state, metrics)
      from step 0
      from step 4
    """

    def __init__(
        self, folder: str | pathlib.Path, population: Population, *,
        every: int = 100, keep: int | str | None = "recorded", best: str | None = "recorded",
        log: Callable[[int, dict[str, float]], Any] | None = None, max_skipped: int | None = 10,
        read_only: bool = False, take_over: str | None = None, _single: bool = False,
    ) -> None:  # fmt: skip
        positive_int("every", every)
        for name, value in (("keep", keep), ("max_skipped", max_skipped)):
            if value not in (None, "recorded"):
                positive_int(name, value)
        self.folder, self.population = pathlib.Path(folder).resolve(), instance_of(Population, "population", population)
        if log is not None and not callable(log):
            raise TypeError(f"log must be a function (step, metrics) or None, got {log!r}.")
        self.every, self.log, self.max_skipped, self.read_only = every, log, max_skipped, read_only
        self._termination, self._within, self._closed = Termination(), False, False
        self._at: int | None = None  # the step that this run restored or saved last
        self._updated: tuple[int, dict[str, Any]] = -1, {}  # the step of the last `update`, and its metrics
        if read_only and not self.folder.is_dir():
            raise ValueError(f"folder must hold checkpoints, got {folder}, which doesn't exist.")
        self._lock = None if read_only or jax.process_index() else self._locked(take_over)
        try:
            with self._errors("opened"):
                begun = record.read(self.folder / RECORD)
                self.id = begun.get("run", uuid.uuid4().hex[:12])
                self.keep: Any = begun.get("keep", 3) if keep == "recorded" else keep
                self.best: str | None = begun.get("best") if best == "recorded" else best
                self._store = Store(self.folder, None if _single else self.keep, self.best)
            if not read_only and not _single:
                record.check(begun, self.keep, self.best, self.steps, self.folder)
                settings = {"run": self.id, "keep": self.keep, "best": self.best}
                if self._lock is not None and sealed(settings) != begun:
                    with self._errors("opened"):
                        record.write(self.folder / RECORD, settings)
        except BaseException:
            self._release()
            raise

    def _errors(self, done: str) -> contextlib.AbstractContextManager[None]:
        return clear_errors(self.folder, done)

    def _locked(self, take_over: str | None) -> Lock | None:
        """Takes the folder's lock. None if the folder can't be written: it can still be read, and a save says why."""
        with self._errors("opened"):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(self.folder / LOCK, take_over)
        except OSError:
            return None
        Store.clear_up(self.folder)
        return lock

    def __enter__(self) -> Run:
        self._within = True
        self._termination.listen()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits for the save under way, and passes on a SIGTERM that no `update` has noticed."""
        try:
            self.close()
        finally:
            self._termination.stop()
        if self._termination.heard and kind is None:
            signal.raise_signal(signal.SIGTERM)

    def close(self) -> None:
        """Finishes the save under way and releases the folder. The run can't be used afterwards."""
        try:
            if not self._closed:
                with self._errors("finished"):
                    self._store.finish(self._store.manager.close)
        finally:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the run in {self.folder} is closed: open another one to go on.")

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        self._check_open()
        if self.read_only:
            self._store.manager.reload()  # another process may have saved since
        return self._store.steps()

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint has the lowest `best` among the checkpoints kept; the newest if `best` is None."""
        self._check_open()
        with self._errors("read"):
            return self._store.best_step()

    def update(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Logs; saves every `every` steps, and after a SIGTERM, which then ends the program. Call it after each step.

        Args:
          state: the state after the step.
          metrics: those of the step; scalars are written beside the state.

        Raises:
          FloatingPointError: the last `max_skipped` steps were all skipped.
          CheckpointError: there is no space, or the folder can't be written, ...; training may go on.
          SystemExit: a SIGTERM came and the state is saved; its code is 143.
        """
        self._check_open()
        step, scalars = int(state.step), scalars_of(metrics)
        self._updated = step, scalars
        if self.log is not None and not jax.process_index():
            self.log(step, {name: float(x) for name, x in scalars.items()})
        if self.max_skipped is not None and "skipped" in metrics:
            raise_if_skipped(metrics, self.max_skipped)
        ending = self._termination.heard if jax.process_count() == 1 else self._store.manager.reached_preemption(step)
        if self._lock is not None:
            with self._errors("written"):
                self._lock.renew()
        if ending:
            with contextlib.suppress(CheckpointError):
                self.wait()  # for an older save, whose place this one takes
        if ending or step % self.every == 0:
            self.save(state, metrics)
        if ending:
            self.wait()
            raise SystemExit(128 + signal.SIGTERM)

    def save(self, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
        """Begins to save, once the arrays are copied. Does nothing at the step that was saved or restored last.

        Args:
          state: the state to save; leaves that are NumPy arrays or numbers are converted.
          metrics: scalars to write beside it; None: those of the last `update`, if it was of this step.

        Raises:
          ValueError: the folder holds this step or a later one, which this run neither restored nor saved; or the run
            is closed or only reads.
          TypeError: the state holds something that is neither an array nor a number.
          CheckpointError: as in `update`; also if the previous background save failed (after this save has started).
        """
        self._check_open()
        if self.read_only:
            raise ValueError("read_only must be False for a run that saves.")
        arrays = arrays_of(state)
        step = int(arrays["step"])
        newest = self._store.manager.latest_step()
        if newest is not None and step <= newest:
            if step == self._at:
                return
            raise ValueError(
                f"state must be of a step beyond {newest}, the newest checkpoint in {self.folder}, got step {step}: "
                "restore the newest first to go on from it, or save in another folder."
            )
        if metrics is None and self._updated[0] == step:
            metrics = self._updated[1]
        scalars = {name: float(x) for name, x in scalars_of(metrics or {}).items() if math.isfinite(x)}
        if self.best is not None and metrics is not None and self.best not in metrics:
            raise ValueError(f"best must be one of the metrics {sorted(scalars)}, got {self.best!r}.")
        about = {"run": self.id, "description": describe(arrays, self.population), "digests": digests(arrays)}
        try:
            self.wait()
        finally:
            with self._errors(f"saved at step {step}"):
                self._store.save(step, arrays, about, scalars)
            self._at = step
            if not self._within:
                self.wait()

    def wait(self) -> None:
        """Waits until the save that was begun is complete.

        Raises:
          CheckpointError: the save failed.
        """
        self._check_open()
        try:
            with self._errors(f"saved at step {self._at}"):
                self._store.finish(self._store.manager.wait_until_finished)
        except CheckpointError:
            self._at = None
            self._store.manager.reload()  # what is there
            raise

    def restore(self, state: TrainState, *, step: int | None = None, verify: bool = True) -> TrainState:
        """Reads the newest checkpoint, or, with `read_only`, that of `step`.

        Args:
          state: a state as `TrainState.create` makes it for this run. Arrays go to the devices of its arrays.
          step: the step of the checkpoint; None for the newest.
          verify: whether to compare every array's bytes with the digest that was taken when it was saved.

        Returns:
          The restored state; `state` itself if there is no checkpoint yet.

        Raises:
          ValueError: the checkpoint is of another model, optimizer or population (the message names what differs); or
            `step` has no checkpoint; or it isn't the newest, and the run would go on beside later ones.
          CheckpointError: the checkpoint is damaged; the message names the newest older one that is sound.
        """
        wanted = arrays_of(state)
        if not self.read_only:
            self.wait()
        steps = self.steps
        if step is None and not steps:
            return state
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"step must be one of the checkpoints {steps} in {self.folder}, got {step!r}.")
        if step != steps[-1] and not self.read_only:
            raise ValueError(
                f"step must be the newest checkpoint, {steps[-1]}, of a run that goes on in {self.folder}, got {step}. "
                "nesjax.checkpoint.restore reads any; to go on from an older one, remove those after it."
            )
        description = describe(wanted, self.population)
        try:
            leaves = self._store.read(step, wanted, description, verify)
        except CheckpointError as error:
            sound = self._store.newest_sound(steps[: steps.index(step)], wanted, description)
            older = "No older one is sound" if sound is None else f"The newest older sound one is of step {sound}"
            raise CheckpointError(f"{error} {older}.") from error
        self._at = step
        return jax.tree.unflatten(jax.tree.structure(state), [leaves[path] for path in wanted])
