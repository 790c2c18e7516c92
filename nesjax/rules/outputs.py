"""Noise on the outputs of products (`nesjax.Node`): drawn anew at each place in the program and each step of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax

from ..noise.base import accumulator
from ..perturbed import Parameter, Perturbed, add_noise
from ..primal import place_p, step_p
from ..taps import Output, tap_output
from .lazy import Expression, bind, on_one


@on_one(place_p)
def _(primitive, w, *, number):
    return _folded(w, lambda part: bind(primitive, part, number=number), number)


@quax.register(step_p)
def _(w: Parameter, i: jax.Array):
    return _folded(w, lambda part: bind(step_p, part, i), i)


def _folded(w: Any, again: Callable, number) -> Parameter:
    if isinstance(w, Expression):
        return w.map(again)
    return w.replace(w.weight, member=w.family.fold(w.member, number)) if w.family.on_outputs else w


def with_noise(
    w: Perturbed, apply: Callable, x: jax.Array, dtype, *, rows: Sequence[int], own: Sequence[int] = ()
) -> jax.Array:
    """`apply(x, w)` and noise on it.

    Args:
      w: a parameter whose family is on outputs.
      apply: the product of arrays `(x, w)`, linear in `w`.
      x: the other operand, or indices.
      dtype: of the result.
      rows, own: see `Output`.
    """
    exact = apply(x, w.weight)
    if jnp.issubdtype(exact.dtype, jnp.complexfloating):
        raise TypeError(f"{w.path}: Node perturbs real outputs, got a product of {exact.dtype}.")
    noise = w.family.draw(w.member, exact.shape, accumulator(exact.dtype))
    if w.entry is not None:
        noise = tap_output(w.path, w.entry, x, noise, Output(apply, w.view, w.stack, tuple(rows), tuple(own)))
    return add_noise(exact, w.scale.reshape(-1)[0] * noise, dtype)
