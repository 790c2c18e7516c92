"""What a gradient is worth: its cosine to the true one against the number of members, and what it costs.

Linear losses isolate a family's noise; small networks trained by backpropagation, whose gradient is then the truth,
show what it is worth in use. Losses are centered by their mean. Unless `max_cosine` limits it the cosine follows
`sqrt(N / (N + d))`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import nesjax
from nesjax.gradient import sum_drawn

from .digits import MLP, digits
from .families import FAMILIES, names
from .measure import interleave, summary
from .tables import markdown

TOGETHER = " and "  # between families that are timed in turns
BLOCK = 256  # members at a time: the smallest N, and what bounds memory
STD, TIMED = 0.001, 1024
LINEAR = {"linear": (64, 64), "non-negative inputs": (64, 64), "convolution": (3, 3, 16, 16)}
NETS = ("MLP", "CNN")
BATCH = 32


class Problem(NamedTuple):
    """`loss(params, *args)`, and of one trial's key: args and the true gradient."""

    params: nn.FrozenDict | jax.Array
    loss: Callable
    trial: Callable


def cases(quick: bool) -> list[dict]:
    def case(problem, family, members, trials):
        return {"problem": problem, "family": family, "members": members, "trials": trials}

    if quick:
        few = [case("linear", "LowRank", 1024, 2), case("MLP", "LowRank", 512, 2)]
        return [*few, case("MLP", "LowRank and Permuted in 10 %", BLOCK, 2)]
    some = names("networks")
    chosen = {problem: names("quality") if problem == "linear" else some for problem in LINEAR}
    out = [case(problem, name, 2**15, 6) for problem in LINEAR for name in chosen[problem]]
    out += [case(problem, name, 2**12, 3) for problem in NETS for name in some]
    return out + [case(problem, TOGETHER.join(some), TIMED, 3) for problem in NETS]


def measure(problem: str, family: str, members: int, trials: int) -> Iterator[dict]:
    """A row for each power of two of members up to `members`; of several families, one each, timed."""
    keys = jax.random.split(jax.random.key(0), trials)
    with jax.default_matmul_precision("highest"):  # losses differ by little
        of = linear(problem) if problem in LINEAR else net(problem)
        if TOGETHER in family:
            yield from timed(of, family.split(TOGETHER), members, keys)
            return
        try:
            cosines = jax.jit(lambda keys: jax.lax.map(lambda key: trial(of, FAMILIES[family], members, key), keys))
            found, ours, library = cosines(keys)
        except ValueError as error:
            yield {"skipped": str(error)}
            return
        if not jnp.allclose(ours, library, rtol=1e-3, atol=1e-5):
            raise ValueError(f"{family} on {problem}: sums in blocks differ from estimate_gradient: {ours}, {library}.")
        size, limit = count_of(of.params), overall_max_cosine(of, FAMILIES[family], keys[0])
        for count in (2**power for power in range(BLOCK.bit_length() - 1, members.bit_length())):
            values = found[:, count // BLOCK - 1]
            yield {
                "members": count,
                **spread(values),
                "bound": rounded(math.sqrt(count / (count + size))),
                "max_cosine": rounded(limit),
                "parameters": size,
            }


def trial(of: Problem, family, members: int, key: jax.Array):
    """Cosines of the estimates from the first 256, 512, 768 ... members, and two of the first that must agree.

    A member is drawn from (key, i) alone, so all sizes come from one program, and from one pass over the members:
    `sum_i (L_i - mean) E_i` is the sum of `L_i E_i` less the mean times the sum of `E_i`.
    """
    key, own = jax.random.split(key)
    args, truth = of.trial(own)
    noise = nesjax.sample_noise(key, of.params, nesjax.Population(BLOCK, STD, noise=family))
    run = nesjax.perturbed(of.loss)
    without = of.loss(of.params, *args)  # taken off at once: the rest keeps its precision

    def of_member(i):
        member = nesjax.member(noise, i)
        return run(of.params, member, *args) - without, member.own

    def block(carry, start):
        sums, total = carry
        losses, drawn = jax.vmap(of_member)(start + jnp.arange(BLOCK))
        weights = jnp.stack([losses, jnp.ones_like(losses)])
        sums = jax.tree.map(jnp.add, sums, jax.vmap(lambda w: sum_drawn(noise, drawn, w, noise.std))(weights))
        total = total + losses.sum()
        gradient = [weighted - total / (start + BLOCK) * plain for weighted, plain in sums]
        return (sums, total), (cosine(gradient, truth), losses)

    start = [jnp.zeros((2, *leaf.shape)) for leaf in jax.tree.leaves(of.params)], 0.0
    _, (found, losses) = jax.lax.scan(block, start, jnp.arange(0, members, BLOCK))
    return found, found[0], cosine(nesjax.estimate_gradient(noise, losses[0]), truth)


def timed(of: Problem, families: list[str], members: int, keys: jax.Array) -> Iterator[dict]:
    """One whole estimate (noise, losses, gradient) of each family, in turns, and the cosine of those timed."""
    args, truth = of.trial(keys[0])  # the same for all of a network's
    keys = [jax.random.split(key)[0] for key in keys]  # as `trial` does
    functions = {}
    for family in families:
        population = nesjax.Population(members, STD, noise=FAMILIES[family], chunk_size=chunk_size(family))
        estimate = jax.jit(nesjax.value_and_grad(of.loss, population))
        try:
            jax.eval_shape(estimate, of.params, keys[0], *args)
        except ValueError as error:
            yield {"family": family, "skipped": str(error)}
            continue
        functions[family] = lambda key, estimate=estimate: estimate(of.params, key, *args)[1]
    times = interleave(functions, [(key,) for key in keys], rounds=7, seconds=25)
    for family, function in functions.items():
        values = jnp.stack([cosine(function(key), truth) for key in keys])
        yield {"family": family, **spread(values), **summary(times[family])}


def chunk_size(family: str) -> int | None:
    """Members at a time: independent noise is as large as the parameters, and has to be read again and again."""
    return BLOCK if family == "Gaussian" else None


def linear(problem: str) -> Problem:
    """`<G, W>` at zero: G normal, or what a dense layer has whose inputs are >= 0, as after a ReLU."""
    shape = LINEAR[problem]

    def trial(key):
        x, g = jax.random.normal(key, (2, *shape))
        if problem == "non-negative inputs":
            g = nn.relu(x).T @ g
        return (g,), g

    return Problem(jnp.zeros(shape), lambda w, g: jnp.tensordot(g, w, g.ndim), trial)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(*x.shape[:-1], 8, 8, 1)
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(*x.shape[:-3], -1))


