"""The examples and the README's code run; the slow tests reach what the examples say they reach."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_llama

import nesjax

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "run"}


def run(name: str, folder: pathlib.Path, *options: str) -> str:
    """What an example prints, run in a folder of its own."""
    command = [sys.executable, str(EXAMPLES[name]), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logged(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tiny_language_model(folder: pathlib.Path) -> tuple[str, ...]:
    """Options that put a tiny random model in the place of one that CI would take minutes for."""
    pytest.importorskip("jinja2", reason="the extra `language-model`")
    config = dataclasses.replace(tiny_llama.TINY, context=256)
    (folder / "model").mkdir()
    tiny_llama.published(config, tiny_llama.random_params(config), folder / "model")
    return "--weights", str(folder / "model"), "--population", "8", "--group", "4", "--dtype", "float32"


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    if name == "playground" and not importlib.util.find_spec("mujoco_playground"):
        pytest.skip("an extra of its own, for its size")
    options = tiny_language_model(tmp_path) if name == "language_model" else ()
    said = run(name, tmp_path, "--steps", "2", "--seed", "1", *options)
    assert re.search(r"\d\.\d", said)
    runs = [path.parent for path in tmp_path.glob("runs/**/log.jsonl")]
    assert runs and all(path.is_relative_to(tmp_path / "runs" / f"{name}-1") for path in runs)
    assert all(f"log, learning curve and checkpoints: {path.relative_to(tmp_path)}\n" in said for path in runs)
    for folder in runs:
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG") and (
            folder / "checkpoints" / "nesjax_2"
        ).is_dir()
        assert [row["step"] for row in logged(folder)] == [1, 2, 2]


@pytest.mark.smoke
def test_a_run_stops_is_resumed_and_never_overwritten(tmp_path):
    """All of it is `examples/run.py`'s, so one example tells."""
    run("cartpole", tmp_path, "--steps", "25", "--out", "whole")
    run("cartpole", tmp_path, "--steps", "12", "--out", "parts")
    with pytest.raises(AssertionError, match="argument --out: parts holds a run: go on with --resume"):
        run("cartpole", tmp_path, "--steps", "25", "--out", "parts")
    run("cartpole", tmp_path, "--steps", "25", "--out", "parts", "--resume")
    whole, parts = (logged(tmp_path / name) for name in ("whole", "parts"))
    for row in (*whole, *parts):
        assert row.pop("seconds") > 0
    assert parts == whole and len(whole) == 26
    run("cartpole", tmp_path, "--minutes", "0.0001", "--out", "short")
    assert len(logged(tmp_path / "short")) <= 2


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, str(EXAMPLES["cartpole"]), "--steps", "100000"]
    log = tmp_path / "runs" / "cartpole-0" / "log.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        while process.poll() is None and (not log.exists() or len(logged(log.parent)) < 12):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, progress = process.communicate(timeout=60)
    at = len(logged(log.parent))
    assert process.returncode == 130 and said.endswith("--steps 100000 --resume\n")
    assert f"interrupted after {at} generations" in said and "checkpoints: runs/cartpole-0" in said
    assert (log.parent / "curve.png").exists() and (log.parent / "checkpoints" / f"nesjax_{at}").is_dir()
    lines = progress.splitlines()
    assert lines[0] == "compiling" and max(map(len, lines)) < 80
    assert re.match(r" +\d+%, generation 10, [\d.]+/s, \d+:\d\d left: mean return \d", lines[1])


def test_a_log_gets_every_generation_with_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    module, heard, population = importlib.import_module("run"), [], nesjax.Population(size=4, std=0.1)
    state = nesjax.TrainState.create(params=jnp.ones(2), optimizer=optax.sgd(0.1), key=jax.random.key(0))
    step = nesjax.make_train_step(lambda params: (params**2).sum(), optax.sgd(0.1), population)
    args = argparse.Namespace(out=tmp_path, steps=3, minutes=1, resume=False)
    kept = {
        "evaluate": lambda state: {"first": state.params[0]},
        "log": lambda at, figures: heard.append((at, figures)),
    }
    module.train(args, state, step, population, every=2, **kept)
    assert [at for at, _ in heard] == [1, 2, 3] and ["first" in figures for _, figures in heard] == [False, True, False]
    assert all(isinstance(value, float | int) for _, figures in heard for value in figures.values())


def test_the_curve_has_one_scale_for_one_unit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    module, drawn = importlib.import_module("run"), []
    monkeypatch.setattr(module.plt, "close", drawn.append)
    rows = [{"step": 1, "return": 20.0}, {"step": 2, "return": 90.0, "mean return": 500.0, "loss": 3.0}]
    for names in (["mean return", "return"], ["mean return", "loss"], ["return"]):  # the last before any evaluation
        module.draw(rows, names, "", tmp_path / "curve.png")
    limits = [[panel.get_ylim() for panel in figure.axes] for figure in drawn]
    assert limits[0][0] == limits[0][1] and limits[1][0] != limits[1][1] and len(limits[2]) == 1


