"""A run that can be killed: checkpoints of the training state by orbax, exact, and refused where they don't fit.

A checkpoint holds a `TrainState` (arrays, as orbax writes them) and a description of it in JSON: the parameters' and
the optimizer's shapes, and the population. Nothing in it is code, so none is run when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .checks import instance_of, positive_int
from .paths import named_leaves
from .population import Population
from .train import TrainState, raise_if_skipped

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy
except ImportError as error:  # an incomplete installation: Flax requires it
    raise ImportError('nesjax.checkpoint needs orbax: pip install "nesjax[checkpoint]"') from error

PROBES = (0, 1, 10, 100, 1_000, 10_000, 100_000)  # steps at which schedules are compared


class CheckpointError(OSError):
    """A checkpoint couldn't be written or read. The training state is what it was."""


def save(folder: str | pathlib.Path, state: TrainState, population: Population) -> None:
    """One checkpoint, there when this returns. See `Run` for many."""
    with Run(folder, population) as run:
        run.save(state)


def restore(
    folder: str | pathlib.Path, state: TrainState, population: Population, step: int | None = None
) -> TrainState:
    """The newest checkpoint in `folder`, or that of `step`: see `Run.restore`.

    Raises:
      ValueError: there is none, or it doesn't fit.
    """
    with Run(folder, population, read_only=True) as run:
        if not run.steps:
            raise ValueError(f"folder must hold checkpoints, got {folder}, which holds none.")
        return run.restore(state, step)


