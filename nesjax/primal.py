"""A function as a jaxpr for evaluation alone.

Nothing is differentiated here, so custom derivative rules and rematerialisation are dropped: what remains of them is
their primal function. That is also what lets values flow through `jax.custom_vjp`. Arrays that a scan slices are
marked, as a perturbed one can be sliced only if its noise is stacked the same way; so is what a loop changes or what
branches give differently, which has to be an array.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.extend.core import primitives as core
from jax.interpreters import batching, mlir

from .dense import dense_p, with_layers


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


place_p = _identity("place", "The identity, on the operands of a product: `number` is its place in the program.")
step_p = Primitive("step")  # x, i -> x, on what a loop's body reads from outside; i is the step
step_p.def_impl(lambda x, i: x)
step_p.def_abstract_eval(lambda x, i: x)
mlir.register_lowering(step_p, lambda ctx, x, i: [x])
batching.primitive_batchers[step_p] = lambda args, dims: (args[0], dims[0])
# Linear in one operand: what noise on outputs perturbs.
PRODUCTS = (core.dot_general_p, core.conv_general_dilated_p, core.gather_p, core.dynamic_slice_p, dense_p)


def primal_jaxpr(fn: Callable, *args: Any, places: bool = False, layers: bool = False) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr of `fn(*args)` without derivative rules, and the structure of its output.

    With `places`, products and loops are marked, for noise that is drawn anew at each place and in each step. With
    `layers`, dense layers are one operation each.
    """
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return _Primal(itertools.count() if places else None, layers).of(jaxpr), jax.tree.structure(out)


def _is_jaxpr(leaf: Any) -> bool:
    return isinstance(leaf, Jaxpr | ClosedJaxpr)


