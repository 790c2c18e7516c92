"""Training that is saved, resumed and moved to other devices over and over: nothing may grow.

`python -m benchmarks soak` does it for an hour.
"""

import os
import pathlib
import re
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import nesjax

DEVICES = (1, 2, 4)  # in turn
STEPS, EVERY = 1000, 500  # of a visit to one of them; between saves
# The last quarter of the run over the second: no more than that. Not 1, as tensorstore 0.1.86 keeps some 25 kB a save.
GROWTH = 1.05


def train(minutes: float) -> list[dict[str, Any]]:
    """A row a round over `DEVICES`, in a process that has done nothing else."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    population, optimizer = nesjax.Population(256, std=0.05, antithetic=True), optax.adam(0.001)
    x = jax.random.normal(jax.random.key(0), (32, 16))
    y = jnp.sin(x[:, :4])

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    def step_on(number):
        mesh = Mesh(jax.devices()[:number], "devices")
        return nesjax.make_train_step(loss_fn, optimizer, population, mesh=mesh)

    def new_state():
        key = jax.random.key(1)
        params = {"w": 0.1 * jax.random.normal(key, (16, 256)), "v": jnp.zeros((256, 4))}
        return nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)

    steps = {number: step_on(number) for number in DEVICES}
    rows, begin = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while time.perf_counter() - begin < 60 * minutes or len(rows) < 4:  # a quarter each, for `check`
            for number, step in steps.items():
                with nesjax.checkpoint.Run(folder, population, every=EVERY, best="loss") as run:
                    state = run.restore(new_state())
                    assert state.step == STEPS * (len(rows) * len(DEVICES) + DEVICES.index(number)), "lost steps"
                    for _ in range(STEPS):
                        state, metrics = step(state, x, y)
                        run.update(state, metrics)
            rows.append({"seconds": round(time.perf_counter() - begin, 1), "steps": int(state.step),
                         "loss": float(metrics["loss"]), "compilations": len(compiled), **held()})  # fmt: skip
    return rows


def held() -> dict[str, int]:
    """What this process holds of the machine: resident bytes, open files, threads."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = {name: int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
    return {"resident": 1024 * found["VmRSS"], "files": len(os.listdir("/proc/self/fd")), "threads": found["Threads"]}


def check(rows: list[dict[str, Any]]) -> None:
    """Raises AssertionError if anything grew: the last quarter of the rounds against the second one."""
    quarter = max(1, len(rows) // 4)
    for name in ("resident", "files", "threads"):
        early, late = ([row[name] for row in part] for part in (rows[quarter : 2 * quarter], rows[-quarter:]))
        limit = GROWTH * statistics.median(early) + (0 if name == "resident" else 2)
        assert statistics.median(late) <= limit, (name, early, late)
    assert rows[1]["compilations"] == rows[-1]["compilations"], "compiled again"
