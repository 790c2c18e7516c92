"""How every figure is taken: on which device, in interleaved rounds, each in a results file of its own."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def device() -> dict[str, str]:
    """The device, the versions and the commit that a figure belongs to."""
    accelerator = jax.devices()[0]
    if accelerator.platform == "cpu":
        models = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        kind = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    else:
        kind = accelerator.device_kind
    versions = {name: importlib.metadata.version(name) for name in ("nesjax", "jax", "jaxlib", "flax", "optax")}
    return {
        "device": kind,
        "platform": accelerator.platform,
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The commit of this checkout; where git or its folder is missing, the tree of `nesjax/` that tells which it is."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "nesjax", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"with nesjax/ {tree(ROOT / 'nesjax').hex()[:7]}"


def tree(path: pathlib.Path) -> bytes:
    """What `git rev-parse COMMIT:PATH` gives for a folder of sources."""
    hashed = lambda kind, content: hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()
    entries = []
    for entry in path.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            entries.append((f"{entry.name}/", b"40000 ", tree(entry)))  # sorted as if it ended so
        elif entry.is_file():
            entries.append((entry.name, b"100644 ", hashed("blob", entry.read_bytes())))
    lines = (mode + name.rstrip("/").encode() + b"\0" + sha for name, mode, sha in sorted(entries))
    return hashed("tree", b"".join(lines))


def folder(of: dict[str, str]) -> str:
    """The name of a device's folder in the results."""
    return re.sub(r"[^a-z0-9]+", "-", f"{of['platform']} {of['device']}".lower()).strip("-")


def save(path: pathlib.Path, content: dict) -> None:
    """Writes JSON, a row a line; a reader sees the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    part.replace(path)


def interleave(
    functions: dict[str, Callable], inputs: Sequence[tuple], *,
    rounds: int = 15, seconds: float = 60.0, least: float = 0.02,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds a call of each function, one figure a round.

    The functions take turns, so that a machine that drifts slows all of them alike, and each turn is as many calls as
    fill `least` seconds, on the next of `inputs` each time.

    Args:
      functions: each a function of the arguments in one of `inputs`, compiled or not.
      inputs: tuples of arguments, taken in turn.
      rounds: at most so many, and at least 3.
      seconds: no new round starts after so long.
    """
    calls, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        for arguments in inputs:  # the first call compiles
            jax.block_until_ready(function(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs[0]))
        calls[name] = max(1, round(least / max(time.perf_counter() - start, 1e-6)))
    begin = time.perf_counter()
    for at in range(rounds):
        if at >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            for call in range(calls[name]):
                out = function(*inputs[(at + call) % len(inputs)])
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def summary(times: Sequence[float], base: Sequence[float] | None = None) -> dict[str, Any]:
    """Median and quartiles of seconds, and of the ratio to `base` round by round."""

    def spread(values):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return [float(f"{value:.4g}") for value in (middle, low, high)]

    out = {"seconds": spread(times), "rounds": len(times)}
    return out if base is None else {**out, "multiple": spread([t / b for t, b in zip(times, base)])}


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, int]:
    """The function compiled for the arguments' shapes, and the bytes of temporary memory it needs."""
    program = jax.jit(function).lower(*arguments).compile()
    return program, program.memory_analysis().temp_size_in_bytes


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """The result of a module's function, run in a new process."""
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{before} --xla_gpu_autotune_level=0"  # a GPU's peak would have what its trials take
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ["XLA_FLAGS"] = before


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak bytes that `run()` adds: of the device's memory, or of this process's where that is a CPU's."""
    statistics_of = jax.devices()[0].memory_stats
    if statistics_of() is not None:
        before = statistics_of()["bytes_in_use"]
        jax.block_until_ready(run())
        return statistics_of()["peak_bytes_in_use"] - before
    resident = lambda name: int(re.search(rf"{name}:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    jax.block_until_ready(run())
    return resident("VmHWM") - before


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """For many small programs that run once: XLA's optimisations left out, and products in full float32 precision."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