class _Primal:
    """Jaxprs without derivative rules; `numbers` count the products, where they are marked."""

    def __init__(self, numbers: Iterator[int] | None, layers: bool):
        self.numbers, self.layers = numbers, layers

    def of(self, jaxpr: Any) -> Any:
        if not _is_jaxpr(jaxpr):
            return jaxpr
        if not hasattr(jaxpr, "jaxpr") or jaxpr.jaxpr is jaxpr:  # jax 0.12 has one class for open and closed ones
            eqns = with_layers(jaxpr) if self.layers else jaxpr.eqns
            return jaxpr.replace(eqns=[self.equation(eqn) for eqn in eqns])
        return jaxpr.replace(jaxpr=self.of(jaxpr.jaxpr))

    def equation(self, eqn: Any) -> Any:
        if eqn.primitive.name == "stop_gradient":
            return eqn.replace(primitive=core.copy_p, params={})
        params = {name: jax.tree.map(self.of, param, is_leaf=_is_jaxpr) for name, param in eqn.params.items()}
        function = self.function(eqn, params)
        if function is None:
            return eqn.replace(params=params)
        # A call is written as jax.jit writes it: its parameters differ from one jax to the next.
        shapes = [v.aval for v in eqn.invars]
        (call,) = jax.make_jaxpr(jax.jit(function))(*shapes).eqns
        return eqn.replace(primitive=call.primitive, params=call.params)

    def function(self, eqn: Any, params: dict[str, Any]) -> Callable | None:
        """What stands for an equation, a function of its operands; None for itself."""
        primitive = eqn.primitive
        if primitive in (core.custom_jvp_call_p, core.custom_vjp_call_p, core.remat_p):
            inner = params["jaxpr" if primitive is core.remat_p else "call_jaxpr"]
            return jaxpr_as_fun(inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ()))
        if primitive.name == "shard_map":  # a trace of its own kind; within a checkpoint it is a call like others
            bound = primitive.get_bind_params(params)
            call = jax.checkpoint(lambda *args: list(primitive.bind(*args, **bound)))
            return lambda *args: call(*(array_p.bind(x, use="shard_map") for x in args))
        if primitive is core.scan_p:
            return self.scan(eqn, params)
        if primitive is core.while_p:
            return self.while_loop(eqn, params)
        if primitive is core.cond_p:
            branches = [getattr(branch, "jaxpr", branch) for branch in params["branches"]]
            sources = [[_place(branch, out) for branch in branches] for out in range(len(eqn.outvars))]
            differ = [at for at, places in enumerate(sources) if None in places or len(set(places)) > 1]
            params["branches"] = tuple(_with_arrays(branch, differ) for branch in params["branches"])
            return lambda *args: primitive.bind(*args, **params)
        if self.numbers is not None and primitive in PRODUCTS:
            number = next(self.numbers)
            return lambda *args: primitive.bind(*(place_p.bind(x, number=number) for x in args), **params)
        return None

    def scan(self, eqn: Any, params: dict[str, Any]) -> Callable:
        body = params["jaxpr"]  # its inputs: constants, carries, slices; the parameters' names differ from jax to jax
        sliced = [var.aval.shape != aval.shape for var, aval in zip(eqn.invars, body.in_avals)]
        carries = sum(var.aval.shape == aval.shape for var, aval in zip(eqn.outvars, body.out_avals))
        first = len(sliced) - sum(sliced) - carries
        run, changed = jaxpr_as_fun(body), _changed(body, first, carries)

        def function(*args):
            fixed, carry = list(args[: first + carries]), [array_p.bind(args[first + at], use=LOOP) for at in changed]
            slices = [scanned_p.bind(x) for x in args[first + carries :]]

            def step(carry, of_step):
                i, slices = of_step
                read = self.in_step(fixed, () if i is None else (i,))
                for at, x in zip(changed, carry):
                    read[first + at] = x
                outs = run(*read, *slices)
                return [array_p.bind(outs[at], use=LOOP) for at in changed], outs[carries:]

            settings = {name: params[name] for name in ("length", "reverse", "unroll")}
            steps = None if self.numbers is None else jnp.arange(params["length"])
            carry, outs = jax.lax.scan(step, carry, (steps, slices), **settings)
            for at, x in zip(changed, carry):
                fixed[first + at] = x
            return [*fixed[first:], *outs]

        return function

    def while_loop(self, eqn: Any, params: dict[str, Any]) -> Callable:
        body, consts = params["body_jaxpr"], params["body_nconsts"]
        first = consts + params["cond_nconsts"]
        run, goes_on = jaxpr_as_fun(body), jaxpr_as_fun(params["cond_jaxpr"])
        changed = _changed(body, consts, len(body.in_avals) - consts)
        # Bound as it is: a loop that was vmapped asks for each entry of the batch, which jax.lax.while_loop refuses.
        (asked,) = params["cond_jaxpr"].out_avals
        steps = [] if self.numbers is None else [jax.ShapeDtypeStruct(asked.shape, jnp.int32)]

        def step(*args):
            values, i = list(args[: len(body.in_avals)]), args[len(body.in_avals) :]
            read = [
                x if at - consts in changed else y for at, (x, y) in enumerate(zip(values, self.in_step(values, i)))
            ]
            outs = _arrays(run(*read), changed)
            kept = [out if at in changed else values[consts + at] for at, out in enumerate(outs)]
            return [*kept, *(count + 1 for count in i)]

        def ask(*args):
            return goes_on(*args[: len(args) - len(steps)])

        params["body_jaxpr"] = jax.make_jaxpr(step)(*body.in_avals, *steps)
        params["cond_jaxpr"] = jax.make_jaxpr(ask)(*params["cond_jaxpr"].in_avals, *steps)

        def function(*args):
            start = [jnp.zeros(step.shape, step.dtype) for step in steps]
            outs = core.while_p.bind(*_arrays(args, [first + at for at in changed]), *start, **params)
            return outs[: len(outs) - len(steps)]

        return function

    def in_step(self, values: list, steps: Sequence[jax.Array]) -> list:
        """What a loop's body reads from outside it, in a step (of a vmapped loop the latest); () if none is marked."""
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return [step_p.bind(x, steps[0].max()) if steps and is_float(x) else x for x in values]


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
