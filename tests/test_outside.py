"""Losses computed by the workers of an executor: threads, a process pool, Dask."""

import concurrent.futures
import multiprocessing
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside_tasks as tasks
import pytest

import nesjax

N = 6
SEEDS = np.arange(N)
PARAMS = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2)}
NOISE = nesjax.sample_noise(
    jax.random.key(0), PARAMS, nesjax.Population(N, std=optax.constant_schedule(0.1), antithetic=True), step=0
)
EXPECTED = [np.sum(nesjax.materialise(PARAMS, NOISE, i)["w"] ** 2) + i for i in range(N)]


def make_pool():
    return concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def pool():
    with nesjax.outside.Renewed(make_pool) as pool:
        yield pool


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        yield threads


def evaluate(fn, executor, *args, **options):
    options = {"in_axes": (0, *(None for _ in args))} | options
    return nesjax.outside.evaluate(fn, PARAMS, NOISE, SEEDS, *args, executor=executor, **options)


@pytest.mark.parametrize("options", [{}, {"rebuild": 4}, {"in_flight": 1}])
def test_losses_are_those_of_the_members(pool, options):
    np.testing.assert_allclose(evaluate(tasks.loss, pool, **options), EXPECTED, rtol=1e-5)


def test_a_group_shares_an_argument(threads):
    noise = nesjax.sample_noise(jax.random.key(0), PARAMS, nesjax.Population(N, std=0.1, group_size=3))
    losses = nesjax.outside.evaluate(
        lambda params, seeds: seeds.sum(), PARAMS, noise, np.arange(4.0).reshape(2, 2), in_axes=1, executor=threads
    )
    assert losses.tolist() == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("options", [{}, {"rebuild": 2}])
def test_a_lost_task_is_tried_again(pool, tmp_path, options):
    losses = evaluate(tasks.dies_once, pool, np.array(str(tmp_path)), **options)
    np.testing.assert_allclose(losses, EXPECTED, rtol=1e-5)


def test_what_always_kills_its_worker_fails_alone(pool):
    losses = evaluate(tasks.dies, pool)
    assert np.isnan(losses[3]) and np.isfinite(np.delete(losses, 3)).all()


def test_workers_that_die_of_everything_end_the_call(pool):
    with pytest.raises(RuntimeError, match="executor: its workers died of every task so far"):
        nesjax.outside.evaluate(tasks.dies, PARAMS, NOISE, 3, executor=pool, retries=1)


def test_a_broken_executor_says_so():
    with make_pool() as broken, pytest.raises(concurrent.futures.BrokenExecutor, match="terminated abruptly"):
        evaluate(tasks.dies, broken)


@pytest.mark.parametrize("options", [{}, {"rebuild": 4}])
def test_the_exception_of_a_member_names_it(pool, options):
    with pytest.raises(RuntimeError, match="fn failed for member 3: ArithmeticError: the leg fell off") as caught:
        evaluate(tasks.fails, pool, **options)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert np.isfinite(evaluate(tasks.loss, pool)).all()  # the workers live


def test_members_that_miss_the_deadline_have_failed_and_the_others_come_as_they_are_done(threads):
    late, came = threading.Event(), []
    wait = lambda params, seed: float(seed) if seed else late.wait(60)
    losses = evaluate(wait, threads, in_flight=2, deadline=0.5, report=lambda *pair: came.append(pair))
    late.set()
    assert np.isnan(losses[0]) and losses[1:].tolist() == [1, 2, 3, 4, 5]
    assert came == [(i, float(i)) for i in range(1, N)]


def test_dask_workers_of_which_one_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, protocol="tcp") as cluster,
        distributed.Client(cluster) as client,
    ):
        losses = evaluate(tasks.dies_once, client.get_executor(pure=False), np.array(str(tmp_path)))
    np.testing.assert_allclose(losses, EXPECTED, rtol=1e-5)
    assert (tmp_path / "3").exists()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"executor": 4}, TypeError, "executor must be a concurrent.futures.Executor, got int"),
        ({"rebuild": 0}, ValueError, "rebuild must be an int >= 1, got 0"),
        ({"in_flight": 1.5}, ValueError, "in_flight must be an int >= 1, got 1.5"),
        ({"retries": -1}, ValueError, "retries must be an int >= 0, got -1"),
        ({"deadline": 0}, ValueError, "deadline must be more than 0 seconds, got 0"),
        ({"fn": lambda params, seed: None}, TypeError, "fn must return a number, got NoneType for member"),
        ({"in_axes": (0, 0)}, ValueError, "in_axes must have an entry for each of the 1 args"),
        ({"params": {}}, ValueError, "params must have the structure that the noise was sampled for"),
        ({"noise": None}, TypeError, "noise must come from nesjax.sample_noise, got NoneType"),
    ],
)
def test_bad_input(threads, options, error, message):
    given = {"fn": tasks.loss, "params": PARAMS, "noise": NOISE, "executor": threads, "in_axes": 0} | options
    with pytest.raises(error, match=re.escape(message)):
        nesjax.outside.evaluate(given.pop("fn"), given.pop("params"), given.pop("noise"), SEEDS, **given)
