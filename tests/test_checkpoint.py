"""Checkpoints: exact, complete or absent, refused where they don't fit; errors of the machine leave the state alone."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

import faults
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nesjax
from nesjax.checkpoint import CheckpointError, Run

KEY = jax.random.key(0)
OPTIMIZER = optax.adam(0.1)
POPULATION = nesjax.Population(16, std=0.1, antithetic=True, chunk_size=4)
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}


def loss_fn(params):
    return jnp.sum((jnp.eye(3) @ params["w"]) ** 2) + jnp.sum((params["b"].astype(jnp.float32) - 1) ** 2)


STEP = nesjax.make_train_step(loss_fn, OPTIMIZER, POPULATION)


def new_state(params=PARAMS, optimizer=OPTIMIZER, **more):
    return nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY, **more)


def train(state, steps, step=STEP, run=None):
    while state.step < steps:
        state, metrics = step(state)
        if run is not None:
            run.update(state, metrics)
    return state


def assert_same(state, expected, **tolerance):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, **tolerance) if tolerance else np.testing.assert_array_equal(a, b)

    jax.tree.map(same, state, expected)


def test_resumed_is_the_same_to_the_bit(tmp_path):
    with Run(tmp_path, POPULATION, every=2) as run:
        train(run.restore(new_state()), 5, run=run)  # the newest checkpoint is of step 4
    with Run(tmp_path, POPULATION, every=2) as run:
        state = run.restore(new_state())
        assert state.step == 4
        assert_same(train(state, 9, run=run), train(new_state(), 9))


def test_observation_statistics_are_saved(tmp_path):
    stats = nesjax.rl.ObsStats(jnp.uint32(7), jnp.arange(3.0), jnp.ones(3))
    state = new_state(obs_stats=stats)
    nesjax.checkpoint.save(tmp_path, state, POPULATION)
    like = new_state(obs_stats=nesjax.rl.ObsStats.create((3,)))
    assert_same(nesjax.checkpoint.restore(tmp_path, like, POPULATION), state)


def mesh_step(count):
    mesh = jax.make_mesh((count,), ("devices",), devices=jax.devices()[:count])
    return nesjax.make_train_step(loss_fn, OPTIMIZER, POPULATION, mesh=mesh)


@pytest.mark.parametrize("before, after", [(4, 4), (4, 2), (1, 4), (4, 1)])
def test_goes_on_with_other_devices(before, after, tmp_path):
    nesjax.checkpoint.save(tmp_path, train(new_state(), 3, mesh_step(before)), POPULATION)
    state = nesjax.checkpoint.restore(tmp_path, new_state(), POPULATION)
    assert state.step == 3
    tolerance = {} if before == after else {"rtol": 1e-4, "atol": 1e-5}
    assert_same(train(state, 6, mesh_step(after)), train(new_state(), 6, mesh_step(before)), **tolerance)


def test_restored_arrays_go_where_the_given_ones_are(tmp_path):
    nesjax.checkpoint.save(tmp_path, new_state(), POPULATION)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = nesjax.checkpoint.restore(tmp_path, jax.device_put(new_state(), everywhere), POPULATION)
    assert state.params["w"].sharding == everywhere and state.key.sharding.device_set == everywhere.device_set


def population(**changes):
    return nesjax.Population(**{"size": 16, "std": 0.1, "antithetic": True, **changes})


@pytest.mark.parametrize(
    "state, population, differs",
    [
        (new_state({"w": jnp.ones((3, 4)), "b": PARAMS["b"]}), POPULATION, ["state.params/w: float32[3, 2]", "[3, 4]"]),
        (new_state({**PARAMS, "c": jnp.ones(1)}), POPULATION, ["state.params/c: absent in the checkpoint"]),
        (new_state({"w": PARAMS["w"]}), POPULATION, ["state.params/b: bfloat16[2] in the checkpoint, absent here"]),
        (new_state(optimizer=optax.sgd(0.1)), POPULATION, ["state.opt_state/0/mu/w", "absent here"]),
        (new_state(), population(size=32), ["population.size: 16 in the checkpoint, 32 here"]),
        (new_state(), population(antithetic=False), ["population.antithetic: True"]),
        (new_state(), population(std=0.2), ["population.std: 0.1 in the checkpoint, 0.2 here"]),
        (new_state(), population(std=optax.exponential_decay(0.1, 10, 0.5)), ["population.std", "schedule(0.1, "]),
        (new_state(), population(noise={"w": nesjax.Gaussian()}), ["population.noise: LowRank", "'w', Gaussian()"]),
        (new_state().replace(key=jax.random.key(0, impl="rbg")), POPULATION, ["state.key: key<fry>[]", "key<rbg>[]"]),
        (new_state(obs_stats=nesjax.rl.ObsStats.create((2,))), POPULATION, ["state.obs_stats/mean: absent"]),
    ],
)
def test_of_something_else_is_refused(state, population, differs, tmp_path):
    nesjax.checkpoint.save(tmp_path, new_state(), POPULATION)
    with pytest.raises(ValueError) as error:
        nesjax.checkpoint.restore(tmp_path, state, population)
    for text in (str(tmp_path), *differs):
        assert text in str(error.value)


def test_chunks_and_equal_schedules_are_not_another_population(tmp_path):
    schedule = lambda: optax.exponential_decay(0.1, 10, 0.5)
    nesjax.checkpoint.save(tmp_path, new_state(), population(std=schedule()))
    nesjax.checkpoint.restore(tmp_path, new_state(), population(std=schedule(), chunk_size=8))


def test_a_std_of_numpy_or_a_schedule_of_arrays(tmp_path):
    nesjax.checkpoint.save(tmp_path / "number", new_state(), population(std=np.float64(0.1)))
    nesjax.checkpoint.restore(tmp_path / "number", new_state(), population(std=0.1))
    nesjax.checkpoint.save(
        tmp_path / "schedule", new_state(), population(std=lambda step: 0.1 / (1 + step.astype(jnp.float32)))
    )


def test_the_newest_and_the_best_stay(tmp_path):
    with Run(tmp_path, POPULATION, every=1, keep=2, best="loss") as run:
        for at, loss in enumerate((3.0, 1.0, float("nan"), 2.0, 5.0, 4.0)):
            run.update(new_state().replace(step=jnp.int32(at)), {"loss": loss, "std": 0.1})
    with Run(tmp_path, POPULATION, every=1, keep=2, best="loss") as run:
        assert run.steps == [1, 4, 5]
        with pytest.raises(ValueError, match=r"step must be one of the checkpoints \[1, 4, 5\] in .*, got 3"):
            run.restore(new_state(), step=3)
        state = run.restore(new_state())
        for at in (6, 7):
            run.update(state.replace(step=jnp.int32(at)), {"loss": 3.0})
    with Run(tmp_path, POPULATION) as run:
        assert run.steps == [1, 6, 7]
        with pytest.raises(ValueError, match=r"step must be the newest checkpoint, 7, of a run .* got 1"):
            run.restore(new_state(), step=1)
    with Run(tmp_path, POPULATION, best="loss", read_only=True) as run:
        assert run.best_step == 1 and run.restore(new_state(), step=1).step == 1


def test_what_is_there_is_never_taken_for_what_is_saved(tmp_path):
    """Of another run, say, which began anew in the same folder."""
    with Run(tmp_path, POPULATION) as run:
        for step in (0, 5, 5):  # saved by itself: nothing to do
            run.save(new_state().replace(step=jnp.int32(step)))
    for step in (0, 4, 5):
        with Run(tmp_path, POPULATION) as run, pytest.raises(ValueError, match=f"step beyond 5, .* got step {step}: "):
            run.save(new_state().replace(step=jnp.int32(step)))
    with Run(tmp_path, POPULATION) as run:
        run.save(run.restore(new_state()))
        assert run.steps == [0, 5]


def test_metrics_may_hold_aux(tmp_path):
    step = nesjax.make_train_step(lambda params: (loss_fn(params), params), OPTIMIZER, POPULATION, has_aux=True)
    with Run(tmp_path, POPULATION, every=1, best="loss") as run:
        train(new_state(), 2, step, run)
        assert run.steps == [1, 2]


def test_updates_are_logged_and_the_last_one_is_recorded_by_a_save(tmp_path):
    rows = []
    with Run(tmp_path, POPULATION, every=2, best="loss", log=lambda *row: rows.append(row)) as run:
        for at, loss in enumerate((3.0, 2.0, float("nan"), 1.0)):
            state = new_state().replace(step=jnp.int32(at))
            run.update(state, {"loss": jnp.float32(loss), "aux": jnp.zeros(16)})
        run.save(state)  # without metrics: those of its update
        assert run.steps == [0, 2, 3] and run.best_step == 3
    assert [at for at, _ in rows] == [0, 1, 2, 3] and rows[1] == (1, {"loss": 2.0}) and np.isnan(rows[2][1]["loss"])


def test_a_save_without_metrics_says_nothing(tmp_path, caplog):
    with Run(tmp_path, POPULATION, best="loss") as run:
        run.save(new_state())
    assert not caplog.records


def test_a_run_is_logged_for_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    with tensorboard.SummaryWriter(str(tmp_path / "log")) as writer:

        def log(step, metrics):
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        with Run(tmp_path, POPULATION, log=log) as run:
            train(new_state(), 2, run=run)
    written = b"".join(path.read_bytes() for path in (tmp_path / "log").iterdir())
    assert b"grad_snr" in written and b"loss_std" in written


def test_who_only_reads_sees_what_another_saves(tmp_path):
    with Run(tmp_path, POPULATION, keep=1) as run:
        run.save(new_state())
        run.wait()
        with Run(tmp_path, POPULATION, read_only=True) as reader:
            assert reader.restore(new_state()).step == 0
            run.save(new_state().replace(step=jnp.int32(3)))
            run.wait()
            assert reader.steps == [3] and reader.restore(new_state()).step == 3


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda folder: Run(folder, POPULATION, every=0), ValueError, "every must be an int >= 1, got 0"),
        (lambda folder: Run(folder, POPULATION, keep=0), ValueError, "keep must be an int >= 1, got 0"),
        (lambda folder: Run(folder, POPULATION, max_skipped=0), ValueError, "max_skipped must be an int >= 1, got 0"),
        (lambda folder: Run(folder, None), TypeError, "population must be a nesjax.Population, got NoneType"),
        (lambda folder: Run(folder, POPULATION, read_only=True).save(new_state()), ValueError, "read_only must be"),
        (lambda folder: Run(folder, POPULATION, log="x"), TypeError, "log must be a function"),
        (lambda folder: Run(folder, POPULATION).restore({}), TypeError, "state must be a nesjax.TrainState, got dict"),
        (lambda folder: nesjax.checkpoint.restore(folder, new_state(), POPULATION), ValueError, "which holds none"),
        (lambda folder: nesjax.checkpoint.restore(folder / "x", new_state(), POPULATION), ValueError, "doesn't exist"),
        (
            lambda folder: Run(folder, POPULATION, best="accuracy").save(new_state(), {"loss": 1.0}), ValueError,
            r"best must be one of the metrics \['loss'\], got 'accuracy'",
        ),
        (
            lambda folder: Run(folder, POPULATION).update(new_state(), {"loss": "low"}), TypeError,
            "metrics must be arrays and numbers, got str for 'loss'",
        ),
        (lambda folder: Run(folder, POPULATION).save(new_state(), [0.1]), TypeError, "a dict of .* got list"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path)


def test_a_damaged_checkpoint_says_so_and_an_older_one_can_be_had(tmp_path):
    with Run(tmp_path, POPULATION, every=1) as run:
        train(new_state(), 2, run=run)
    for path in (tmp_path / "nesjax_2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    with Run(tmp_path, POPULATION) as run, pytest.raises(CheckpointError, match="could not be read at step 2"):
        run.restore(new_state())
    assert nesjax.checkpoint.restore(tmp_path, new_state(), POPULATION, step=1).step == 1


def test_looking_leaves_a_save_under_way_alone(tmp_path):
    with Run(tmp_path, POPULATION) as run:
        run.save(new_state())
    half = tmp_path / "nesjax_7.orbax-checkpoint-tmp"
    half.mkdir()
    assert nesjax.checkpoint.restore(tmp_path, new_state(), POPULATION).step == 0 and half.exists()
    with Run(tmp_path, POPULATION) as run:  # the run itself clears up, in the background
        assert run.steps == [0]
        run.save(new_state().replace(step=jnp.int32(1)))
    assert not half.exists()


def test_nothing_is_pickled(tmp_path):
    nesjax.checkpoint.save(tmp_path, new_state(), POPULATION)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if path.read_bytes().startswith(b"\x80")]
    json.loads((tmp_path / "nesjax_0" / "about" / "metadata").read_text())


def test_killed_at_any_point_it_goes_on_from_a_whole_checkpoint(tmp_path):
    """SIGKILL five times, also while a save is written, renamed, or an old one removed: see `faults.kill`."""
    rows = list(faults.kill(tmp_path, kills=5, every=2, seed=0))
    assert len(rows) == 5 and rows[-1]["restored"] > 0 and any(row["saving"] for row in rows)
    assert {row["killed"] for row in rows} == set(faults.MOMENTS)


def test_sigterm_saves_and_ends(tmp_path):
    with faults.trainee(tmp_path, 10**6) as process:
        seen = faults.lines(process, until=3)
        process.send_signal(signal.SIGTERM)
        seen += faults.lines(process)
        assert process.wait(60) == 128 + signal.SIGTERM
    with Run(tmp_path, faults.POPULATION) as run:
        assert run.steps == [seen[-1].step]
        assert faults.digest(run.restore(faults.new_state())) == seen[-1].digest


@pytest.mark.parametrize("within", ["an inner run", "an outer run"])
def test_a_sigterm_that_no_update_hears_of_is_passed_on(within, tmp_path):
    """After the last update, or while another run's folder is read."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with contextlib.suppress(SystemExit), Run(tmp_path / "outer", POPULATION) as outer:
            outer.save(new_state())
            if within == "an inner run":
                with Run(tmp_path / "inner", POPULATION):
                    signal.raise_signal(signal.SIGTERM)
                outer.update(new_state().replace(step=jnp.int32(1)), {})
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    with Run(tmp_path / "outer", POPULATION) as outer:
        assert (seen, outer.steps) == (([], [0, 1]) if within == "an inner run" else (["outside"], [0]))


