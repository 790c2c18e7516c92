"""The examples and the README's code run; the slow tests reach what the examples say they reach."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def run(name: str, folder: pathlib.Path, *options: str) -> str:
    """What an example prints, run in a folder of its own."""
    command = [sys.executable, str(EXAMPLES[name]), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    assert re.search(r"\d\.\d", run(name, tmp_path, "--steps", "2"))
    for picture in tmp_path.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_refuses_a_wrong_value(name, tmp_path):
    with pytest.raises(AssertionError, match=r"argument --steps: must be at least 1, got 0"):
        run(name, tmp_path, "--steps", "0")


@pytest.mark.parametrize("option, value", [("--family", "Cauchy"), ("--population", "100"), ("--seed", "x")])
def test_digits_refuses_a_wrong_value(option, value, tmp_path):
    with pytest.raises(AssertionError, match=f"(?s)argument {option}: .*{value}"):
        run("digits", tmp_path, option, value)


def test_readme_code_runs():
    text = (ROOT / "README.md").read_text()
    assert text.index("```python") < text.index("\n## ") and "value_and_grad" in text.split("```")[1]
    assert len(text.split("```")[1].splitlines()) <= 35
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["loss"] < 0.15


def accuracies(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (0\.\d+|1\.0+)", output)]


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