@functools.cache
def net(name: str) -> Problem:
    """The network, trained by backpropagation and Adam to 95 % on the digits, and some of them as its fixed batch."""
    images, labels = digits()
    images, labels = jnp.asarray(images - 0.3, jnp.float32), jnp.asarray(labels)
    model = {"MLP": MLP((256, 256, 10)), "CNN": CNN()}[name]
    params, optimizer = model.init(jax.random.key(0), images[:1]), optax.adam(3e-3)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def step(carry):
        params, state, _ = carry
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        params = optax.apply_updates(params, updates)
        return params, state, (model.apply(params, images).argmax(-1) == labels).mean()

    start = params, optimizer.init(params), jnp.zeros(())
    params = jax.jit(lambda start: jax.lax.while_loop(lambda carry: carry[2] < 0.95, step, start))(start)[0]
    batch = images[:BATCH], labels[:BATCH]
    truth = jax.jit(jax.grad(loss))(params, *batch)
    return Problem(params, loss, lambda key: (batch, truth))


def cosine(a, b) -> jax.Array:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    dot = lambda pairs: sum(jnp.vdot(x, y) for x, y in pairs)
    return dot(pairs) / jnp.sqrt(dot([(x, x) for x, _ in pairs]) * dot([(y, y) for _, y in pairs]))


def count_of(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def overall_max_cosine(of: Problem, family, key) -> float:
    """The `max_cosine` `c_p` of all parameters as one: `(sum_p |g_p|^2 / |g|^2 / c_p^2)^(-1/2)`, as lengths add."""
    truth = jax.tree.leaves(of.trial(key)[1])
    noises = [leaf.family for leaf in nesjax.Population(BLOCK, STD, noise=family).leaves(of.params)]
    squares = [float(jnp.vdot(g, g)) for g in truth]
    limits = [noise.max_cosine(g.shape) for noise, g in zip(noises, truth)]
    return (sum(square / limit**2 for square, limit in zip(squares, limits)) / sum(squares)) ** -0.5


def spread(values) -> dict[str, float]:
    """The mean over trials and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return {"cosine": rounded(float(values.mean())), "error": rounded(error)}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def table(results: dict) -> str:
    """Markdown: a row a family, a column a problem with the cosine at its most members, its error and its limit."""
    rows = [row for row in results["rows"] if "bound" in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    most = {name: max(row["members"] for row in rows if row["problem"] == name) for name in problems}
    found = {(row["problem"], row["family"]): row for row in rows if row["members"] == most[row["problem"]]}
    worth = {(row["problem"], row["family"]): row for row in results["rows"] if "seconds" in row}
    timed = list(dict.fromkeys(problem for problem, _ in worth))

    def cell(row):
        limit = f", at most {row['max_cosine']:.2f}" if row["max_cosine"] < 0.995 else ""
        return f"{row['cosine']:.3f} ± {row['error']:.3f}{limit}"

    heads = [f"{name}, N = {most[name]:,}" for name in problems] + [f"{name}: cos² per second" for name in timed]
    lines = []
    bounds = {row["problem"]: f"{row['bound']:.3f}" for row in found.values()}
    lines.append(["`sqrt(N / (N + d))`", *(bounds[name] for name in problems), *("" for _ in timed)])
    for family in dict.fromkeys(family for _, family in found):
        values = [cell(found[name, family]) if (name, family) in found else "" for name in problems]
        rates = [worth.get((name, family)) for name in timed]
        rates = [f"{row['cosine'] ** 2 / row['seconds'][0]:.2g}" if row else "" for row in rates]
        lines.append([family, *values, *rates])
    return markdown(["family", *heads], lines)
