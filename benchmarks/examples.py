"""The examples as a user runs them: what they reach, with which seed, in how much time."""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from .measure import ROOT
from .tables import figure, markdown

SEEDS = {
    "byte_lm": range(3),
    "cartpole": range(10),
    "memory": range(10),
    "memory --forget": range(3),
    "phonemes": range(1),
    "minatar": range(3),
    "brax_locomotion --env walker2d": range(3),
    "brax_locomotion --env ant": range(3),
}
POINTS = 60  # of a learning curve


def cases(quick: bool) -> list[dict]:
    return [
        {"example": example, "seed": seed, "quick": quick}
        for example, seeds in SEEDS.items()
        for seed in (range(1) if quick else seeds)
    ]


def measure(example: str, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Runs it in a folder of its own; a row of its last figures, what it said and its learning curve."""
    name, *options = example.split()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options, "--seed", str(seed), "--out", "out"]
        command += ["--steps", "2"] * quick
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{example} failed:\n{done.stderr}")
        rows = [json.loads(line) for line in (pathlib.Path(folder) / "out" / "log.jsonl").read_text().splitlines()]
    last = {key: value for key, value in rows[-1].items() if key not in ("step", "seconds")}
    name = next(iter(last))
    evaluated = [[row["step"], round(row["seconds"], 1), row[name]] for row in rows if name in row]
    yield {
        "generations": rows[-1]["step"], "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        **{"figure": name, "reached": last[name]}, "said": done.stdout.strip().splitlines(),
        "curve": evaluated[:: max(1, len(evaluated) // POINTS)] + evaluated[-1:],
    }  # fmt: skip


def table(results: dict) -> str:
    groups: dict[str, list[dict]] = {}
    for row in results["rows"]:
        groups.setdefault(row["example"], []).append(row)
    body = []
    for example, rows in groups.items():
        reached = ", ".join(figure(row["reached"], 4) for row in rows)
        minutes = ", ".join(figure(max(row[name] for row in rows) / 60, 2) for name in ("seconds", "cpu_seconds"))
        body.append([f"`{example}`", reached, rows[0]["said"][-1], minutes])
    return markdown(["example", "reached, one per seed", "seed 0 in its own words", "minutes at most: wall, CPU"], body)
