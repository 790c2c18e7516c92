"""Dense layers of a program, as one operation each: a product, the bias added to it and the activation.

A kernel has a product in registers, where what follows it number by number costs no memory. What that is, is read off
the jaxpr: equations that need nothing but the product, constants and one vector, of which only the last is used
elsewhere. So the product is formed once, however often an activation uses it.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, Primitive, jaxpr_as_fun
from jax.extend.core import primitives as core
from jax.interpreters import batching, mlir

CALLS = core.jit_p, core.custom_jvp_call_p
UNCHANGED = core.broadcast_in_dim_p, core.reshape_p, core.convert_element_type_p, core.copy_p
# What activations are made of; those with a function here are computed by it in a kernel, whose compiler lacks them.
ELEMENTWISE = dict.fromkeys(
    (core.add_p, core.sub_p, core.mul_p, core.div_p, core.max_p, core.min_p, core.neg_p, core.abs_p, core.exp_p,
     core.tanh_p, core.logistic_p, core.square_p, core.integer_pow_p, core.select_n_p, core.eq_p, core.ne_p, core.lt_p,
     core.le_p, core.gt_p, core.ge_p, *UNCHANGED)
) | {core.expm1_p: lambda x: jnp.exp(x) - 1, core.log1p_p: lambda x: jnp.log(1 + x)}  # fmt: skip


def dense(x: jax.Array, w: jax.Array, *bias: jax.Array, tail: ClosedJaxpr, **product: Any) -> jax.Array:
    """The definition: `tail`, of the product of `x` with `w` and of the bias."""
    return jaxpr_as_fun(tail)(core.dot_general_p.bind(x, w, **product), *bias)[0]


dense_p = Primitive("dense")
dense_p.def_impl(dense)
dense_p.def_abstract_eval(
    lambda *args, **params: jax.make_jaxpr(functools.partial(dense, **params))(*args).out_avals[0]
)
mlir.register_lowering(dense_p, mlir.lower_fun(dense, multiple_results=False))
batching.primitive_batchers[dense_p] = lambda args, dims, **params: (
    jax.vmap(functools.partial(dense, **params), dims)(*args), 0
)  # fmt: skip


def with_layers(jaxpr: Any) -> list:
    """The equations of an open jaxpr, those of each dense layer as one of `dense_p`."""
    eqns: list[Any] = list(jaxpr.eqns)
    uses = Counter(filter(_is_variable, itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in eqns))))
    for at, product in enumerate(jaxpr.eqns):
        if product.primitive is not core.dot_general_p:
            continue
        places, bias = _following(eqns, at, uses)
        if not places:
            continue
        own, last = [eqns[place] for place in sorted(places)], max(places)
        ends = {"outvars": eqns[last].outvars}
        tail = jaxpr.replace(constvars=[], invars=[*product.outvars, *bias], eqns=own, effects=set(), **ends)
        params = {**product.params, "tail": ClosedJaxpr(tail, ())}
        for place in (at, *places):
            eqns[place] = None
        eqns[last] = product.replace(primitive=dense_p, invars=[*product.invars, *bias], params=params, **ends)
    return [eqn for eqn in eqns if eqn is not None]


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _following(eqns: Sequence[Any], at: int, uses: Counter) -> tuple[list[int], list]:
    """The places of the equations that belong to the layer of the product at `at`, and its bias if it has one."""
    (y,) = eqns[at].outvars
    made = {var: place for place, eqn in enumerate(eqns) if eqn is not None for var in eqn.outvars}
    left = {y: uses[y]}  # of what the layer computes: how often it is used elsewhere
    places, bias, found = [], [], ([], [])
    for place, eqn in enumerate(eqns):
        operands = list(filter(_is_variable, eqn.invars)) if eqn else []
        if place <= at or not any(var in left for var in operands):
            continue
        others = [var for var in operands if var not in left]
        if others and not bias and len(others) == 1 and eqn.primitive is core.add_p:
            path, vector = _source(eqns, made, uses, others[0])
            if vector not in made and vector.aval.shape == y.aval.shape[-1:]:
                places, bias, others = [*places, *path], [vector], []
        if others or not _is_elementwise(eqn, y.aval.shape):
            break
        (out,) = eqn.outvars
        left |= {var: left[var] - operands.count(var) for var in operands if var in left}
        left[out] = uses[out]
        places = [*places, place]
        if 0 < left[out] == sum(left.values()) and (out.aval.shape, out.aval.dtype) == (y.aval.shape, y.aval.dtype):
            found = places, bias
    return found


def _source(eqns: Sequence[Any], made: dict, uses: Counter, var: Any) -> tuple[list[int], Any]:
    """What a variable was before it was only cast and broadcast along axes in front, and where that was done."""
    path = []
    while var in made and uses[var] == 1 and eqns[made[var]].primitive in UNCHANGED:
        eqn, shape = eqns[made[var]], var.aval.shape
        leads = eqn.params.get("broadcast_dimensions", (len(shape) - 1,))[-1:] == (len(shape) - 1,)
        if not leads or shape[-1:] != eqn.invars[0].aval.shape[-1:] or not _of_floats(eqn):
            break
        path, var = [made[var], *path], eqn.invars[0]
    return path, var


def _of_floats(eqn: Any) -> bool:
    return all(atom.aval.dtype in (jnp.float32, jnp.bfloat16, jnp.bool) for atom in (*eqn.invars, *eqn.outvars))


def _is_elementwise(eqn: Any, shape: tuple[int, ...]) -> bool:
    """Whether an equation computes one array of the shape (or a number), number by number."""
    if len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape not in (shape, ()) or not _of_floats(eqn):
        return False
    if eqn.primitive in CALLS:
        inner = _inner(eqn)
        return not inner.constvars and all(_is_elementwise(each, shape) for each in inner.eqns)
    spreads = eqn.primitive in UNCHANGED and eqn.invars[0].aval.shape not in (shape, ())
    unusual = eqn.params.get("y", 2) < 2 or eqn.params.get("accuracy") is not None  # `integer_pow`; `exp` and others
    return eqn.primitive in ELEMENTWISE and not spreads and not unusual


def _inner(eqn: Any) -> Any:
    closed = eqn.params["jaxpr" if eqn.primitive is core.jit_p else "call_jaxpr"]
    return getattr(closed, "jaxpr", closed)


def in_float32(tail: Any, *values: Any) -> jax.Array:
    """What `tail` computes, of float32 arrays of another shape; it is rounded nowhere."""
    jaxpr = getattr(tail, "jaxpr", tail)
    known = dict(zip(jaxpr.invars, values))
    wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    for eqn in jaxpr.eqns:
        args = [known[atom] if _is_variable(atom) else wide(jnp.asarray(atom.val)) for atom in eqn.invars]
        if eqn.primitive in CALLS:
            out = in_float32(_inner(eqn), *args)
        elif eqn.primitive in UNCHANGED:
            out = args[0]
        else:
            shape = jnp.broadcast_shapes(*map(jnp.shape, args))
            compute = ELEMENTWISE[eqn.primitive] or functools.partial(eqn.primitive.bind, **eqn.params)
            out = compute(*(arg if arg.shape == shape else jnp.broadcast_to(arg, shape) for arg in args))
        known[eqn.outvars[0]] = out
    return known[jaxpr.outvars[0]]
