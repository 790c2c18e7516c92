"""A function as a jaxpr for evaluation alone.

Nothing is differentiated here, so custom derivative rules and rematerialisation are dropped: what remains of them is
their primal function. That is also what lets values flow through `jax.custom_vjp`. Arrays that a scan slices are
marked, as a perturbed one can be sliced only if its noise is stacked the same way.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.extend.core import primitives as core
from jax.interpreters import batching, mlir

scanned_p = Primitive("scanned")
"""The identity, on every array that a scan slices."""
scanned_p.def_impl(lambda x: x)
scanned_p.def_abstract_eval(lambda x: x)
batching.defvectorized(scanned_p)
mlir.register_lowering(scanned_p, lambda ctx, x: [x])


def primal_jaxpr(fn: Callable, *args: Any) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr of `fn(*args)` without derivative rules, and the structure of its output."""
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return _primal(jaxpr), jax.tree.structure(out)


def _is_jaxpr(leaf: Any) -> bool:
    return isinstance(leaf, Jaxpr | ClosedJaxpr)


def _primal(jaxpr: Any) -> Any:
    if not _is_jaxpr(jaxpr):
        return jaxpr
    if not hasattr(jaxpr, "jaxpr") or jaxpr.jaxpr is jaxpr:  # jax 0.12 has one class for open and closed ones
        return jaxpr.replace(eqns=[_primal_equation(eqn) for eqn in jaxpr.eqns])
    return jaxpr.replace(jaxpr=_primal(jaxpr.jaxpr))


def _primal_equation(eqn: Any) -> Any:
    if eqn.primitive.name == "stop_gradient":
        return eqn.replace(primitive=core.copy_p, params={})
    params = {name: jax.tree.map(_primal, param, is_leaf=_is_jaxpr) for name, param in eqn.params.items()}
    if eqn.primitive in (core.custom_jvp_call_p, core.custom_vjp_call_p, core.remat_p):
        inner = params["jaxpr" if eqn.primitive is core.remat_p else "call_jaxpr"]
        function = jaxpr_as_fun(inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ()))
    elif eqn.primitive is core.scan_p:
        inner = [aval.shape for aval in params["jaxpr"].in_avals]

        def function(*args):
            args = [x if x.shape == shape else scanned_p.bind(x) for x, shape in zip(args, inner)]
            return core.scan_p.bind(*args, **params)
    else:
        return eqn.replace(params=params)
    # A call is written as jax.jit writes it: its parameters differ from one jax to the next.
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    (call,) = jax.make_jaxpr(jax.jit(function))(*shapes).eqns
    return eqn.replace(primitive=call.primitive, params=call.params)
