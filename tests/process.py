"""One of several processes, as a cluster starts it, for test_devices.py: `process.py PORT RANK COUNT WHAT [FOLDER]`."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

POPULATION = nesjax.Population(16, std=0.1, antithetic=True)


def train(key: jax.Array) -> list[float]:
    """Three steps on all devices of all processes: the losses, and a sum over the parameters they lead to."""
    mesh = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
    optimizer = optax.adam(0.1)
    step = nesjax.make_train_step(
        lambda w, x: jnp.mean((x @ w - 1) ** 2), optimizer, POPULATION, mesh=mesh, in_axes=0
    )  # fmt: skip
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    x = np.random.default_rng(0).normal(size=(16, 3, 6)).astype(np.float32)
    mine = np.split(x, jax.process_count())[jax.process_index()]  # each process has its own members' samples only
    state = nesjax.TrainState.create(params=jnp.zeros((6, 4)), optimizer=optimizer, key=key)
    losses = []
    for _ in range(3):
        state, metrics = step(state, jax.make_array_from_process_local_data(rows, mine))
        losses.append(float(metrics["loss"]))
    return [*losses, float(jnp.sum(state.params**2))]


def train_on(folder: str) -> None:
    """Goes on from the checkpoints in `folder` until it is told to end."""
    mesh = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
    optimizer = optax.adam(0.1)
    step = nesjax.make_train_step(lambda w: jnp.mean((w - 1) ** 2), optimizer, POPULATION, mesh=mesh)
    state = nesjax.TrainState.create(params=jnp.zeros((6, 4)), optimizer=optimizer, key=jax.random.key(0))
    with nesjax.checkpoint.Run(folder, POPULATION, every=10**6) as run:
        state = run.restore(state)
        while True:
            state, metrics = step(state)
            print(f"at {int(state.step)}", flush=True)
            run.update(state, metrics)
            time.sleep(0.02)  # or, until both are told, it says more than the pipe holds


if __name__ == "__main__":
    port, rank, count, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", count, rank, heartbeat_timeout_seconds=5)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (count, 2 * count, 2)
    if what == "checkpoints":
        train_on(sys.argv[5])
    try:
        print("result", train(jax.random.key(rank if what == "other keys" else 0)), flush=True)
    except ValueError as error:
        print("refused", error, flush=True)
    if what == "stay":  # in the middle of a run, outside of any collective
        time.sleep(300)
