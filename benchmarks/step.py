"""A whole training step of a population against plain inference on the same samples.

N = 4096 members of a network of three 1024-wide layers, `samples` per member, plain SGD: the step draws the noise, runs
all members, weighs their losses against their mean, sums the gradient and updates the parameters. On a CPU members run
in chunks whose activations fit its cache; inference is timed in one pass and in such chunks, and the faster counts.
With noise on outputs chunks run twice, as the mean needs all losses: at one sample, its members run in one pass. In
pairs, antithetic partners share their samples: a pair is one direction to draw and to sum, and compares its own losses.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import nesjax

from .digits import MLP
from .families import FAMILIES, names
from .measure import compiled, interleave, summary
from .tables import figure, pivot

ROWS = 2048  # samples of a chunk, of at most 1024 members: what was fastest in trials


def cases(quick: bool) -> list[dict]:
    members, width, samples = (64, 32, (1, 4)) if quick else (4096, 1024, (1, 8, 64))
    families = [(name, False) for name in names("step")[: 1 if quick else None]] + [("LowRank", True), ("Node", True)]
    on_cpu = jax.default_backend() == "cpu"
    return [
        {
            "members": members,
            "width": width,
            "samples": count,
            "chunk_size": min(1024, ROWS // count) if on_cpu else None,
            "family": family,
            "pairs": pairs,
        }
        for count in samples
        for family, pairs in families  # the default first
    ]


class Training(NamedTuple):
    """`infer(params, x)`, plain; `step(state, x, labels)`; and what makes a state, and inputs, of a key."""

    infer: Callable
    step: Callable
    create: Callable
    draw: Callable


def training(
    members: int, width: int, samples: int, family: str, chunk_size: int | None, pairs: bool, dtype: str = "float32"
) -> Training:
    net, optimizer, noise = MLP((width,) * 3), optax.sgd(0.1), FAMILIES[family]
    whole = noise.on_outputs and samples == 1 and not pairs
    shared = {"antithetic": True, "group_size": 2} if pairs else {}
    population = nesjax.Population(members, std=0.02, noise=noise, chunk_size=None if whole else chunk_size, **shared)
    slices = members // population.group_size

    def loss_fn(params, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), labels).mean()

    def create(key):
        params = jax.tree.map(lambda p: p.astype(dtype), net.init(key, jnp.zeros((1, width))))
        return nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)

    def draw(key):
        return (
            jax.random.normal(key, (slices, samples, width), dtype),
            jax.random.randint(key, (slices, samples), 0, width),
        )

    return Training(net.apply, nesjax.make_train_step(loss_fn, optimizer, population, in_axes=0), create, draw)


class Program(NamedTuple):
    """`step(state, *inputs[at])`, compiled; and `infer(params, x)`, plain."""

    infer: Callable
    step: Callable
    state: nesjax.TrainState
    inputs: list[tuple]
    temp_bytes: int


def program(**case) -> Program:
    made, key = training(**case), jax.random.key(0)
    state, inputs = made.create(key), [jax.jit(made.draw)(jax.random.fold_in(key, at)) for at in range(2)]
    train, temp = compiled(made.step, state, *inputs[0])
    return Program(made.infer, train, state, inputs, temp)


def measure(members: int, width: int, samples: int, chunk_size: int | None, pairs: bool, **case) -> Iterator[dict]:
    """One row: seconds of inference, and the step's multiple of it."""
    made = program(members=members, width=width, samples=samples, chunk_size=chunk_size, pairs=pairs, **case)
    params = made.state.params
    inputs = [(jnp.repeat(x, 2, 0) if pairs else x, x, labels) for x, labels in made.inputs]
    rows = min(chunk_size or members, members) * samples

    def chunks(x, params):
        return jax.lax.map(lambda x: made.infer(params, x), x.reshape(-1, rows, width))

    whole, _ = compiled(lambda x, params: made.infer(params, x.reshape(-1, width)), inputs[0][0], params)
    chunked, _ = compiled(chunks, inputs[0][0], params)
    functions = {
        "in one pass": lambda rows, *_: whole(rows, params),
        "in chunks": lambda rows, *_: chunked(rows, params),
        "step": lambda _, x, labels: made.step(made.state, x, labels),
    }
    times = interleave(functions, inputs, rounds=9, seconds=90)
    fastest = min(("in one pass", "in chunks"), key=lambda name: statistics.median(times[name]))
    yield {
        "inference": summary(times[fastest]),
        "fastest_inference": fastest,
        "step": summary(times["step"], times[fastest]),
        "temp_bytes": made.temp_bytes,
    }


def table(results: dict) -> str:
    """The step's multiples of inference, by family and samples per member."""
    return by_family(results["rows"], lambda row: row["step"]["multiple"][0])


def by_family(rows: list[dict], value: Callable[[dict], float]) -> str:
    """Steps' values, by family (in pairs or not) and samples per member."""
    column = lambda row: f"{row['samples']} sample{'s' * (row['samples'] > 1)} per member"
    rows = [{**row, "family": row["family"] + ", in pairs" * row["pairs"]} for row in rows]
    return pivot(rows, "family", column, lambda row: figure(value(row)))
