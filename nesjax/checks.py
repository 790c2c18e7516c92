"""Checks of arguments: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import flax.errors
import jax
import jax.numpy as jnp

T = TypeVar("T")
MADE_BY = {"Noise": "come from nesjax.sample_noise", "Member": "come from nesjax.member(noise, i)"}
BASELINES = (None, "mean", "leave_one_out", "unperturbed")

NNX_SPLIT = (
    "graph, weights, rest = nnx.split(model, nnx.Param, ...), and in the loss "
    "nnx.merge(graph, weights, rest, copy=True)"
)
OUTSIDE = (
    "compute with JAX alone, but made a NumPy array or a Python number of a traced value. What runs outside JAX "
    "(NumPy, scikit-learn, a simulator) takes the outputs of nesjax.population_apply and gives its losses to "
    "nesjax.estimate_gradient"
)
REMEDIES = {  # what a function must do, by what it raised
    jax.errors.TracerBoolConversionError: "not branch in Python on what depends on params or arguments (if, while, "
    "and, or): use jnp.where, jax.lax.cond or jax.lax.while_loop",
    jax.errors.TracerArrayConversionError: OUTSIDE,
    jax.errors.ConcretizationTypeError: OUTSIDE,
    flax.errors.TraceContextError: f"change no NNX model but a copy of its own: {NNX_SPLIT}",
}


def traced(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`; what JAX and Flax refuse to trace is refused with a remedy."""
    try:
        return fn(*args)
    except tuple(REMEDIES) as error:
        remedy = next(remedy for kind, remedy in REMEDIES.items() if isinstance(error, kind))
        raise TypeError(f"the function must {remedy}. The error: {error}") from error
    except ValueError as error:
        if "number of leaves" in str(error):  # nnx.merge's, where a part is left out
            error.add_note(f"An NNX model is put together from all its parts: {NNX_SPLIT}.")
        raise


def one_of(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_fused(family: Any, signs: bool) -> None:
    """Raises ValueError unless a noise family may be `fused`: the kernel is for one product of signs."""
    name = type(family).__name__
    one_of(f"{name} fused", family.fused, (False, True))
    if family.fused and not signs:
        raise ValueError(f"{name} fused=True needs values='rademacher' (and rank=1), got {family!r}.")


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; raises ValueError unless it is a whole number of at least 1 (or `least`)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")
    return int(value)


def instance_of(kind: type[T], name: str, value: Any) -> T:
    """`value`; raises TypeError unless it is a `kind`, a class of this package."""
    if not isinstance(value, kind):
        must = MADE_BY.get(kind.__name__, f"be a nesjax.{kind.__name__}")
        raise TypeError(f"{name} must {must}, got {type(value).__name__}.")
    return value


def checked_key(key: Any) -> jax.Array:
    """`key` as one typed threefry key, whose values don't depend on batching.

    Raises:
      TypeError: it is not a JAX key (`jax.random.key(seed)`, or a legacy `jax.random.PRNGKey(seed)`).
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    legacy = hasattr(key, "dtype") and key.dtype == jnp.uint32 and jnp.shape(key) == (2,)
    if not (typed and key.ndim == 0) and not legacy:
        what = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") else repr(key)
        raise TypeError(f"key must be one JAX key, as jax.random.key(seed) makes, got {what}.")
    if legacy:
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if str(jax.random.key_impl(key)) in ("fry", "threefry2x32"):
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,)), impl="threefry2x32")


def checked_losses(name: str, values: Any, size: int) -> jax.Array:
    """`values: [N]` in at least float32; raises ValueError for another shape, TypeError for complex numbers."""
    values = jnp.asarray(values)
    if values.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), one per member, got {values.shape}.")
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {values.dtype}.")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError unless `optimizer` is one of optax's."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        hint = ": it was not called" if callable(optimizer) else ""
        raise TypeError(f"optimizer must be an optax optimizer, as optax.adam(1e-2) makes, got {optimizer!r}{hint}.")


def check_options(shaping: Any, baseline: Any) -> None:
    """Raises for a baseline or shaping that doesn't exist, and for a baseline that the shaping would ignore."""
    if shaping is not None and baseline == "leave_one_out":
        raise ValueError(
            'baseline must not be "leave_one_out" with a shaping, which centers the losses in its own way.'
        )
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}.")
    if shaping is not None and not callable(shaping):
        raise TypeError(f"shaping must be None or a function of losses (nesjax.centered_rank ...), got {shaping!r}.")


def check_params(name: str, params: Any, leaves: tuple, treedef: Any) -> None:
    """Raises ValueError unless `params` has the structure, shapes and dtypes for which the noise was sampled."""
    structure = jax.tree.structure(params)
    if structure != treedef:
        raise ValueError(f"{name} must have the structure that the noise was sampled for, {treedef}, got {structure}.")
    for leaf, array in zip(leaves, jax.tree.leaves(params)):
        if (jnp.shape(array), jnp.result_type(array)) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{name}: the noise was sampled for {leaf.path} as {leaf.dtype}{list(leaf.shape)}, "
                f"got {jnp.result_type(array)}{list(jnp.shape(array))}."
            )
