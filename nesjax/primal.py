"""A function as a jaxpr for evaluation alone.

Nothing is differentiated here, so custom derivative rules and rematerialisation are dropped: what remains of them is
their primal function. That is also what lets values flow through `jax.custom_vjp`. Arrays that a scan slices are
marked, as a perturbed one can be sliced only if its noise is stacked the same way; so is what a loop changes or what
branches give differently, which has to be an array.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.extend.core import primitives as core
from jax.interpreters import batching, mlir


def _identity(name: str, doc: str) -> Primitive:
    primitive = Primitive(name)
    primitive.__doc__ = doc
    primitive.def_impl(lambda x, **params: x)
    primitive.def_abstract_eval(lambda x, **params: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda ctx, x, **params: [x])
    return primitive


scanned_p = _identity("scanned", "The identity, on every array that a scan slices.")
array_p = _identity("array", "The identity, on whatever must not be a perturbed parameter, with the use that says why.")
LOOP = "a loop that changes it or a branch that gives it"


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
    elif eqn.primitive.name == "shard_map":  # a trace of its own kind; within a checkpoint it is a call like others
        bound = eqn.primitive.get_bind_params(eqn.params)

        def function(*args):
            args = [array_p.bind(x, use="shard_map") for x in args]
            return jax.checkpoint(lambda *args: list(eqn.primitive.bind(*args, **bound)))(*args)
    elif eqn.primitive is core.scan_p:
        body = params["jaxpr"]  # its inputs: constants, carries, slices; the parameters' names differ from jax to jax
        sliced = [var.aval.shape != aval.shape for var, aval in zip(eqn.invars, body.in_avals)]
        carries = sum(var.aval.shape == aval.shape for var, aval in zip(eqn.outvars, body.out_avals))
        first = len(sliced) - sum(sliced) - carries
        changed = _changed(body, first, carries)
        params["jaxpr"] = _with_arrays(body, changed)

        def function(*args):
            args = [scanned_p.bind(x) if slices else x for x, slices in zip(args, sliced)]
            return core.scan_p.bind(*_arrays(args, [first + at for at in changed]), **params)
    elif eqn.primitive is core.while_p:
        body, consts = params["body_jaxpr"], params["body_nconsts"]
        changed = _changed(body, consts, len(body.in_avals) - consts)
        params["body_jaxpr"] = _with_arrays(body, changed)
        first = consts + params["cond_nconsts"]

        def function(*args):
            return core.while_p.bind(*_arrays(args, [first + at for at in changed]), **params)
    elif eqn.primitive is core.cond_p:
        branches = [getattr(branch, "jaxpr", branch) for branch in params["branches"]]
        sources = [[_place(branch, out) for branch in branches] for out in range(len(eqn.outvars))]
        differ = [at for at, places in enumerate(sources) if None in places or len(set(places)) > 1]
        params["branches"] = tuple(_with_arrays(branch, differ) for branch in params["branches"])

        def function(*args):
            return core.cond_p.bind(*args, **params)
    else:
        return eqn.replace(params=params)
    # A call is written as jax.jit writes it: its parameters differ from one jax to the next.
    shapes = [v.aval for v in eqn.invars]
    (call,) = jax.make_jaxpr(jax.jit(function))(*shapes).eqns
    return eqn.replace(primitive=call.primitive, params=call.params)


def _place(jaxpr: Any, out: int) -> int | None:
    """Which input an output is, untouched; None if it is computed."""
    return next((at for at, var in enumerate(jaxpr.invars) if var is jaxpr.outvars[out]), None)


def _changed(body: Any, first: int, count: int) -> list[int]:
    """The carries of a loop, which begin at input `first`, that its body doesn't hand on as they came."""
    jaxpr = getattr(body, "jaxpr", body)
    return [at for at in range(count) if _place(jaxpr, at) != first + at]


def _arrays(values: Any, places: list[int]) -> list:
    return [array_p.bind(value, use=LOOP) if at in places else value for at, value in enumerate(values)]


def _with_arrays(closed: Any, outputs: list[int]) -> Any:
    """The jaxpr with some outputs made arrays."""
    run = jaxpr_as_fun(closed)
    shapes = closed.in_avals
    return jax.make_jaxpr(lambda *args: _arrays(run(*args), outputs))(*shapes)
