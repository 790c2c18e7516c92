"""Every table of a GPU in one command, the most valuable first: `python -m benchmarks gpu --minutes M`.

Each part is a process of its own with a limit of its own. What is done when it ends, or when time runs out, is kept,
and the next call goes on there.
"""

import pathlib
import subprocess
import sys
import time

from . import measure

# In order of value, with the minutes that each may take.
PARTS = {
    "ceilings": 1, "precision": 4, "step": 4, "sizes": 6, "peers": 6,
    "memory": 3, "layers": 8, "scale": 3, "quality": 6, "profile": 2,
}  # fmt: skip
LEAST, GRACE = 10.0, 30.0  # seconds: a part isn't begun with less; what an interrupted one may take to end


def run(minutes: float | None, results: pathlib.Path, *, quick: bool) -> list[str]:
    """Runs the parts, and gives the names of those that failed; one that was out of time has not."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    failed = []
    for name, limit in PARTS.items():
        seconds = min(60.0 * limit, end - time.monotonic())
        if seconds < LEAST:
            print(f"{name}: no time left")
            continue
        command = [sys.executable, "-m", "benchmarks", name, "--minutes", str(seconds / 60), "--results", str(results)]
        try:
            done = subprocess.run(command + ["--quick"] * quick, cwd=measure.ROOT, timeout=seconds + GRACE)
            failed += [name] * (done.returncode != 0)
        except subprocess.TimeoutExpired:
            print(f"{name}: killed while a case ran; the cases before it are kept")
    return failed
