"""How far every family's programs are from its materialised members, formed in float32 at the highest precision.

At three precisions: float32 at the highest, float32 at JAX's default (TF32 on NVIDIA GPUs), and bfloat16. `N` members
of a dense layer, one sample per member, as in `layers`.
"""

import contextlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

import nesjax

from .families import FAMILIES, names
from .layers import STD, errors, family_programs
from .tables import pivot

PRECISIONS = {
    "float32, highest": ("float32", "highest"), "float32, default": ("float32", None), "bfloat16": ("bfloat16", None),
}  # fmt: skip


def cases(quick: bool) -> list[dict]:
    width, members = (32, 16) if quick else (512, 256)
    families = names("layers")[: 1 if quick else None]
    chosen = list(PRECISIONS)[:: 2 if quick else 1]
    return [{"width": width, "members": members, "family": f, "at": at} for f in families for at in chosen]


def measure(width: int, members: int, family: str, at: str) -> Iterator[dict]:
    """The errors of the forward pass, of the one that draws its noise, and of the gradient, over the noise's share."""
    dtype, precision = PRECISIONS[at]
    model, keys = nn.Dense(width, dtype=dtype, param_dtype=dtype), jax.random.split(jax.random.key(0))
    params = model.init(keys[0], jnp.zeros((1, width), dtype))
    x = jax.random.normal(keys[1], (members, 1, width), dtype)
    population = nesjax.Population(members, STD, noise=FAMILIES[family])
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        programs = family_programs(model, params, population, x)
    found = errors(programs, model, params, population, x)
    yield {part: float(f"{float(error):.3g}") for part, error in found.items()}


def table(results: dict) -> str:
    """Relative errors of the forward pass / with its noise drawn / of the gradient."""
    value = lambda row: " / ".join(f"{row[part]:.0e}" for part in ("forward", "drawn", "gradient"))
    return pivot(results["rows"], "family", lambda row: row["at"], value)
