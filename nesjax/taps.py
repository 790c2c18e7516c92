"""What each parameter multiplied: rows marked where a product happens, and brought out of jit and scan.

A product of a perturbed parameter tells the rest of the network about the noise `E` only through `Y = X E`, where `X`
holds the rows that the parameter multiplied. `tap_product` and `tap_take` mark `(X, Y)` inside the traced function;
`reap` evaluates that function and returns what was marked. `lose` marks a use that has no such rows.

Letters: `T` rows, `I`/`O` the sizes of the contracted and of the remaining axes of `E`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.extend.core import primitives as core
from jax.interpreters import batching, mlir

from .noise import ConvGeometry
from .views import View


class Kind(NamedTuple):
    """How a parameter was used: the axes of `E` that were contracted (or, with `take`, looked up) and the others."""

    inside: tuple[int, ...]
    free: tuple[int, ...]
    take: bool = False

    def over_scan(self, rows: Rows, layer: bool) -> Rows:
        """What a scan's steps marked: a layer's rows each, or more rows, in front of the others."""
        if layer:
            return rows

        def join(z, at):  # the axis of rows is `at` before the end
            z = jnp.moveaxis(z, 0, z.ndim - at - 2)
            return z.reshape(*z.shape[: z.ndim - at - 2], -1, *z.shape[z.ndim - at :])

        return Rows(join(rows.x, 0 if self.take else 1), join(rows.y, 1), self)


class Output(NamedTuple):
    """A product whose output is perturbed.

    Attributes:
      apply: the product of arrays `(x, w)`, linear in `w`, which has the axes of the parameter as it was used.
      view, stack: how the parameter was used, and how many stack axes it had.
      rows: the axes of the output that are not the parameter's.
      own: the axes of `w` along which outputs see the same `x`.
      scans: for each leading axis of what was marked, the outermost first, whether it is a stack's (a layer's).
    """

    apply: Callable
    view: View
    stack: int
    rows: tuple[int, ...]
    own: tuple[int, ...]
    scans: tuple[bool, ...] = ()

    def over_scan(self, rows: Rows, layer: bool) -> Rows:
        """What a scan's steps marked."""
        return dataclasses.replace(rows, kind=self._replace(scans=(layer, *self.scans)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one use of a parameter, in one call of the function. Stack axes lead where a stacked parameter is used.

    Attributes:
      x: what multiplied the noise, `[*stack, T, I]`; for a lookup the indices, `[*stack, T]`.
      y: the noise's own product with it, without std and sign, `[*stack, T, O]`.
      kind: which axes of the noise these are; or an `Output`, where `x` and `y` (noise) have the product's axes.
    """

    x: jax.Array
    y: jax.Array
    kind: Any = dataclasses.field(metadata={"static": True})


tap_p = Primitive("tap")  # x, y, entry -> y
tap_p.def_impl(lambda x, y, entry, **_: y)
tap_p.def_abstract_eval(lambda x, y, entry, **_: y)
mlir.register_lowering(tap_p, lambda ctx, x, y, entry, **_: [y])
lost_p = Primitive("lost")  # y -> y
lost_p.def_impl(lambda y, **_: y)
lost_p.def_abstract_eval(lambda y, **_: y)
mlir.register_lowering(lost_p, lambda ctx, y, **_: [y])
batching.defvectorized(lost_p)


def _batch_tap(args, dims, **params):
    """The mapped axis (a stack's, where a product is mapped over it) goes in front of all that is marked."""
    size = next(x.shape[at] for x, at in zip(args, dims) if at is not None)
    front = lambda x, at: jnp.broadcast_to(x, (size, *x.shape)) if at is None else jnp.moveaxis(x, at, 0)
    return tap_p.bind(*map(front, args, dims), **params), 0


batching.primitive_batchers[tap_p] = _batch_tap


def tap_product(path: str, entry: jax.Array, shape: tuple[int, ...], x: jax.Array, axes: Any, y: jax.Array):
    """`y`, marked as the product of `x` with the noise of parameter `path`.

    Args:
      path: the parameter's name.
      entry: which entry of its stack this is, a scalar; what tells a scan over the stack from any other scan.
      shape: the noise's.
      x, axes: as in `NoiseFamily.contract`, which returned `y`.
    """
    labels, own, out = axes
    inside = tuple(axis for axis, label in enumerate(own) if label in labels and label not in out)
    free = tuple(axis for axis, label in enumerate(own) if label not in labels and label in out)
    rows = [label for label in labels if label not in own]
    if not inside or len(inside) + len(free) != len(own) or any(label not in out for label in rows):
        return lose(y, path, "a product that sums over rows or keeps a contracted axis")
    n_in = math.prod(shape[axis] for axis in inside)
    order = [out.index(label) for label in rows] + [out.index(own[axis]) for axis in free]
    y_rows = y.transpose(order)
    count = math.prod(y_rows.shape[: len(rows)])
    if count >= n_in:
        return lose(y, path, f"{count} rows of {n_in} inputs")
    x_rows = x.transpose([labels.index(label) for label in rows] + [labels.index(own[axis]) for axis in inside])
    kind = Kind(inside, free)
    marked = tap_p.bind(x_rows.reshape(count, n_in), y_rows.reshape(count, -1), entry, path=path, kind=kind)
    return marked.reshape(y_rows.shape).transpose([order.index(axis) for axis in range(len(order))])


def tap_take(path: str, entry: jax.Array, indices: jax.Array, y: jax.Array):
    """`y: [*indices.shape, ...]`, marked as the rows `indices` of the noise of parameter `path`."""
    kind = Kind((0,), tuple(range(1, y.ndim - indices.ndim + 1)), take=True)
    marked = tap_p.bind(indices.reshape(-1), y.reshape(indices.size, -1), entry, path=path, kind=kind)
    return marked.reshape(y.shape)


def tap_conv(path: str, entry: jax.Array, shape: tuple[int, ...], x: jax.Array, geometry: ConvGeometry, y: jax.Array):
    """`y: [B, *space, O]`, marked as the products of every patch of `x` with the noise of parameter `path`."""
    *window, n_in, n_out = geometry.kernel_axes
    inputs = math.prod(shape[axis] for axis in (*window, n_in))
    count = y.size // shape[n_out]
    if geometry.groups > 1:
        return lose(y, path, "a grouped convolution")
    if count >= inputs:
        return lose(y, path, f"{count} patches of {inputs} inputs")
    patches = geometry.patches(x, [shape[axis] for axis in window]).reshape(count, inputs)
    kind = Kind((*window, n_in), (n_out,))
    return tap_p.bind(patches, y.reshape(count, -1), entry, path=path, kind=kind).reshape(y.shape)


def tap_output(path: str, entry: jax.Array, x: jax.Array, noise: jax.Array, kind: Output) -> jax.Array:
    """`noise`, marked as what perturbs the product of `x` with parameter `path`."""
    return tap_p.bind(x, noise, entry, path=path, kind=kind)


def lose(y: jax.Array, path: str, reason: str) -> jax.Array:
    """`y`, marked as a use of parameter `path` that has no rows, and why."""
    return lost_p.bind(y, path=path, reason=reason)


# ---- bringing them out


class Reaped(NamedTuple):
    """What was marked: rows by parameter, with the entry of the stack they are of, and reasons by parameter."""

    rows: dict[str, list[tuple[Rows, jax.Array]]]
    lost: dict[str, str]

    def add(self, other: Reaped) -> None:
        for path, found in other.rows.items():
            self.rows.setdefault(path, []).extend(found)
        self.lost.update(other.lost)


def reap(closed: ClosedJaxpr, *args: jax.Array) -> tuple[list[jax.Array], Reaped]:
    """The outputs of a closed jaxpr, and what was marked in it, in jitted functions and scans too."""
    jaxpr, reaped = closed.jaxpr, Reaped({}, {})
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args]))
    read = lambda var: var.val if hasattr(var, "val") else env[var]
    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if eqn.primitive is tap_p:
            x, y, entry = values
            reaped.rows.setdefault(eqn.params["path"], []).append((Rows(x, y, eqn.params["kind"]), entry))
            outs = [y]
        elif eqn.primitive is lost_p:
            reaped.lost[eqn.params["path"]] = eqn.params["reason"]
            outs = values
        elif eqn.primitive is core.jit_p and _marks(eqn):
            outs, inner = reap(eqn.params["jaxpr"], *values)
            reaped.add(inner)
        elif eqn.primitive is core.scan_p and _marks(eqn):
            outs, inner = _reap_scan(eqn, values)
            reaped.add(inner)
        else:
            reaped.lost.update(dict.fromkeys(_marks(eqn), f"used inside {eqn.primitive.name}"))
            outs = eqn.primitive.bind(*values, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs))
    return [read(var) for var in jaxpr.outvars], reaped


