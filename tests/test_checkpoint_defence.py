"""Checkpoints that defend themselves: nothing of others' is touched, damage is seen, one writer at a time."""

import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from mutations import mutate
from test_checkpoint import KEY, OPTIMIZER, POPULATION, assert_same, new_state

import nesjax
from nesjax.checkpoint import CheckpointError, Run, restore, save
from nesjax.checkpoint.description import sealed

ROOT = pathlib.Path(nesjax.__file__).parents[1]


def at(step):
    return new_state().replace(step=jnp.int32(step))


def listed(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_folders_of_the_users_own_are_left_alone(tmp_path):
    """Six seeds' runs named by numbers, another library's half save, files."""
    for name in (*map(str, range(6)), "7.orbax-checkpoint-tmp", "step_3", "nesjax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    before = listed(tmp_path)
    save(tmp_path, at(1), POPULATION)
    with Run(tmp_path, POPULATION, every=1, keep=1) as run:
        for step in (2, 3, 4):
            run.update(at(step), {})
    assert restore(tmp_path, new_state(), POPULATION).step == 4
    after = listed(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("nesjax_") for name in set(after) - set(before))


def test_a_single_save_keeps_everything(tmp_path):
    """Also a run's best, and what a run keeps is known when it goes on."""
    with Run(tmp_path, POPULATION, every=1, keep=10, best="loss") as run:
        for step in range(1, 11):
            run.update(at(step), {"loss": float(step)})
    save(tmp_path, at(11), POPULATION)
    with Run(tmp_path, POPULATION, read_only=True) as run:
        assert run.steps == list(range(1, 12)) and run.best_step == 1
    with Run(tmp_path, POPULATION, every=1) as run:
        assert (run.keep, run.best) == (10, "loss")
        run.restore(new_state())
        for step in range(12, 15):
            run.update(at(step), {"loss": 20.0})
    with Run(tmp_path, POPULATION, read_only=True) as run:
        assert run.steps == [1, *range(5, 15)]


@pytest.mark.parametrize("options", [{"keep": 2}, {"best": None}, {"best": "std"}, {"keep": 2, "best": None}])
def test_a_change_that_would_delete_is_refused(options, tmp_path):
    with Run(tmp_path, POPULATION, every=1, keep=3, best="loss") as run:
        for step in range(1, 6):
            run.update(at(step), {"loss": float(step), "std": 0.1})
    before = listed(tmp_path)
    with pytest.raises(
        ValueError, match=r"would delete .* are kept so far|would delete one of .* the lowest 'loss' is kept so far"
    ):
        Run(tmp_path, POPULATION, **options)
    assert {name for name, _ in listed(tmp_path).items()} == set(before)
    with Run(tmp_path, POPULATION, keep=5) as run:  # more may be kept
        assert run.steps == [1, 3, 4, 5] and run.best == "loss"


def test_single_saves_are_not_thinned_by_a_run(tmp_path):
    for step in range(5):
        save(tmp_path, at(step), POPULATION)
    with pytest.raises(ValueError, match=r"keep=3 would delete some of the checkpoints .* where all are kept so far"):
        Run(tmp_path, POPULATION, keep=3)
    with Run(tmp_path, POPULATION, keep=None) as run:
        assert run.steps == list(range(5))


# ---- damage


def test_a_flipped_bit_is_seen(tmp_path):
    """In the arrays' own files, 20 places of each: never other weights, and the message says what and where else."""
    state = new_state({"w": jax.random.normal(KEY, (64, 64)), "b": jnp.ones(7, jnp.bfloat16)})
    with Run(tmp_path / "run", POPULATION) as run:
        run.save(state)
        run.save(state.replace(step=jnp.int32(5)))
    (data,) = sorted((tmp_path / "run" / "nesjax_5" / "state").rglob("d/*"), key=lambda path: -path.stat().st_size)[:1]
    refused = []
    for place in np.linspace(0, data.stat().st_size - 1, 20).astype(int):
        broken = tmp_path / f"{place}"
        shutil.copytree(tmp_path / "run", broken)
        path = broken / data.relative_to(tmp_path / "run")
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << int(place) % 8
        path.write_bytes(content)
        try:
            assert_same(restore(broken, state, POPULATION), state.replace(step=jnp.int32(5)))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("at step 5" in text and "The newest older sound one is of step 0" in text for text in refused)
    assert any(("the bytes of " in text and "opt_state" in text) or "params" in text for text in refused)
    restore(tmp_path / "run", state, POPULATION, verify=False)


def test_damage_of_any_file_is_seen(tmp_path):
    """A few of what `python -m benchmarks mutations` does a thousand times."""
    outcomes = [row["outcome"] for row in mutate(tmp_path, 24, seed=1)]
    assert len(outcomes) == 24 and set(outcomes) <= {"right", "refused"} and "refused" in outcomes


def test_damaged_metrics_are_seen(tmp_path):
    """By who would keep or name the best checkpoint by them; the states don't depend on them."""
    with Run(tmp_path, POPULATION, every=1, best="loss") as run:
        for step in (1, 2):
            run.update(at(step), {"loss": float(step)})
    metrics = tmp_path / "nesjax_1" / "metrics" / "metrics"
    for content in ('{"loss": 3.0}', '{"loss": "1"}', "7", None):
        metrics.write_text(content) if content else metrics.unlink()
        for options in ({}, {"read_only": True}):
            with pytest.raises(CheckpointError, match="the metrics of nesjax_1 are damaged; remove that folder to go"):
                Run(tmp_path, POPULATION, **options)
    assert [restore(tmp_path, new_state(), POPULATION, step=step).step for step in (1, 2)] == [1, 2]
    metrics.write_text("{")  # which orbax itself would read
    with pytest.raises(CheckpointError, match="the metrics of nesjax_1 are damaged; remove that folder to go"):
        restore(tmp_path, new_state(), POPULATION)


@pytest.mark.parametrize("size, message", [(256, r"params/w as \[4096, 4096\]"), (3, r"packed as \[\d+\]")])
def test_what_declares_other_shapes_is_not_read(size, message, tmp_path):
    """Files whose arrays are larger than the description says: refused before any array is read."""
    small, large = (new_state({**new_state().params, "w": jnp.zeros((n, n))}) for n in (size, 4096))
    save(tmp_path / "small", small, POPULATION)
    save(tmp_path / "large", large, POPULATION)
    about = tmp_path / "large" / "nesjax_0" / "about"
    shutil.rmtree(about)
    shutil.copytree(tmp_path / "small" / "nesjax_0" / "about", about)
    with pytest.raises(CheckpointError, match=f"its files declare .*{message}"):
        restore(tmp_path / "large", small, POPULATION, verify=False)
    (about / "metadata").write_text(json.dumps({"description": "x" * 2 * 10**7}))
    with pytest.raises(CheckpointError, match="its description has 20,000,019 bytes"):
        restore(tmp_path / "large", small, POPULATION)


def test_many_small_arrays(tmp_path):
    """They lie in one, where each would cost milliseconds; still each has its digest, and errors name it."""
    state = new_state({f"w{at}": np.full(at % 4, at, np.float32) for at in range(1000)})
    save(tmp_path, state, POPULATION)
    assert_same(restore(tmp_path, state, POPULATION), state)
    declared = json.loads((tmp_path / "nesjax_0" / "state" / "_METADATA").read_text())
    assert len(declared["tree_metadata"]) == 1
    about = tmp_path / "nesjax_0" / "about" / "metadata"
    content = json.loads(about.read_text())
    del content["digest"]
    for path in list(content["digests"])[7:40]:
        content["digests"][path] = "0" * 32
    about.write_text(json.dumps(sealed(content)))
    with pytest.raises(CheckpointError, match=r"the bytes of (\S+/w\d+, ){20}13 more are not those that were saved"):
        restore(tmp_path, state, POPULATION)
    with pytest.raises(ValueError, match=r"state.\S+/w0: float32\[0\] in the checkpoint, absent here(\n.*)+ more$"):
        restore(tmp_path, new_state(), POPULATION)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(options)` is a file system of its own, of memory, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr}")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("options", ["size=400k", "nr_inodes=90"])
def test_a_full_disk_loses_nothing(options, small_disk):
    """Full by bytes or by files: the save says so, the ones before are whole, and with space it goes on."""
    folder = small_disk(options)
    with Run(folder, POPULATION, keep=None) as run:
        with pytest.raises(CheckpointError, match=r"could not be saved at step \d+: .*No space left on device"):
            for step in range(100):
                run.save(at(step))
                run.wait()
        assert run.steps == list(range(step)) and step >= 2
        for sound in (0, step - 1):
            assert_same(restore(folder, new_state(), POPULATION, step=sound), at(sound))
        shutil.rmtree(folder / "nesjax_0")
        run.save(at(step))
        run.wait()
        assert_same(run.restore(new_state()), at(step))


# ---- one writer


WRITER = """
import sys
import nesjax
from test_checkpoint import POPULATION, new_state
with nesjax.checkpoint.Run(sys.argv[1], POPULATION) as run:
    run.save(new_state())
    run.wait()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout.readline() == "writing\n"
        for write in (lambda: Run(tmp_path, POPULATION), lambda: save(tmp_path, at(3), POPULATION)):
            with pytest.raises(ValueError, match=f"folder must have no other writer, but .*:{process.pid} writes in"):
                write()
        assert restore(tmp_path, new_state(), POPULATION).step == 0  # reading is free
        process.kill()
    with Run(tmp_path, POPULATION) as run:  # the system's lock went with it
        run.restore(new_state())
        with pytest.raises(ValueError, match=f"but .*:{os.getpid()} writes in"):
            Run(tmp_path, POPULATION)


def test_a_writer_on_another_machine_holds_a_lease(tmp_path):
    lock = tmp_path / "nesjax_run.lock"
    lock.write_text("node7:1234")
    with pytest.raises(ValueError, match=r'but node7:1234 writes in .*is dead, pass take_over="node7:1234"'):
        Run(tmp_path, POPULATION)
    with Run(tmp_path, POPULATION, take_over="node7:1234") as run:
        run.save(new_state())
        lock.write_text("node8:7")  # which took it over in turn
        run._lock._renewed -= 1000
        with pytest.raises(CheckpointError, match="node8:7 took over"):
            run.update(at(100), {})
    assert lock.read_text() == "node8:7"
    os.utime(lock, (time.time() - 10_000,) * 2)  # it renewed its lease no more
    Run(tmp_path, POPULATION).close()
    assert lock.read_text() == ""


def test_each_checkpoint_names_its_run(tmp_path):
    ids = []
    for steps in (1, 2):
        with Run(tmp_path / "a", POPULATION) as run:
            run.restore(new_state())
            run.save(at(steps))
            ids.append(run.id)
    save(tmp_path / "b", new_state(), POPULATION)
    named = [
        json.loads((tmp_path / folder / "about" / "metadata").read_text())["run"]
        for folder in ("a/nesjax_1", "a/nesjax_2", "b/nesjax_0")
    ]
    assert ids[0] == ids[1] == named[0] == named[1] != named[2]


# ---- what a state may be


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The step takes the state's memory while the save before is under way."""
    step = nesjax.make_train_step(
        lambda params: jnp.sum((jnp.ones(512) @ params["w"] - 1) ** 2), OPTIMIZER, POPULATION, donate=True
    )  # fmt: skip
    params, key = {"w": jnp.zeros((512, 512))}, jax.random.key(0)
    state = nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=key)
    expected = {}
    with Run(tmp_path, POPULATION, every=1, keep=None) as run:
        for _ in range(5):
            old = state
            state, metrics = step(state)
            expected[int(state.step)] = np.array(state.params["w"])
            run.update(state, metrics)
            assert old.params["w"].is_deleted()
    assert not params["w"].is_deleted() and not key.is_deleted()  # the state's leaves are its own
    like = nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=key)
    for at_step, w in expected.items():
        np.testing.assert_array_equal(restore(tmp_path, like, POPULATION, step=at_step).params["w"], w)


def test_donating_saves_a_states_memory():
    state = nesjax.TrainState.create(params={"w": jnp.zeros((512, 512))}, optimizer=OPTIMIZER, key=KEY)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))

    def aliased(donate):
        step = nesjax.make_train_step(
            lambda params: jnp.sum(jnp.ones(512) @ params["w"]), OPTIMIZER, POPULATION, donate=donate
        )
        return step.lower(state).compile().memory_analysis().alias_size_in_bytes

    assert aliased(True) - aliased(False) >= size


def test_an_empty_array_is_saved(tmp_path):
    state = new_state({**new_state().params, "none": jnp.zeros((0, 2))})
    save(tmp_path, state, POPULATION)
    assert_same(restore(tmp_path, state, POPULATION), state)


def test_leaves_that_are_numpy_or_numbers_are_converted(tmp_path):
    state = new_state().replace(
        params={"w": np.ones((3, 2), np.float32), "b": jnp.zeros(2, jnp.bfloat16)}, step=3, skipped=np.int32(0)
    )
    save(tmp_path, state, POPULATION)
    restored = restore(tmp_path, state, POPULATION)
    assert_same(restored, at(3).replace(opt_state=restored.opt_state))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"params": {"w": "text"}}, TypeError, "state must hold arrays and numbers, got str at params/w"),
        ({"params": {"w": np.array(["a"])}}, TypeError, "state must hold arrays and numbers, got <U1 at params/w"),
        ({"step": jnp.int32(-1)}, ValueError, "state must have a step >= 0, got -1"),
        ({"step": -1}, ValueError, "state must have a step >= 0, got -1"),
    ],
)
def test_what_is_no_state_is_refused(change, error, message, tmp_path):
    for do in (lambda state: save(tmp_path, state, POPULATION), lambda state: restore(tmp_path, state, POPULATION)):
        with pytest.raises(error, match=message):
            do(new_state().replace(**change))


# ---- how a run ends


def test_use_after_the_end_is_refused(tmp_path):
    with Run(tmp_path, POPULATION, every=1) as run:
        run.update(at(1), {})
    for use in (lambda: run.update(at(2), {}), lambda: run.save(at(2)), lambda: run.steps, run.wait):
        with pytest.raises(ValueError, match=r"the run in .* is closed"):
            use()
    run.close()


UNCLOSED = """
import sys
import nesjax
from test_checkpoint import POPULATION, new_state
run = nesjax.checkpoint.Run(sys.argv[1], POPULATION)
run.save(new_state())
if sys.argv[2] == "after the end":
    run.close()
    run.save(new_state())
"""


@pytest.mark.parametrize("what", ["unclosed", "after the end"])
def test_the_process_ends_and_the_save_is_there(what, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", UNCLOSED, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == (what != "unclosed"), done.stderr
    assert ("is closed" in done.stderr) == (what != "unclosed") and "Event loop" not in done.stderr
    assert restore(tmp_path, new_state(), POPULATION).step == 0


def _wait_forever(started):
    started.set()
    time.sleep(600)


def forked():
    """A worker process that waits, with a copy of whatever this one holds."""
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    worker = fork.Process(target=_wait_forever, args=(started,))
    worker.start()
    assert started.wait(60)
    return worker


def test_forked_workers_end_at_sigterm(tmp_path):
    """They inherit the run's handler, which acts in its own process alone."""
    with Run(tmp_path, POPULATION) as run:
        worker = forked()
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == -signal.SIGTERM
        run.update(at(1), {})  # this process was told nothing


def test_a_worker_that_outlives_its_writer_holds_no_lock(tmp_path):
    run = Run(tmp_path, POPULATION)
    worker = forked()
    run.close()
    Run(tmp_path, POPULATION).close()  # though the worker has a copy of the file
    worker.kill()
    worker.join()


def test_a_second_sigterm_ends_at_once(tmp_path):
    seen, before = [], signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with Run(tmp_path, POPULATION) as run:
            signal.raise_signal(signal.SIGTERM)
            assert not seen
            signal.raise_signal(signal.SIGTERM)
            assert seen == ["outside"]
            run._termination.heard = False
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("folder", sorted(kinds.FOLDER.iterdir()), ids=lambda folder: folder.name)
def test_another_jax_wrote_it(folder):
    """Checkpoints by jax 0.10.2 and 0.12 of every kind of state, and by older versions of nesjax."""
    state, population = kinds.every() if folder.name.startswith("every") else kinds.first()
    blank = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert_same(restore(folder, blank, population), state)
    assert len(list(kinds.FOLDER.iterdir())) == 4
