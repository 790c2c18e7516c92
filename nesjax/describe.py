"""A table that says what a population does to each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .checks import instance_of, one_of
from .credit import credited_rows, describe_rows
from .forward import perturbed_and_reaped
from .members import member, sample_noise
from .population import Population


def describe(
    params: Any, population: Population, loss_fn: Callable | None = None, *args: Any,
    credit: Literal["inputs", "tokens"] | None = None,
) -> str:  # fmt: skip
    """Tabulates the parameters: path, shape, family, bytes shared and per member, and the largest cosine.

    Args:
      params: the parameters, or their shapes.
      population: the population.
      loss_fn, *args: with `credit`, the loss function and the arguments of one call of it (or their shapes).
      credit: "inputs": a last column says how many rows of how many inputs each parameter multiplies in that call, or
        why it gets the plain estimate. Either: of parameters with noise on outputs, how many outputs a call has and
        how many bytes are kept for their gradient.

    Returns:
      The table as text, one line per parameter.

    Raises:
      ValueError: an unknown `credit`, or one without a loss function.

    Example:
      >>> import jax.numpy as jnp, nesjax
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
      >>> loss_fn = lambda params, x: jnp.sum(x @ params["w"] + params["b"])
      >>> population = nesjax.Population(size=8, std=0.1)
      >>> print(nesjax.describe(params, population, loss_fn, jnp.ones((2, 64)), credit="inputs"))
      path  shape     family     shared bytes  member bytes  max_cosine  credit
      b     [32]      LowRank()             0             4  1.00        plain: a vector
      w     [64, 32]  LowRank()             0            12  1.00        2 rows of 64 inputs
    """
    instance_of(Population, "population", population)
    one_of("credit", credit, (None, "inputs", "tokens"))
    if credit is not None and loss_fn is None:
        raise ValueError(
            "credit needs the loss function and its arguments: describe(params, population, loss_fn, *args)."
        )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    plain = dataclasses.replace(population, std=1.0)
    credits: dict[str, str] = {}

    def parts(key, params, args):
        noise = sample_noise(key, params, plain)
        if credit is not None and loss_fn is not None:
            _, reaped = perturbed_and_reaped(loss_fn, inputs=credit == "inputs")(params, member(noise, 0), *args)
            rows, reasons = credited_rows(reaped, noise.leaves)
            credits.update({path: describe_rows(found) for path, found in {**rows, **reasons}.items()})
        return noise.shared, noise.direction(0)

    rows: list[tuple[str, ...]] = [
        ("path", "shape", "family", "shared bytes", "member bytes", "max_cosine", *(("credit",) if credit else ()))
    ]
    for leaf, shared, own in zip(population.leaves(params), *jax.eval_shape(parts, jax.random.key(0), params, args)):
        sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in (shared, own)]
        limit = "-" if leaf.family is None else f"{leaf.family.max_cosine(leaf.noise_shape):.2f}"
        name = "frozen" if leaf.family is None else f"{leaf.family}" + (f" x {leaf.stack}" if leaf.axes else "")
        last = (credits.get(leaf.path, "-"),) if credit else ()
        rows.append((leaf.path, str(list(leaf.shape)), name, *(f"{size:,}" for size in sizes), limit, *last))
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.ljust)
    lines = ["  ".join(pad(text, width) for pad, text, width in zip(align, row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
