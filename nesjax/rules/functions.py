"""A whole function of perturbed parameters, and the loops and branches in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import quax
from jax.extend.core import jaxpr_as_fun

from ..formed import Formed
from ..perturbed import Parameter, Perturbed, Vector, array_of
from ..primal import array_p, primal_jaxpr, scanned_p
from ..taps import Reaped, reap


@quax.register(scanned_p)
def _(w: Parameter):
    if isinstance(w, Perturbed) and w.stack:
        return w
    return w.announce("scan over its leading axis (a rule `nesjax.Stacked(family)` gives each entry its own noise)")


@quax.register(scanned_p)
def _(w: Vector):
    return w if w.of.stack else w.array


@quax.register(array_p)
def _(w: Parameter, *, use):
    return w.announce(use)


def evaluate(fn: Callable, params: Any, values: Sequence[Any], formed: Formed) -> Any:
    """`fn(params)` with the leaves of `params` replaced by `values`: arrays or `Perturbed`, of the leaves' shapes."""
    parts = jax.tree.leaves(list(values), is_leaf=lambda v: isinstance(v, Perturbed))
    places = any(isinstance(v, Perturbed) and v.family.on_outputs for v in parts)
    layers = any(isinstance(v, Perturbed) and v.family.fused for v in parts)
    primal, structure = primal_jaxpr(fn, params, places=places, layers=layers)
    with formed.during(primal):
        out = quax.quaxify(jaxpr_as_fun(primal))(*values)
    return structure.unflatten([v.materialise() if isinstance(v, Parameter) else array_of(v) for v in out])


def evaluate_and_reap(fn: Callable, params: Any, values: Sequence[Any], formed: Formed) -> tuple[Any, Reaped]:
    """`evaluate`, and what the values that have an `entry` multiplied, read off a trace of the whole member."""
    arrays, tree = jax.tree.flatten(list(values))
    trace = jax.make_jaxpr(lambda *arrays: evaluate(fn, params, tree.unflatten(arrays), formed), return_shape=True)
    closed, out = trace(*arrays)
    outs, reaped = reap(closed, *arrays)
    return jax.tree.unflatten(jax.tree.structure(out), outs), reaped