@pytest.mark.parametrize(
    "name, option, value, message",
    [
        ("cartpole", "--steps", "0", "must be at least 1, got 0"),
        ("cartpole", "--minutes", "0", "must be more than 0, got 0.0"),
        ("cartpole", "--seed", "-1", "must be at least 0, got -1"),
        ("cartpole", "--seed", "x", "invalid int value: 'x'"),
        ("cartpole", "--out", __file__, "[Errno 17] File exists"),
        ("cartpole", "--population", "33", "size must be even with antithetic=True, got 33"),
        ("brax_locomotion", "--length", "0", "must be at least 1, got 0"),
        ("brax_locomotion", "--render", "missing/episode.html", "missing is not a folder"),
        ("outside_jax", "--processes", "0", "must be at least 1, got 0"),
        ("digits", "--family", "Cauchy", "invalid choice: 'Cauchy'"),
        ("language_model", "--task", "poetry", "invalid choice: 'poetry'"),
        ("digits", "--population", "100", "group_size must divide size 100, got 16"),
    ],
)
def test_an_example_refuses_a_wrong_value(name, option, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a run's folder beside the checkout would be refused first
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "argv", [name, option, value])
    monkeypatch.syspath_prepend(EXAMPLES[name].parent)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert f"argument {option}: {message}" in " ".join(capsys.readouterr().err.split())  # however it is wrapped


def test_a_reward_that_fails_is_named_with_its_answer(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("language_model")
    chat = [{"role": "user", "content": "Why?"}]
    for wrong, kind, message in (
        (lambda answer: 1 / 0, RuntimeError, r"the reward raised ZeroDivisionError.* for the answer 'so' to 'Why\?'"),
        (lambda answer: float("nan"), ValueError, r"must be finite, got nan for the answer 'so' to 'Why\?'"),
    ):
        with pytest.raises(kind, match=message):
            module.Questions.reward(module.tasks.Question(chat, wrong), "so")


def test_a_missing_package_is_named_with_what_to_install():
    code = "import run; run.need('jax', 'no-such-package')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True)
    assert done.returncode and 'needs no-such-package: pip install -e ".[examples]"' in done.stderr


@pytest.mark.optimised  # it trains
def test_readme_code_runs(tmp_path, monkeypatch):
    """README's code, and then that of the recipes, which goes on from it."""
    monkeypatch.chdir(tmp_path)  # it saves checkpoints
    text, recipes = ((ROOT / folder / "README.md").read_text() for folder in ("", "examples"))
    first, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert first in "".join(text.splitlines(keepends=True)[:35]) and "value_and_grad" in first
    names = {}
    exec(first, names)
    assert names["loss"] < 0.15
    for block in others:
        exec(block, names)
    assert names["metrics"]["loss"] < 0.15
    for block in re.findall(r"```python\n(.*?)```", recipes, re.DOTALL):
        exec(block, names)


def printed(notebook: dict) -> str:
    """What a notebook's code cells printed; each of them ran without an error."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 4
    return "".join("".join(output.get("text", "")) for output in outputs)


def assert_learned(said: str):
    names = "plain network", "held-out accuracy"
    error, accuracy = (float(re.search(rf"{name}: ([\d.]+)", said)[1]) for name in names)
    assert error < 0.1 and accuracy > 0.93 and said.count("500.") >= 9


def test_the_notebook_holds_its_outputs():
    path = ROOT / "examples" / "quickstart.ipynb"
    assert_learned(printed(json.loads(path.read_text())))
    assert path.stat().st_size < 150_000  # a web page shows it


@pytest.mark.smoke
@pytest.mark.optimised  # it trains
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert_learned(printed(notebook))


def accuracies(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (0\.\d+|1\.0+)", output)]


@pytest.mark.slow
def test_cartpole_is_balanced(tmp_path):
    assert "mean return 500.0 of 500" in run("cartpole", tmp_path)


@pytest.mark.slow
def test_memory_balances_what_its_absence_does_not(tmp_path):
    assert "mean return 500.0 of 500" in run("memory", tmp_path)
    assert float(re.search(r"mean return ([\d.]+)", run("memory", tmp_path, "--forget", "--out", "out")).group(1)) < 100


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    reached = sorted(accuracies(run("digits", tmp_path, "--seed", str(seed)))[-1] for seed in range(5))
    assert reached[0] >= 0.95 and reached[2] >= 0.96


@pytest.mark.slow
def test_any_model_reaches_its_accuracy(tmp_path):
    reached = accuracies(run("any_model", tmp_path))
    assert len(reached) == 3 and min(reached) > 0.9


@pytest.mark.slow
def test_outside_jax_reaches_its_return(tmp_path):
    assert float(re.search(r"mean return ([\d.]+)", run("outside_jax", tmp_path)).group(1)) >= 450


@pytest.mark.slow
def test_port_from_nesgpu_reaches_its_accuracy(tmp_path):
    assert accuracies(run("port_from_nesgpu", tmp_path))[-1] > 0.9


@pytest.mark.slow
def test_sign_network_reaches_its_accuracy(tmp_path):
    assert accuracies(run("sign_network", tmp_path))[-1] > 0.93
