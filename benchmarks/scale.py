"""Huge populations: time and memory of a generation on this machine, and what would saturate first on many GPUs.

Letters: `N` members, `P` parameters, `G` GPUs, `B` samples per member.
"""

import itertools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import nesjax

from .tables import count, figure, markdown, pivot

WIDTHS = (64, 64, 64, 10)
SAMPLES = 1797  # as many as scikit-learn's digits have


def network(params: list, x: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def generation(size: int, chunk_size: int):
    """The jitted step of a 64-64-64-10 network whose members see one random sample each, and its arguments."""
    key, optimizer = jax.random.key(0), optax.adam(0.01)
    shapes = list(itertools.pairwise(WIDTHS))
    params = [(jax.random.normal(key, shape) * shape[0] ** -0.5, jnp.zeros(shape[1])) for shape in shapes]
    data, teacher = jax.random.normal(key, (SAMPLES, WIDTHS[0])), jax.random.normal(key, (WIDTHS[0], WIDTHS[-1]))

    def loss_fn(params, sample, data, labels):
        return optax.losses.softmax_cross_entropy_with_integer_labels(network(params, data[sample]), labels[sample])

    population = nesjax.Population(size, std=0.02, chunk_size=chunk_size)
    step = nesjax.make_train_step(
        loss_fn, optimizer, population, shaping=nesjax.centered_rank, in_axes=(0, None, None)
    )  # fmt: skip
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)
    return step, (state, jnp.arange(size) % SAMPLES, data, (data @ teacher).argmax(-1))


def cases(quick: bool) -> list[dict]:
    sizes, chunks = ((2**10, 2**12), (2**8, 2**10)) if quick else ((2**12, 2**16, 2**20), (2**10, 2**12, 2**14))
    if jax.default_backend() != "cpu" and not quick:  # there is no cache to fit, and much memory
        chunks = (2**12, 2**14, 2**17, 2**20)
    return [{"members": size, "chunk_size": chunk} for size in sizes for chunk in chunks if chunk <= size]


def measure(members: int, chunk_size: int, generations: int = 3) -> Iterator[dict]:
    """Seconds per generation (the fastest; compiling apart), the losses, and XLA's figures for memory."""
    step, (state, *args) = generation(members, chunk_size)
    start = time.perf_counter()
    compiled = step.lower(state, *args).compile()
    compile_seconds, seconds, losses = time.perf_counter() - start, [], []
    for _ in range(generations):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, *args))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    memory = compiled.memory_analysis()
    yield {
        "seconds_per_generation": min(seconds), "compile_seconds": compile_seconds, "losses": losses,
        "temp_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes,
    }  # fmt: skip


def table(results: dict) -> str:
    """Seconds per generation and temporary memory, by members and chunk."""
    value = lambda row: f"{figure(row['seconds_per_generation'])} s, {count(row['temp_bytes'])}"
    rows = [{**row, "chunk_size": f"{row['chunk_size']:,}"} for row in results["rows"]]
    return pivot(rows, "chunk_size", lambda row: f"N = {row['members']:,}", value)


# ---- many GPUs, by arithmetic

BANDWIDTH = 3.352e12  # bytes/s, of an H100 SXM's memory
MEMORY = 84.9e9  # bytes
FLOPS = 132 * 128 * 2 * 1.98e9  # cores x float32 units x multiply-add x clock: 67 TFLOP/s, without tensor cores
NVLINK = 450e9  # bytes/s a direction, between the 8 GPUs of a node: an assumption
NETWORK = 50e9  # bytes/s a direction and GPU, between nodes (InfiniBand NDR): an assumption
LATENCY = 2e-5  # seconds a collective: an assumption


def bytes_per_device(
    params: float, members: float, devices: int, chunk: float, *, activations: float, inputs: float = 0, slots: int = 2
) -> float:
    """What a generation holds on one device.

    Args:
      params: P. Params, the optimizer's `slots` (2 for Adam), the gradient and the updates: 4 bytes a number each.
      members: N. Losses, weights and what sorting them takes: 64 bytes a member, on every device.
      devices: G. Each holds the mapped arguments of N / G members, `inputs` bytes each.
      chunk: members at a time, each with `activations` bytes (its noise among them).
    """
    return 4 * (3 + slots) * params + 64 * members + inputs * members / devices + activations * chunk


def costs(params: float, devices: int, members: float, chunk: float = 2**12) -> dict:
    """Seconds per generation of each resource of one GPU, and the share of its memory: modelled, not measured.

    A network of 4096-wide (or narrower) dense float32 layers, one sample per member, rank-one signs: one GEMM per layer
    for the forward pass and one for the gradient, and a ring for the psum.
    """
    width = min(4096, params**0.5)
    own, layers = members / devices, params / width**2
    link = NVLINK if devices <= 8 else NETWORK
    crossing = (devices - 1) / devices * (2 * 4 * params + 4 * members)  # a ring sends a psum's bytes twice
    held = bytes_per_device(params, members, devices, min(chunk, own), activations=8 * width + layers * width / 4)
    return {
        "arithmetic": 2 * 2 * params * own / FLOPS,
        "memory traffic": (2 * 4 * params * max(1, own / chunk) + 4 * 4 * width * layers * own) / BANDWIDTH,
        "links": crossing / link + 2 * LATENCY if devices > 1 else 0.0,
        "memory": held / MEMORY,
    }


def saturation(members: float = 2**16) -> str:
    """The README's computed table."""
    rows = []
    for params in (1e5, 1e7, 1e9, 8e9):
        for devices in (1, 8, 64, 512):
            cost = costs(params, devices, members)
            held = cost.pop("memory")
            first = "memory" if held > 1 else max(cost, key=cost.get)
            times = [figure(1e3 * seconds) for seconds in cost.values()]
            rows.append([f"{params:.0e}", str(devices), *times, f"{100 * held:.1f} %", first])
    heads = [
        "parameters",
        "GPUs",
        "arithmetic, ms",
        "memory traffic, ms",
        "links, ms",
        "memory held",
        "saturates first",
    ]
    return markdown(heads, rows)
