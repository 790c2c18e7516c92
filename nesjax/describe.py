"""A table that says what a population does to each parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .checks import instance_of
from .members import sample_noise
from .population import Population


def describe(params: Any, population: Population) -> str:
    """A table of the parameters: path, shape, family, bytes shared and per member, and the gradient's floor.

    Example:
      >>> import jax.numpy as jnp, nesjax
      >>> print(nesjax.describe({"w": jnp.ones((64, 32))}, nesjax.Population(size=8, std=0.1)))
      path  shape     family     shared bytes  member bytes  floor
      w     [64, 32]  LowRank()             0            12  1.00
    """
    instance_of(Population, "population", population)
    rows = [("path", "shape", "family", "shared bytes", "member bytes", "floor")]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    plain = dataclasses.replace(population, std=1.0)

    def parts(key):
        noise = sample_noise(key, params, plain)
        return noise.shared, noise.direction(0)

    for leaf, shared, own in zip(population.leaves(params), *jax.eval_shape(parts, jax.random.key(0))):
        sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in (shared, own)]
        floor = "-" if leaf.family is None else f"{leaf.family.floor(leaf.noise_shape):.2f}"
        name = "frozen" if leaf.family is None else f"{leaf.family}" + (f" x {leaf.stack}" if leaf.axes else "")
        rows.append((leaf.path, str(list(leaf.shape)), name, *(f"{size:,}" for size in sizes), floor))
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
    lines = ["  ".join(pad(text, width) for pad, text, width in zip(align, row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
