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
    w: Perturbed, apply: Callable, x: jax.Array, dtype, *, rows: Sequence[int], own: Sequence[int] = (), fused=False
) -> jax.Array:
    """`apply(x, w)` and noise on it.

    Args:
      w: a parameter whose family is on outputs.
      apply: the product of arrays `(x, w)`, linear in `w`.
      x: the other operand, or indices.
      dtype: of the result.
      rows, own: see `Output`.
      fused: whether it is a product of rows with a matrix that a kernel may form.
    """

    def marked(noise):
        if w.entry is None:
            return noise
        return tap_output(w.path, w.entry, x, noise, Output(apply, w.view, w.stack, tuple(rows), tuple(own)))

    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{w.path}: Node perturbs real outputs, got a product of {dtype}.")
    if fused:
        return _fused(w, apply, x, dtype, marked)
    exact = apply(x, w.weight)
    noise = marked(w.family.draw(w.member, exact.shape, accumulator(exact.dtype)))
    return add_noise(exact, w.scale.reshape(-1)[0] * noise, dtype)


def _fused(w: Perturbed, apply: Callable, x: jax.Array, dtype, marked: Callable) -> jax.Array:
    """`with_noise`, whose signs a kernel reads; they are formed for credit alone."""
    from ..kernels.signed_product import signed_product  # not until it is asked for: Pallas takes 0.3 s to import

    family: Any = w.family
    shape = (*x.shape[:-1], w.shape[1])
    noise = lambda words: family.signs(words.reshape(-1), shape, accumulator(dtype))
    words = family.draw_words(w.member, shape)
    marked(noise(words))

    def by_xla(x, weight, scale, words, _):
        return add_noise(apply(x, weight), scale * noise(words), dtype)

    return signed_product(by_xla, x, w.weight, w.scale.reshape(-1)[0], words.reshape(*shape[:-1], -1))
