"""Held-out bits per byte of a small transformer against evaluated tokens and seconds: noise on outputs with credit per
token, credit by inputs, noise on weights, evosax, and backpropagation.

A decoder of 4 layers, 128 wide, with 4 heads, reads 64 bytes of Python's `help()` topics and predicts the byte after
each. The methods take turns.

Noise on outputs and on weights run within .1 bit of the best of 40 and 35 pilots on seed 100, which is not measured,
and the same held-out text. Grids: Adam at 0.002 to 0.05, SGD at 0.03 to 0.3, Muon at 0.02 to 0.08; momentum 0.9 and
0.95; decaying rates, and another rate for the layers; std 0.005 to 0.2, the same or less or more of it on the last
layer; groups of 4 to 32 of 32 to 128 members; the layers frozen, with the embedding or without; and for credit per
token discounts 0, 0.5 and 1: at 0 the noise at a token is credited with that token's own loss alone. Noise on outputs
without that credit had two pilots near these settings, and credit by inputs two. evosax has the settings of noise on
weights, SGD the best of three rates, Adam a guess.
"""

import functools
import statistics
import time
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nesjax

from .peers import open_es
from .tables import figure as number
from .tables import markdown

LAYERS, WIDTH, HEADS, LENGTH = 4, 128, 4, 64
HELD_OUT = 64  # sequences


CHECKS = 8  # evaluations in a run


class Method(NamedTuple):
    """How a method trains. `members` share a sequence of their own in groups of `group`."""

    kind: str  # "tokens", "node", "inputs", "plain", "evosax" or "backpropagation"
    optimizer: optax.GradientTransformation
    members: int
    group: int = 1
    std: float = 0.0


METHODS = {
    "Node, credit per token": Method("tokens", optax.contrib.muon(0.04, beta=0.9), 64, 8, 0.05),
    "Node": Method("node", optax.contrib.muon(0.04, beta=0.9), 64, 8, 0.05),
    "credit by inputs": Method("inputs", optax.adam(0.008), 64, 16, 0.005),
    "LowRank": Method("plain", optax.adam(0.008), 64, 16, 0.005),
    "evosax Open_ES": Method("evosax", optax.adam(0.008), 64, 16, 0.005),
    "backpropagation, SGD": Method("backpropagation", optax.sgd(0.1, 0.9), 8),
    "backpropagation, Adam": Method("backpropagation", optax.adam(0.003), 8),
}


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray, int]:
    """Symbols for training and held out, and how many symbols there are."""
    read = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    symbols = np.unique(read, return_inverse=True)[1].astype(np.int32)
    cut = len(symbols) * 9 // 10
    return symbols[:cut], symbols[cut:], int(symbols.max()) + 1


