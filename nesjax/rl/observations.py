"""Observations: trees of arrays of known shapes. Arrays of uint8 are images."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp


def is_shape(shape: Any) -> bool:
    """Whether it is a leaf of a tree of shapes: a tuple of ints, or the `jax.ShapeDtypeStruct` of an image."""
    ints = isinstance(shape, (tuple, list)) and all(isinstance(size, numbers.Integral) for size in shape)
    return ints or isinstance(shape, jax.ShapeDtypeStruct)


def is_image(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.uint8


def checked_shapes(shapes: Any) -> Any:
    """The tree of shapes with tuples for leaves, but where it says that there is an image.

    Raises:
      ValueError: a leaf is no shape, or there is none.
    """
    leaves = jax.tree.leaves(shapes, is_leaf=is_shape)
    if not leaves or not all(map(is_shape, leaves)):
        raise ValueError(
            f"obs_shape must be a tuple of ints, got {shapes!r}: a tree of them where observations are trees, and "
            "jax.ShapeDtypeStruct(shape, jnp.uint8) where they are images."
        )
    bare = lambda shape: shape if is_image(shape) else tuple(getattr(shape, "shape", shape))
    return jax.tree.map(bare, shapes, is_leaf=is_shape)


def check_shapes(must: str, tree: Any, shapes: Any) -> None:
    """Raises ValueError, which begins with `must`, unless `tree` has this tree of shapes."""
    wanted = jax.tree.map(lambda shape: tuple(getattr(shape, "shape", shape)), shapes, is_leaf=is_shape)
    came = jax.tree.map(jnp.shape, tree)
    if jax.tree.flatten(came, is_leaf=is_shape) != jax.tree.flatten(wanted, is_leaf=is_shape):
        raise ValueError(f"{must} {wanted}, got {came}.")


def shapes_of_numbers(shapes: Any) -> Any:
    """The tree of shapes with () for each image."""
    return jax.tree.map(lambda shape: () if is_image(shape) else shape, shapes, is_leaf=is_shape)


def as_float32(obs: Any) -> Any:
    """`obs` with its images as they are."""
    return jax.tree.map(lambda x: x if is_image(x) else jnp.asarray(x, jnp.float32), obs)


def scaled(obs: Any) -> Any:
    """`obs` with its images between 0 and 1."""
    return jax.tree.map(lambda x: x / jnp.float32(255) if is_image(x) else x, obs)


def is_finite(obs: Any) -> jax.Array:
    """Whether all of an observation is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(obs)]).all()


def shapes_of(space: Any, name: str) -> Any:
    """`Environment.obs_shape` of a Gymnasium or gymnax space: Dict and Tuple spaces are trees."""
    parts = getattr(space, "spaces", None)
    if isinstance(parts, dict):
        return {key: shapes_of(part, name) for key, part in parts.items()}
    if isinstance(parts, (tuple, list)):
        return tuple(shapes_of(part, name) for part in parts)
    shape = getattr(space, "shape", None)
    if not isinstance(shape, tuple):
        raise ValueError(f"{name} must have observations that are arrays or Dict or Tuple spaces of them, got {space}.")
    return jax.ShapeDtypeStruct(shape, jnp.uint8) if is_image(space) else shape
