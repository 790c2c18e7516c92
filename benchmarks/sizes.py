"""A dense layer at today's sizes: wider ones, more members, bfloat16. As `layers`, with a few families."""

import itertools

import jax

from .families import names
from .layers import dense, measure, table

__all__ = ["cases", "measure", "table"]


def cases(quick: bool) -> list[dict]:
    if quick:
        shapes = [dense(32, 64, "bfloat16")]
    elif jax.default_backend() == "cpu":
        shapes = [dense(4096), dense(1024, 8192), dense(1024, 1024, "bfloat16"), dense(8192), dense(1024, 65536)]
    else:
        sizes = itertools.product((4096, 8192, 1024, 256), (1024, 8192, 65536))
        shapes = [*(dense(*size, "bfloat16") for size in sizes), dense(1024, 8192), dense(4096, 8192)]
    families = names("sizes")[: 1 if quick else None]  # the default at every size first
    return [{**shape, "family": family} for family in families for shape in shapes]
