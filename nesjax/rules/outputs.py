"""Noise on the outputs of products (`nesjax.Node`): drawn anew at each place in the program and each step of a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.extend.core import jaxpr_as_fun

from ..dense import in_float32
from ..noise.base import accumulator
from ..perturbed import Parameter, Perturbed, Vector, add_noise
from ..primal import place_p, step_p
from ..taps import Output, tap_output
from .lazy import Expression, bind, on_one


@on_one(place_p)
def _(primitive, w, *, number):
    return _folded(w, lambda part: bind(primitive, part, number=number), number)


@quax.register(step_p)
def _(w: Parameter, i: jax.Array):
    return _folded(w, lambda part: bind(step_p, part, i), i)


@quax.register(place_p)
@quax.register(step_p)
def _(w: Vector, *_: Any, **params):
    return w


def _folded(w: Any, again: Callable, number) -> Parameter:
    if isinstance(w, Expression):
        return w.map(again)
    return w.replace(w.weight, member=w.family.fold(w.member, number)) if w.family.on_outputs else w


def with_noise(
    w: Perturbed, apply: Callable, x: jax.Array, dtype, *, rows: Sequence[int], own: Sequence[int] = (), kernel=None
) -> jax.Array:
    """`apply(x, w)` and noise on it.

    Args:
      w: a parameter whose family is on outputs.
      apply: the product of arrays `(x, w)`, linear in `w`.
      x: the other operand, or indices.
      dtype: of the result.
      rows, own: see `Output`.
      kernel: `in_kernel`, with what follows the product, if that is one of rows with a matrix that a kernel may form.
    """

    def marked(noise):
        if w.entry is None:
            return noise
        return tap_output(w.path, w.entry, x, noise, Output(apply, w.view, w.stack, tuple(rows), tuple(own)))

    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{w.path}: Node perturbs real outputs, got a product of {dtype}.")
    if kernel:
        return _fused(w, apply, x, dtype, marked, kernel)
    exact = apply(x, w.weight)
    noise = marked(w.family.draw(w.member, exact.shape, accumulator(exact.dtype)))
    return add_noise(exact, w.scale.reshape(-1)[0] * noise, dtype)


def _fused(w: Perturbed, apply: Callable, x: jax.Array, dtype, marked: Callable, kernel: Callable) -> jax.Array:
    """`with_noise`, whose signs a kernel reads; they are formed for credit alone."""
    family: Any = w.family
    shape = (*x.shape[:-1], w.shape[1])
    noise = lambda words: family.signs(words.reshape(-1), shape, accumulator(dtype))
    words = family.draw_words(w.member, shape)
    marked(noise(words))

    def by_xla(x, weight, scale, words, _):
        return add_noise(apply(x, weight), scale * noise(words), dtype)

    return kernel(by_xla, x, w.weight, w.scale.reshape(-1)[0], words.reshape(*shape[:-1], -1))


def in_kernel(
    by_xla: Callable, x: jax.Array, w: jax.Array, scale: jax.Array, t: jax.Array, s: jax.Array | None = None, *,
    tail: Any = None, bias: Sequence[Vector] = (),
) -> jax.Array:  # fmt: skip
    """`by_xla(x, w, scale, t, s)` and its layer's `tail`, in one kernel where they can be (see `signed_product`)."""
    from ..kernels.signed_product import signed_product  # not until it is asked for: Pallas takes 0.3 s to import

    def layer(x, w, scale, t, s, *of_bias):
        y = by_xla(x, w, scale, t, s)
        if tail is None:
            return y
        formed = (b.replace(of_bias[0], scale=of_bias[1], member=(of_bias[2][None],)).materialise() for b in of)
        return jaxpr_as_fun(tail)(y, *formed)[0]

    of = [vector.of for vector in bias]
    of_bias = [part for b in of for part in (b.weight, b.scale, b.member[0][0])]
    then = None if tail is None else functools.partial(in_float32, tail)
    return signed_product(layer, x, w, scale, t, s, *of_bias, then=then)