IN_TROUBLE = """
import os, resource, sys
import faults
import nesjax
from nesjax.checkpoint import CheckpointError, Run
trouble, folder = sys.argv[1:]
state = faults.new_state()
with Run(folder, faults.POPULATION, every=1) as run:
    run.save(state)
    saved = faults.digest(run.restore(state))
state, metrics = faults.step(state)
if trouble == "read-only":
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:  # whom modes don't stop; what others may not read is imported by now
        os.seteuid(65534)
run = Run(folder, faults.POPULATION, every=1).__enter__()  # so that it saves in the background
assert faults.digest(run.restore(faults.new_state())) == saved  # reading needs no more than that
if trouble == "no space":
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def told(do, *args):  # what it raises
    try:
        do(*args)
    except CheckpointError as error:
        return str(error)


before = faults.digest(state)
print(told(run.update, state, metrics) or told(run.wait))
assert faults.digest(state) == before
if trouble == "no space":
    for _ in range(2):  # training goes on; of the first one's failure the second one hears, and still begins
        state, metrics = faults.step(state)
        heard = told(run.update, state, metrics)
    assert "saved at step 2" in heard, heard
    assert "saved at step 3" in told(run.wait)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    state, metrics = faults.step(state)
    run.update(state, metrics)
    run.wait()
    assert run.steps == [0, 4], run.steps
    assert faults.digest(run.restore(faults.new_state())) == faults.digest(state)
"""


@pytest.mark.parametrize("trouble", ["no space", "read-only"])
def test_what_cannot_be_written_says_so_and_nothing_is_lost(trouble):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o755)
        folder = f"{folder}/run"
        command = [sys.executable, "-c", IN_TROUBLE, trouble, folder]
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"checkpoints in {folder} could not be saved" in done.stdout
    assert "The training state in memory is unchanged" in done.stdout