class Run:
    """A run's checkpoints in one folder: go on from the newest, save every so often and at SIGTERM, stop when stuck.

    A save is written in the background, appears whole or not at all, and holds all that training needs: `n` steps in
    one go and `n` steps with a kill in between give the same parameters to the bit, on the same devices.

    Args:
      folder: where checkpoints lie; made if it isn't there. One run's.
      population: what the steps are made with; a checkpoint of another one is refused (`chunk_size` may differ).
      every: save after so many steps.
      keep: the newest checkpoints that stay.
      best: a metric, and the checkpoint where it was lowest stays too; None: only the newest stay.
      max_skipped: `update` raises FloatingPointError once so many steps in a row were skipped; None: never.
      read_only: to restore alone, also beside a process that trains; otherwise half a save found there is removed.

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
        every: int = 100, keep: int = 3, best: str | None = None, max_skipped: int | None = 10,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (("every", every), ("keep", keep), ("max_skipped", max_skipped)):
            if (name, value) != ("max_skipped", None):
                positive_int(name, value)
        self.folder, self.population = pathlib.Path(folder).resolve(), instance_of(Population, "population", population)
        self.every, self.best, self.max_skipped = every, best, max_skipped
        self._terminated = False
        self._at: int | None = None  # the step that this run restored or saved last
        policies, quality = [keep_policy.LatestN(keep)], None
        if best is not None:
            quality = lambda metrics: -metrics.get(best, math.inf)
            policies.append(keep_policy.BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep_policy.AnyPreservationPolicy(policies),
            best_fn=quality,  # without it metrics aren't written, and forgotten when the program ends
            cleanup_tmp_directories=not read_only, read_only=read_only,
        )  # fmt: skip
        if read_only and not self.folder.is_dir():
            raise ValueError(f"folder must hold checkpoints, got {folder}, which doesn't exist.")
        self.read_only = read_only
        with self._clear_errors("opened"):
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Run:
        # Of several processes JAX hears the signal: all must end after the same step, whichever was told to.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_terminated", True))
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits for the save under way. A SIGTERM that `update` didn't hear of is then passed on."""
        try:
            with self._clear_errors("finished"):
                self._manager.close()
        finally:
            if hasattr(self, "_before"):
                signal.signal(signal.SIGTERM, self._before)
        if self._terminated and kind is None:
            signal.raise_signal(signal.SIGTERM)

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        if self.read_only:
            self._manager.reload()  # another process may have saved since
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint has the lowest `best`, of those that stayed; without `best` the newest."""
        return self._manager.best_step()

    def update(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """To be called after each step: saves if it is time to, or after a SIGTERM, which then ends the program.

        Raises:
          FloatingPointError: the last `max_skipped` steps were all skipped.
          CheckpointError: there is no space, the folder can't be written, ...; training may go on.
          SystemExit: 143, after SIGTERM and once the state is saved.
        """
        if self.max_skipped is not None and "skipped" in metrics:
            raise_if_skipped(metrics, self.max_skipped)
        step = int(state.step)
        ending = self._terminated if jax.process_count() == 1 else self._manager.reached_preemption(step)
        if ending:
            with contextlib.suppress(CheckpointError):
                self.wait()  # for an older save, whose place this one takes
        if ending or step % self.every == 0:
            self.save(state, metrics)
        if ending:
            self.wait()
            raise SystemExit(128 + signal.SIGTERM)

    def save(self, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
        """Begins to save; the arrays are copied first. The step that was saved or restored last is there already.

        Raises:
          ValueError: the folder holds this step or a later one, which this run neither restored nor saved.
          CheckpointError: as in `update`; also if the save before failed, once this one is begun.
        """
        if self.read_only:
            raise ValueError("read_only must be False for a run that saves.")
        step = int(instance_of(TrainState, "state", state).step)
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            if step == self._at:
                return
            raise ValueError(
                f"state must be of a step beyond {newest}, the newest checkpoint in {self.folder}, got step {step}: "
                "restore that first to go on from it, or save in another folder."
            )
        numbers = ((name, x) for name, x in (metrics or {}).items() if name != "aux" and jnp.ndim(x) == 0)
        scalars = {name: float(x) for name, x in numbers if np.isfinite(x)}
        if self.best is not None and metrics is not None and self.best not in metrics:
            raise ValueError(f"best must be one of the metrics {sorted(scalars)}, got {self.best!r}.")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_leaves(state)), about=ocp.args.JsonSave(describe(state, self.population))
        )
        try:
            self.wait()
        finally:
            with self._clear_errors(f"saved at step {step}"):
                tempfile.TemporaryFile(dir=self.folder).close()  # orbax waits for minutes where it can't write at all
                self._manager.save(step, args=items, metrics=scalars or None, force=True)
            self._at = step

    def wait(self) -> None:
        """Until what was begun to be saved is there."""
        try:
            with self._clear_errors(f"saved at step {self._at}"):
                self._manager.wait_until_finished()
        except CheckpointError:
            self._at = None
            self._manager.reload()  # what is there
            raise

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """The newest checkpoint (or, with `read_only`, that of `step`); `state` itself if there is none yet.

        Args:
          state: as `TrainState.create` makes it for this run. Its arrays' devices are where the restored ones go.

        Raises:
          ValueError: the checkpoint is of another model, optimizer or population: the message names what differs. Or
            there is none of `step`, or it isn't the newest and the run would go on beside later ones.
        """
        instance_of(TrainState, "state", state)
        steps = self.steps
        if step is None and not steps:
            return state
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"step must be one of the checkpoints {steps} in {self.folder}, got {step!r}.")
        if step != steps[-1] and not self.read_only:
            raise ValueError(
                f"step must be the newest checkpoint, {steps[-1]}, of a run that goes on in {self.folder}, got {step}. "
                "nesjax.checkpoint.restore reads any; to go on from an older one remove those after it."
            )
        with self._clear_errors(f"read at step {step}"):
            found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        differences = list(_differences(found, describe(state, self.population)))
        if differences:
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} doesn't fit what it is to be restored into:\n  "
                + "\n  ".join(differences)
            )
        with self._clear_errors(f"read at step {step}"):
            like = {name: _abstract(leaf) for name, leaf in _leaves(state).items()}
            items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            leaves = self._manager.restore(step, args=items).state
        self._at = step
        return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in like])

    @contextlib.contextmanager
    def _clear_errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # what orbax and tensorstore raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"checkpoints in {self.folder} could not be {done}: {why}. The training state in memory is unchanged, "
                "and so are the checkpoints finished before."
            ) from error


def describe(state: TrainState, population: Population) -> dict[str, Any]:
    """What a checkpoint must agree with, in JSON: every array's shape and dtype, the population, the kind of key."""
    fields = {field.name: getattr(population, field.name) for field in dataclasses.fields(population)}
    del fields["chunk_size"]  # changes nothing but memory
    arrays = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in named_leaves(state)}
    return {
        **{f"population.{name}": _plain(value) for name, value in fields.items()},
        **{f"state.{path}": text for path, text in arrays.items()},
    }


def _plain(value: Any) -> str:
    """A setting as text that is the same in every process: a schedule as its values."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    if callable(value):
        return f"schedule({', '.join(f'{float(value(jnp.int32(step))):.6g}' for step in PROBES)} at steps {PROBES})"
    return repr(value.item() if isinstance(value, np.generic) else value)


def _differences(found: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    for name in {**found, **wanted}:
        in_checkpoint, here = found.get(name, "absent"), wanted.get(name, "absent")
        if in_checkpoint != here:
            yield f"{name}: {in_checkpoint} in the checkpoint, {here} here"


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    """Arrays by path, so that nothing of the tree's own classes is written."""
    return dict(named_leaves(state))


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if jax.process_count() > 1 and leaf.is_fully_addressable:  # not on the mesh of all processes yet
        sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