def init(key: jax.Array, symbols: int) -> dict[str, jax.Array]:
    shapes = {"embed": (symbols, WIDTH), "head": (WIDTH, symbols)}
    for layer in range(LAYERS):
        shapes |= {f"qkv{layer}": (WIDTH, 3 * WIDTH), f"o{layer}": (WIDTH, WIDTH)}
        shapes |= {f"up{layer}": (WIDTH, 4 * WIDTH), f"down{layer}": (4 * WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    scale = {"embed": 1.0, "head": 0.0}
    return {
        name: jax.random.normal(key, shape) * scale.get(name, shape[0] ** -0.5)
        for key, (name, shape) in zip(keys, shapes.items())
    }


def token_losses(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Bits of each of the tokens after the first, `[LENGTH]`."""
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    place = jnp.arange(LENGTH)[:, None] / 10 ** jnp.linspace(0, 3, WIDTH // 2)
    x = params["embed"][tokens[:-1]] + jnp.concatenate([jnp.sin(place), jnp.cos(place)], 1)
    for layer in range(LAYERS):
        parts = jnp.split(norm(x) @ params[f"qkv{layer}"], 3, 1)
        q, k, v = (part.reshape(LENGTH, HEADS, -1) for part in parts)
        scores = jnp.where(jnp.tri(LENGTH, dtype=bool), jnp.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5, -1e9)
        read = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(LENGTH, WIDTH)
        x = x + read @ params[f"o{layer}"] / LAYERS
        x = x + jax.nn.gelu(norm(x) @ params[f"up{layer}"]) @ params[f"down{layer}"] / LAYERS
    return optax.softmax_cross_entropy_with_integer_labels(norm(x) @ params["head"], tokens[1:]) / jnp.log(2)


def loss_fn(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    return token_losses(params, tokens).mean()


def setting(method: Method, symbols: int, seed: int) -> tuple[Any, Any, Any]:
    """A state, the step `(state, sequences, key) -> state`, and the state's parameters."""
    key = jax.random.key(seed)
    params = init(key, symbols)
    if method.kind == "evosax":
        made = open_es(loss_fn, params, method.members, shared=False, optimizer=method.optimizer, std=method.std)
        repeated = lambda state, x, key: made.step(state, jnp.repeat(x, method.group // 2, 0), key)
        return made.init(params, key), repeated, made.params
    if method.kind == "backpropagation":

        def step(state, sequences, key):
            params, opt_state = state
            grads = jax.grad(lambda params: jax.vmap(lambda x: loss_fn(params, x))(sequences).mean())(params)
            updates, opt_state = method.optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return (params, method.optimizer.init(params)), step, lambda state: state[0]
    noise = nesjax.Node() if method.kind in ("tokens", "node") else nesjax.LowRank()
    population = nesjax.Population(method.members, method.std, group_size=method.group, noise=noise)
    train = nesjax.make_train_step(
        token_losses if method.kind == "tokens" else loss_fn, method.optimizer, population, in_axes=0,
        credit=method.kind if method.kind in ("tokens", "inputs") else None,
        discount=0 if method.kind == "tokens" else 1,
    )  # fmt: skip
    state = nesjax.TrainState.create(params=params, optimizer=method.optimizer, key=key)
    return state, lambda state, sequences, key: train(state, sequences)[0], lambda state: state.params


def cases(quick: bool) -> list[dict]:
    names = ["Node, credit per token", "backpropagation, Adam"] if quick else list(METHODS)
    limit, seeds = (20_000, 1) if quick else (400_000, 3)
    return [{"methods": names, "seed": seed, "limit": limit} for seed in range(seeds)]


def measure(methods: list[str], seed: int, limit: int) -> Iterator[dict]:
    train, held_out, symbols = text()
    ends = np.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT).astype(int)
    tests = jnp.asarray(np.stack([held_out[end : end + LENGTH + 1] for end in ends]))
    evaluate = jax.jit(lambda params: jax.vmap(lambda x: loss_fn(params, x))(tests).mean())
    data, running = jnp.asarray(train), {}
    for name in methods:
        method = METHODS[name]
        state, step, params = setting(method, symbols, seed)
        running[name] = [state, several(step, method, data), params, 0.0, []]
    for check in range(CHECKS):
        for name, run in running.items():
            method = METHODS[name]
            generations = max(1, limit // CHECKS // (method.members * LENGTH))
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), check), generations)
            if check == 0:
                jax.block_until_ready(run[1](run[0], keys))  # compiles
            start = time.perf_counter()
            run[0] = jax.block_until_ready(run[1](run[0], keys))
            run[3] += time.perf_counter() - start
            tokens = (check + 1) * generations * method.members * LENGTH
            run[4].append([tokens, run[3], float(evaluate(run[2](run[0])))])
    for name, run in running.items():
        yield {"method": name, "curve": run[4]}


def table(results: dict) -> str:
    """Bits held out after parts of the tokens, and seconds: medians over seeds."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in results["rows"]):
        curves = [row["curve"] for row in results["rows"] if row["method"] == name]
        method, at = METHODS[name], (CHECKS // 4 - 1, CHECKS // 2 - 1, CHECKS - 1)
        median = lambda check, part: statistics.median(curve[check][part] for curve in curves)  # noqa: B023
        cells = [f"{median(check, 2):.2f} at {number(median(check, 0) / 1e3)}k" for check in at]
        shared = f"N {method.members}" + (f", groups of {method.group}" if method.group > 1 else "")
        lines.append([name, shared, *cells, number(median(at[-1], 1))])
    return markdown(["method", "sequences", "bits at tokens", "", "", "seconds"], lines)


def several(step, method: Method, data: jax.Array):
    @jax.jit
    def run(state, keys):
        def one(state, key):
            starts = jax.random.randint(key, (method.members // method.group,), 0, len(data) - LENGTH)
            return step(state, data[starts[:, None] + jnp.arange(LENGTH + 1)], key), None

        return jax.lax.scan(one, state, keys)[0]

    return run
