"""Flax Linen layers that name their noise family.

Each is the plain Flax module, with its parameter names, shapes, initial values and outputs, plus a field `noise`:
a family, or None for the population's default. The field does nothing by itself: `Population.for_model` reads it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from .noise import NoiseFamily
from .paths import named_leaves


class Dense(nn.Dense):
    """`flax.linen.Dense` with a noise family.

    Attributes:
      noise: the family of kernel and bias; None for the population's default.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> layer = nesjax.Dense(3, noise=nesjax.Permuted(in_sparsity=0.5))
      >>> population = nesjax.Population(size=8, std=0.1).for_model(layer, jnp.ones((1, 4)))
      >>> [(layer.path, layer.family.in_sparsity) for layer in population.layers]
      [('bias', 0.5), ('kernel', 0.5)]
    """

    noise: NoiseFamily | None = None


class Conv(nn.Conv):
    """`flax.linen.Conv` with a noise family.

    Attributes:
      noise: the family of kernel and bias; None for the population's default.

    Example:
      >>> import nesjax
      >>> Conv(8, (3, 3), noise=nesjax.SignFlip()).noise
      SignFlip(axis='both', values='rademacher')
    """

    noise: NoiseFamily | None = None


class Embed(nn.Embed):
    """`flax.linen.Embed` with a noise family.

    Attributes:
      noise: the family of the table; None for the population's default.

    Example:
      >>> import nesjax
      >>> Embed(100, 8, noise=nesjax.LowRank(2)).noise
      LowRank(rank=2, values='rademacher')
    """

    noise: NoiseFamily | None = None


class Scale(nn.Module):
    """Scales and shifts each feature, `x * scale + bias`, as a normalisation does last. NESgpu's PerturbedAffine.

    Shapes: `x: [..., F] -> [..., F]`; parameters `scale: [F]` (ones) and `bias: [F]` (zeros).

    Attributes:
      dtype: of the computation; None for that of inputs and parameters.
      param_dtype: of the parameters.
      noise: the family of scale and bias; None for the population's default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = Scale().init(jax.random.key(0), jnp.ones((2, 3)))["params"]
      >>> sorted(params)
      ['bias', 'scale']
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32
    noise: NoiseFamily | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        return x * scale + bias


@dataclasses.dataclass(frozen=True)
class LayerHint:
    """What a model's layers say about one parameter: its family, if the layer names one, and its stack axes.

    Attributes:
      path: the parameter's name.
      family: the noise family that the layer names, or None.
      axes: the number of stack axes.
      first: the first of them.
    """

    path: str
    family: NoiseFamily | None
    axes: int
    first: int


def layer_hints(model: nn.Module, *example_args: Any, **kwargs: Any) -> tuple[LayerHint, ...]:
    """Collects the hints of a Linen model's layers, one per parameter, by tracing `model.init`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}: use rules in `noise` instead.")
    found: dict[str, tuple[NoiseFamily | None, tuple[int, ...]]] = {}  # family, and shape inside any nn.scan

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        for path, leaf in named_leaves(nn.unbox(context.module.variables.get("params", {}))):
            name = "/".join((*context.module.path, path))
            family = None if "/" in path else _family_of(context.module, name)
            known = found.get(name, (None, leaf.shape))
            found[name] = family or known[0], min(known[1], leaf.shape, key=len)
        return out

    leaves, treedef = jax.tree.flatten(example_args)  # flags and other plain values stay what they are
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def init(*arrays):
        arrays = iter(arrays)
        args = treedef.unflatten([next(arrays) if array else leaf for leaf, array in zip(leaves, is_array)])
        return model.init({name: jax.random.key(0) for name in ("params", "dropout")}, *args, **kwargs)

    with nn.intercept_methods(watch):
        variables = jax.eval_shape(init, *(leaf for leaf, array in zip(leaves, is_array) if array))
    params = named_leaves(nn.unbox(variables.get("params", {})))
    return tuple(_hint(path, leaf.shape, *found.get(path, (None, leaf.shape))) for path, leaf in params)


def _family_of(module: nn.Module, name: str) -> NoiseFamily | None:
    """The family that a layer names for its parameter `name`; None if it names none."""
    family = getattr(module, "noise", None)
    if isinstance(family, NoiseFamily):
        return family
    if family is not None and isinstance(module, Dense | Conv | Embed | Scale):  # elsewhere the field may mean anything
        raise TypeError(f"{name}: the layer's noise must be a noise family or None, got {family!r}.")
    return None


def _hint(path: str, shape: tuple[int, ...], family: NoiseFamily | None, inner: tuple[int, ...]) -> LayerHint:
    axes = len(shape) - len(inner)
    places = [first for first in range(len(inner) + 1) if shape[:first] + shape[first + axes :] == inner]
    if not places:
        raise ValueError(f"{path} of shape {shape} stacks layers of shape {inner}: its stack axes must be neighbours.")
    return LayerHint(path, family, axes, places[0])
