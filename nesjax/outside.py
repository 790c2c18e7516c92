"""Losses computed outside JAX, by the workers of any executor: processes, machines, robots.

An executor is one of `concurrent.futures`, or has its interface: Dask's `client.get_executor()`, mpi4py's
`MPIPoolExecutor`. Letters: `N` members.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np

from .checks import instance_of, positive_int
from .forward import argument_names, mapped_axes, materialise
from .members import Noise
from .population import Population

__all__ = ["Renewed", "evaluate"]

LOST = (futures.BrokenExecutor, futures.CancelledError)  # what becomes of a task whose worker is gone


class Renewed(futures.Executor):
    """An executor that is made anew when it breaks, as a process pool does when one of its processes dies.

    Args:
      make: a function of no arguments that makes an executor.

    Example:
      >>> from concurrent.futures import ThreadPoolExecutor
      >>> with Renewed(lambda: ThreadPoolExecutor(2)) as executor:
      ...     executor.submit(abs, -1).result()
      1
    """

    def __init__(self, make: Callable[[], futures.Executor]):
        self._make, self._executor = make, make()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> futures.Future:
        try:
            return self._executor.submit(fn, *args, **kwargs)
        except futures.BrokenExecutor:
            self._executor = self._make()
            return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, **options: Any) -> None:
        self._executor.shutdown(wait, **options)


def evaluate(
    fn: Callable, params: Any, noise: Noise, *args: Any, executor: futures.Executor, in_axes: Any = None,
    rebuild: int | None = None, in_flight: int = 64, retries: int = 2, deadline: float | None = None,
    report: Callable[[int, float], Any] = lambda member, loss: None,
) -> np.ndarray:  # fmt: skip
    """`fn(params, *args)` of every member, in the workers of an executor: `[N]` losses for `estimate_gradient`.

    Args:
      fn: any function that the executor can send, of a member's params and `args`, as NumPy arrays; returns a number.
      params: what `noise` was sampled for.
      noise: the generation's.
      *args: further arguments.
      executor: a `concurrent.futures.Executor`. Processes must not be forked, as JAX runs threads:
        `ProcessPoolExecutor(8, multiprocessing.get_context("spawn"))`.
      in_axes: as in `population_apply`.
      rebuild: how many members a worker makes per task itself, of params (sent once per task) and the noise's key: it
        needs nesjax. None: members are sent as arrays, one per task, and the worker needs nothing.
      in_flight: tasks that are submitted at a time, at least as many as workers; the rest wait, as members to be made.
      retries: how often a task is submitted again whose worker died. Then its members have failed.
      deadline: seconds after which the members that are missing have failed; None: none.
      report: called with each member and its loss, in order of completion: a progress bar's `update`, say.

    Returns:
      float64; NaN for members that failed, which then weigh nothing, or rank worst.

    Raises:
      TypeError: an executor that is none, or `fn` returned something else than a number.
      ValueError: params or arguments that don't fit, or a number that must be positive.
      RuntimeError: `fn` raised; says for which member, and what. Or workers died of whatever they were given.
      concurrent.futures.BrokenExecutor: the executor broke, and takes no further task: see `Renewed`.

    Example:
      >>> import jax, numpy as np, nesjax
      >>> from concurrent.futures import ThreadPoolExecutor
      >>> params = np.ones(3, np.float32)
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.1))
      >>> with ThreadPoolExecutor(2) as executor:
      ...     losses = nesjax.outside.evaluate(lambda w: np.sum(w**2), params, noise, executor=executor)
      >>> losses.shape, float(np.round(losses.mean()))
      ((6,), 3.0)
    """
    instance_of(Noise, "noise", noise).check("params", params)
    if not isinstance(executor, futures.Executor):
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}.")
    per_task = 1 if rebuild is None else positive_int("rebuild", rebuild)
    positive_int("in_flight", in_flight)
    if not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be an int >= 0, got {retries!r}.")
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline must be more than 0 seconds, got {deadline!r}.")
    size = noise.population.size
    job = _Job(fn, params, noise, _arguments(fn, noise.population, args, in_axes), rebuild is not None)
    tasks = [range(first, min(first + per_task, size)) for first in range(0, size, per_task)]
    losses = np.full(size, np.nan)
    for member, loss in _completed(job, tasks, executor, in_flight, retries, deadline):
        losses[member] = loss
        report(member, loss)
    return losses


def _completed(
    job: _Job, tasks: list[range], executor: futures.Executor, in_flight: int, retries: int, deadline: float | None
) -> Iterator[tuple[int, float]]:
    """`(member, loss)` in order of completion; nothing of what the deadline cuts off."""
    waiting, running, lost = collections.deque(tasks), {}, collections.Counter()
    begin, left, came = time.monotonic(), deadline, False
    try:
        while (waiting or running) and (left is None or left > 0):
            # A last try has the workers for itself, lest it be another task that kills them.
            while waiting and len(running) < (1 if 0 < lost[waiting[0]] == retries else in_flight):
                members = waiting.popleft()
                running[job.submit(executor, members)] = members
            for future in futures.wait(running, left, futures.FIRST_COMPLETED).done:
                members = running.pop(future)
                try:
                    results, came = job.losses(future, members), True
                except LOST as error:
                    lost[members] += 1
                    if lost[members] <= retries:
                        waiting.append(members)
                        continue
                    if not came:
                        raise RuntimeError(
                            "executor: its workers died of every task so far: can they load fn?"
                        ) from error
                    results = [np.nan] * len(members)
                yield from zip(members, results)
            left = None if deadline is None else begin + deadline - time.monotonic()
    finally:
        for future in running:
            future.cancel()


def _arguments(fn: Callable, population: Population, args: tuple, in_axes: Any) -> Callable[[int], tuple]:
    """The arguments of member i."""
    group = population.group_size
    axes = mapped_axes(args, in_axes, population.size // group, argument_names(fn))
    leaves, treedef = jax.tree.flatten(jax.device_get(args))
    slices = lambda i: [x if axis is None else np.take(x, i // group, axis) for x, axis in zip(leaves, axes)]
    return lambda i: treedef.unflatten(slices(i))


_member = jax.jit(materialise)


@dataclasses.dataclass
class _Job:
    """What is sent of a generation, and read of what comes back."""

    fn: Callable
    params: Any
    noise: Noise
    args: Callable[[int], tuple]
    rebuild: bool

    @functools.cached_property
    def recipe(self) -> tuple[Any, Noise]:
        """Params and noise in NumPy arrays, without the tree and the schedules, which not every pickle can hold."""
        noise, population = self.noise, self.noise.population
        plain = Population(population.size, std=1.0, antithetic=population.antithetic)
        key, shared, std, params = jax.device_get(
            (jax.random.key_data(noise.key), noise.shared, noise.std, self.params)
        )
        return params, dataclasses.replace(noise, key=key, shared=shared, std=std, population=plain, treedef=None)

    def submit(self, executor: futures.Executor, members: range) -> futures.Future:
        if self.rebuild:
            return executor.submit(_rebuilt, self.fn, *self.recipe, members, [self.args(i) for i in members])
        (i,) = members
        return executor.submit(self.fn, jax.device_get(_member(self.params, self.noise, i)), *self.args(i))

    def losses(self, future: futures.Future, members: range) -> list[float]:
        """The members' losses; raises one of `LOST` for a lost task, and RuntimeError for a member's exception."""
        error = future.exception()
        if isinstance(error, LOST):
            raise error
        results = [error] * len(members) if error else future.result() if self.rebuild else [future.result()]
        return [self._loss(*result) for result in zip(members, results)]

    @staticmethod
    def _loss(member: int, result: Any) -> float:
        if isinstance(result, BaseException):
            raise RuntimeError(f"fn failed for member {member}: {type(result).__name__}: {result}") from result
        try:
            return float(result)
        except (TypeError, ValueError):
            raise TypeError(f"fn must return a number, got {type(result).__name__} for member {member}.") from None


def _rebuilt(fn: Callable, params: Any, noise: Noise, members: range, args: list[tuple]) -> list[Any]:
    """In a worker: what `fn` returns for each member, or the exception that it raises."""
    key = jax.random.wrap_key_data(noise.key, impl="threefry2x32")
    noise = dataclasses.replace(noise, key=key, treedef=jax.tree.structure(params))

    def result(i, args):
        try:
            return fn(jax.device_get(_member(params, noise, i)), *args)
        except Exception as error:
            error.add_note(traceback.format_exc())  # which doesn't travel otherwise
            return error

    return [result(*task) for task in zip(members, args)]