def _reap_scan(eqn: Any, values: list[jax.Array]) -> tuple[list[jax.Array], Reaped]:
    body, count = eqn.params["jaxpr"], len(values)
    # Constants, carries, slices; their numbers' names differ from one jax to the next.
    slices = sum(var.aval.shape != aval.shape for var, aval in zip(eqn.invars, body.in_avals))
    carries = sum(var.aval.shape == aval.shape for var, aval in zip(eqn.outvars, body.out_avals))
    first = count - slices - carries
    consts, over_stack, lost = values[:first], {}, {}

    def step(carry, sliced):
        outs, inner = reap(body, *consts, *carry, *sliced)
        lost.update(inner.lost)
        for path, found in inner.rows.items():  # an entry that the scan slices is a layer's, else steps are rows
            over_stack[path] = [not any(entry is const for const in consts) for _, entry in found]
        return outs[:carries], (outs[carries:], inner.rows)

    carry, (outs, rows) = jax.lax.scan(
        step, values[first : first + carries], values[first + carries :], length=eqn.params["length"],
        reverse=eqn.params["reverse"], unroll=eqn.params["unroll"],
    )  # fmt: skip
    joined = {
        path: [
            (found.kind.over_scan(found, layer), entry if layer else entry[0])
            for (found, entry), layer in zip(rows[path], over_stack[path])
        ]
        for path in rows
    }
    return [*carry, *outs], Reaped(joined, lost)


def _marks(eqn: Any) -> set[str]:
    """The parameters marked inside an equation."""
    return {inner.params["path"] for inner in _equations(eqn) if inner.primitive in (tap_p, lost_p)}


def _equations(eqn: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        for inner in getattr(leaf, "eqns", ()):
            yield inner
            yield from _equations(inner)
