"""How many members a gradient takes, against a network's width: noise on outputs, on weights, and with credit.

The cosine between an estimate and backpropagation's gradient follows `sqrt(N / (N + c))`. Noise on weights has
`c = d`, the number of weights. Noise on outputs tries one direction per output, and a weight's share of it is known
from its input. Here is `c = N (1 / cosine^2 - 1)` for an untrained perceptron with two hidden layers and frozen biases,
on one of scikit-learn's digits a trial, the same for all members; or on more of them in a call that returns their mean
loss, as an episode of so many steps returns one figure. Noise on outputs is drawn for each of them, and the one loss
credits it all.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import nesjax

from .digits import MLP, digits
from .families import FAMILIES
from .quality import BLOCK, cosine, count_of, spread
from .tables import figure, pivot

WIDTHS, CLASSES = (16, 64, 256, 1024), 10
ROWS = (8, 64, 224)  # digits a call, at the second width
METHODS = {  # family, std, credit
    "noise on weights": (FAMILIES["LowRank"], 0.001, None),
    "noise on weights, credit by inputs": (FAMILIES["LowRank"], 0.001, "inputs"),
    "noise on outputs": (nesjax.Node(), 0.01, None),
}


def cases(quick: bool) -> list[dict]:
    sizes = {"members": BLOCK, "trials": 2} if quick else {"members": 16 * BLOCK, "trials": 8}
    widths = [
        {"width": width, "method": method, "rows": 1, **sizes}
        for width in WIDTHS[: 1 if quick else None]
        for method in METHODS
    ]
    compared = ("noise on weights", "noise on outputs")
    return widths + [
        {"width": WIDTHS[1], "method": method, "rows": rows, **sizes}
        for rows in ROWS[: 1 if quick else None]
        for method in compared
    ]


def measure(width: int, method: str, rows: int, members: int, trials: int) -> Iterator[dict]:
    family, std, credit = METHODS[method]
    images, labels = (
        jnp.asarray(part[: trials * rows], kind).reshape(trials, rows, *part.shape[1:])
        for part, kind in zip(digits(), ("float32", "int32"))
    )
    model = MLP((width, width, CLASSES))
    params = model.init(jax.random.key(0), images[0, 0])
    rules = {"bias": nesjax.Frozen(), "": family}
    population = nesjax.Population(members, std, noise=rules, chunk_size=BLOCK)
    kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    es_grad = nesjax.value_and_grad(loss, population, credit=credit)

    def trial(key, x, y):
        return cosine(kernels(es_grad(params, key, x, y)[1]), kernels(jax.grad(loss)(params, x, y)))

    with jax.default_matmul_precision("highest"):  # losses differ by little
        run = jax.jit(lambda keys: jax.lax.map(lambda args: trial(*args), (keys, images, labels)))
        found = spread(run(jax.random.split(jax.random.key(1), trials)))
    sizes = {"weights": count_of(kernels(params)), "outputs": 2 * width + CLASSES}
    yield {**found, "c": float(f"{members * (found['cosine'] ** -2 - 1):.4g}"), **sizes}


def table(results: dict) -> str:
    """Markdown: a row a width and number of digits a call, with `c` of each method."""
    width = "width: weights, outputs; digits a call"
    rows = [
        {**row, width: f"{row['width']}: {row['weights']:,}, {row['outputs']:,}; {row['rows']}"}
        for row in results["rows"]
    ]
    return pivot(
        rows,
        width,
        lambda row: f"c, {row['method']}",
        lambda row: f"{figure(row['c'], 2)} (cosine {row['cosine']:.3f})",
    )
