"""Where a training step's time goes on the device: its kernels, by the profiler. The step is that of `step`."""

import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator

import jax

from .step import cases as steps
from .step import program
from .tables import figure, markdown

STEPS, MOST = 5, 12  # steps profiled; kernels listed


def cases(quick: bool) -> list[dict]:
    return [case for case in steps(quick) if case["family"] == "LowRank" and not case["pairs"]][: 1 if quick else None]


def measure(**case) -> Iterator[dict]:
    """A row for each of the longest kernels: microseconds in one step, all its runs together, and its share."""
    made = program(**case)
    jax.block_until_ready(made.step(made.state, *made.inputs[0]))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for at in range(STEPS):
                jax.block_until_ready(made.step(made.state, *made.inputs[at % len(made.inputs)]))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        spent = kernels(jax.profiler.ProfileData.from_file(str(path)))
    total = sum(spent.values())
    for name, ns in spent.most_common(MOST):
        yield {"kernel": name, "us": float(f"{ns / STEPS / 1e3:.4g}"), "share": float(f"{ns / total:.3g}")}


def kernels(data: jax.profiler.ProfileData) -> Counter:
    """Nanoseconds of each operation of the compiled program: on a GPU's streams, else on the host's threads."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    spent: Counter = Counter()
    for line in lines or [line for plane in data.planes for line in plane.lines]:
        for event in line.events:
            if operation := dict(event.stats).get("hlo_op"):
                spent[str(operation)] += event.duration_ns
    return spent


def table(results: dict) -> str:
    """The longest kernels of a step, for each number of samples per member."""
    body = [[str(row["samples"]), row["kernel"], figure(row["us"]), f"{row['share']:.1%}"] for row in results["rows"]]
    return markdown(["samples per member", "kernel", "us per step", "share"], body)
