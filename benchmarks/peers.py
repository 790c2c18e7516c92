"""What a user would pick instead: evosax's Open_ES, a plain vmap over Gaussian parameters, and backpropagation.

All train a 64-256-256-10 network on scikit-learn's digits with Adam 0.01, std 0.02 (with credit 0.002 and
0.01) and N members; `samples` per member, a batch shared by all members or one for each antithetic pair. One jitted
program per generation for every method.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

from .digits import MLP, digits
from .measure import compiled, in_own_process, interleave, peak_bytes, summary
from .tables import count, markdown
from .tables import figure as number

STD, RATE, HELD_OUT, EVERY = 0.02, 0.01, 360, 5  # accuracy is measured every so many generations
LIMITS = {1: (400, 200), 8: (200, 75), 256: (80, 60)}  # a training run's generations and seconds, by samples
GOALS = (0.9, 0.93, 0.95)
CREDIT_RATE, CREDIT_STD = 0.002, 0.01  # where credit needs fewest generations
CHUNK = 1024


def chunks(members: int) -> tuple[int, int]:
    """Our and their members at a time that all run a large batch: what was fastest in trials.

    On a CPU activations should fit its cache; elsewhere there is memory for all of them.
    """
    return (64, 16) if jax.default_backend() == "cpu" else (members, members)


NET = MLP((256, 256, 10))


def loss_fn(params, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(NET.apply(params, x), labels).mean()


class Method(NamedTuple):
    """`step(state, x, labels, key) -> state`, of samples `[pairs, B, 64]` or, shared, `[B, 64]`."""

    init: Callable[[Any, jax.Array], Any]
    step: Callable
    params: Callable[[Any], Any]


def ours(
    members: int, shared: bool, antithetic: bool, *,
    chunk_size: int | None = None, rate: float = RATE, std: float = STD, **options,
) -> Method:  # fmt: skip
    """nesjax with its default family; with credit, samples are credited one by one."""
    optimizer = optax.adam(rate)
    chunk_size = chunks(members)[0] if shared else chunk_size
    credited = "credit" in options  # makes a pair, which shares its samples, one call
    population = nesjax.Population(
        members, std, antithetic=antithetic, chunk_size=chunk_size, group_size=2 if credited else 1
    )
    in_axes = None if shared else 0

    def step(state, x, labels, key):
        if not shared and not credited:
            x, labels = (jnp.repeat(part, 2, axis=0) for part in (x, labels))
        samples = x.shape[1] if credited else None
        train = nesjax.make_train_step(loss_fn, optimizer, population, in_axes=in_axes, samples=samples, **options)
        return train(state, x, labels)[0]

    create = lambda params, key: nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)
    return Method(create, step, lambda state: state.params)


def open_es(loss_fn: Callable, params: Any, members: int, *, shared: bool, optimizer: Any, std: float) -> Method:
    """evosax's Open_ES: antithetic, centered ranks; its metrics, which nothing reads here, are left out.

    A step's data is shared by all, or of each of `members // 2` pairs.
    """
    from evosax.algorithms import Open_ES

    strategy = Open_ES(
        members, params, optimizer=optimizer, std_schedule=optax.constant_schedule(std), metrics_fn=lambda *_: {}
    )
    settings = strategy.default_params

    def step(state, *data_and_key):
        *data, key = data_and_key
        population, state = strategy.ask(key, state, settings)
        if shared:
            losses = jax.lax.map(lambda member: loss_fn(member, *data), population, batch_size=chunks(members)[1])
        else:  # partners are members j and j + N / 2
            losses = jax.vmap(loss_fn)(population, *(jnp.concatenate([x, x]) for x in data))
        return strategy.tell(key, population, losses, state, settings)[0]

    init = lambda params, key: strategy.init(key, params, settings)
    return Method(init, step, lambda state: strategy.get_mean(state))


def evosax(members: int, shared: bool) -> Method:
    params = NET.init(jax.random.key(0), jnp.zeros((1, 64)))
    return open_es(loss_fn, params, members, shared=shared, optimizer=optax.adam(RATE), std=STD)


def plain_vmap(members: int, shared: bool) -> Method:
    """OpenAI-ES in a few lines of JAX: N full parameter trees, antithetic, centered ranks."""
    optimizer = optax.adam(RATE)

    def step(state, x, labels, key):
        params, opt_state = state
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noise = [jax.random.normal(key, (members // 2, *leaf.shape)) for key, leaf in zip(keys, leaves)]
        noise = structure.unflatten(noise)

        def pair(noise, x, labels):
            member = lambda sign: jax.tree.map(lambda leaf, e: leaf + sign * STD * e, params, noise)
            return jnp.stack([loss_fn(member(1), x, labels), loss_fn(member(-1), x, labels)])

        if shared:
            losses = jax.lax.map(lambda noise: pair(noise, x, labels), noise, batch_size=chunks(members)[1] // 2)
        else:
            losses = jax.vmap(pair)(noise, x, labels)
        weights = nesjax.centered_rank(losses.reshape(-1)).reshape(-1, 2) @ jnp.array([1.0, -1.0])
        grads = jax.tree.map(lambda e: jnp.tensordot(weights, e, 1) / members, noise)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return Method(lambda params, key: (params, optimizer.init(params)), step, lambda state: state[0])


def backpropagation(members: int, shared: bool) -> Method:
    """The gradient of the mean loss over the same samples."""
    optimizer = optax.adam(RATE)

    def step(state, x, labels, key):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, x.reshape(-1, 64), labels.reshape(-1))
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return Method(lambda params, key: (params, optimizer.init(params)), step, lambda state: state[0])


METHODS = {
    "nesjax": lambda *args: ours(*args, True, shaping=nesjax.centered_rank),
    "nesjax, unperturbed baseline": lambda *args: ours(*args, False, baseline="unperturbed"),
    "nesjax, credit": lambda *args: ours(*args, True, rate=CREDIT_RATE, std=CREDIT_STD, credit="inputs"),
    f"nesjax, chunk_size={CHUNK}": lambda *args: ours(*args, True, chunk_size=CHUNK, shaping=nesjax.centered_rank),
    "evosax Open_ES": evosax,
    "vmap over Gaussian parameters": plain_vmap,
    "backpropagation": backpropagation,
}


class Setting(NamedTuple):
    """A method ready to run: its first state, its step compiled, and what draws its samples."""

    state: Any
    step: Callable
    temp_bytes: int
    batch: Callable[[jax.Array], tuple]
    accuracy: Callable[[Any], jax.Array]


def setting(method: str, members: int, samples: int, seed: int = 0) -> Setting:
    images, labels = digits()
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = jnp.asarray(images[order] - 0.3, jnp.float32), jnp.asarray(labels[order])
    shared, key = samples >= 256, jax.random.key(seed)
    made = METHODS[method](members, shared)
    params = NET.init(key, images[:1])

    @jax.jit
    def batch(key):
        rows = jax.random.randint(key, (samples,) if shared else (members // 2, samples), HELD_OUT, len(images))
        return images[rows], labels[rows], key

    @jax.jit
    def accuracy(state):
        return (NET.apply(made.params(state), images[:HELD_OUT]).argmax(-1) == labels[:HELD_OUT]).mean()

    state = made.init(params, key)
    step, temp = compiled(made.step, state, *batch(key))
    return Setting(state, step, temp, batch, accuracy)


def cases(quick: bool) -> list[dict]:
    members, sizes, seeds = (32, (1,), (0,)) if quick else (1024, (1, 8, 256), (0, 1, 2))
    out = [{"figure": "generation", "members": members, "samples": size} for size in sizes]
    training = {"figure": "training", "members": members}
    return out + [
        {**training, "samples": size, "method": method, "seed": seed, "limits": [5, 5] if quick else LIMITS[size]}
        for size in sizes
        for method in methods(size)
        if "vmap" not in method  # the same algorithm as Open_ES, and nearly the same cost
        for seed in seeds
    ]


def methods(samples: int) -> list[str]:
    """What is compared; a batch that all share has one unperturbed loss, and more rows per call than inputs."""
    needs_own = ("unperturbed", "credit")
    return [
        name
        for name in METHODS
        if "chunk" not in name and (samples < 256 or not any(word in name for word in needs_own))
    ]


def measure(figure: str, **case) -> Iterator[dict]:
    yield from {"generation": generation, "training": training}[figure](**case)


def generation(members: int, samples: int) -> Iterator[dict]:
    """Seconds and memory of one generation, all methods in turns."""
    settings = {name: setting(name, members, samples) for name in methods(samples)}
    inputs = [settings["nesjax"].batch(jax.random.key(at)) for at in range(3)]
    functions = {name: lambda *args, made=made: made.step(made.state, *args) for name, made in settings.items()}
    times = interleave(functions, inputs, rounds=9, seconds=60)
    for name in functions:
        yield {
            "method": name,
            **summary(times[name], times["nesjax"]),
            "temp_bytes": settings[name].temp_bytes,
            "peak_bytes": in_own_process(peak, name, members, samples),
        }


def peak(method: str, members: int, samples: int) -> int:
    """Peak bytes that one generation adds to what the process holds before it."""
    made = setting(method, members, samples)
    arguments = jax.block_until_ready(made.batch(jax.random.key(0)))
    return peak_bytes(lambda: made.step(made.state, *arguments))


def training(members: int, samples: int, method: str, seed: int, limits: tuple[int, float]) -> Iterator[dict]:
    """Held-out accuracy against seconds of training; drawing samples and measuring accuracy are off the clock."""
    made = setting(method, members, samples, seed)
    state, seconds, curve = made.state, 0.0, []
    jax.block_until_ready(made.step(state, *made.batch(jax.random.key(0))))
    reached = {str(goal): None for goal in GOALS}
    for at in range(limits[0]):
        arguments = jax.block_until_ready(made.batch(jax.random.fold_in(jax.random.key(seed + 1000), at)))
        start = time.perf_counter()
        state = jax.block_until_ready(made.step(state, *arguments))
        seconds += time.perf_counter() - start
        if (at + 1) % EVERY == 0:
            curve.append([at + 1, round(seconds, 4), round(float(made.accuracy(state)), 4)])
            for goal in GOALS:
                if reached[str(goal)] is None and curve[-1][2] >= goal:
                    reached[str(goal)] = curve[-1][:2]
        if seconds > limits[1]:
            break
    yield {"reached": reached, "curve": curve}


def table(results: dict) -> str:
    """A generation's cost, and seconds and generations to the goals (median over seeds that all reached them)."""
    rows = results["rows"]
    costs = [row for row in rows if row["figure"] == "generation"]
    runs = [row for row in rows if row["figure"] == "training"]
    header = ["samples per member", "method", "ms per generation", "times nesjax", "temporary memory", "peak memory"]
    body = []
    for cost in costs:
        same = [run for run in runs if (run["samples"], run["method"]) == (cost["samples"], cost["method"])]
        line = [f"{cost['samples']}{' (shared)' * (cost['samples'] >= 256)}", cost["method"]]
        line += [number(cost["seconds"][0] * 1e3), number(cost["multiple"][0])]
        line += [count(cost["temp_bytes"]), count(cost["peak_bytes"])]
        body.append(line + [to_goal(same, goal) for goal in GOALS] + [final(same)])
    return markdown([*header, *(f"s to {goal:.0%}" for goal in GOALS), "accuracy at the end"], body)


def to_goal(runs: list[dict], goal: float) -> str:
    """Median seconds to a goal, or how many of the runs reached it."""
    if not runs:
        return "-"
    found = [run["reached"][str(goal)] for run in runs]
    reached = sorted(seconds for _, seconds in filter(None, found))
    if len(reached) < len(found):
        return f"{len(reached)} of {len(found)} runs"
    return number(statistics.median(reached))


def final(runs: list[dict]) -> str:
    """Median accuracy of the last figures, and after how many generations."""
    ends = [run["curve"][-1] for run in runs]
    return f"{statistics.median(end[2] for end in ends):.3f} after {max(end[0] for end in ends)}" if ends else "-"
