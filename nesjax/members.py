"""The members of a population: the recipe of their noise, and one member of it.

`Noise` is a recipe, not N arrays: keys, shared parts and std. A member is drawn from (key, i) alone, so the
population's size, its chunks and its devices change nothing. Letters: `N` members, `g` members per group.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .checks import check_params, checked_key, instance_of
from .paths import matching
from .population import Leaf, Population, alike

static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one generation, as a recipe. Made by `sample_noise`.

    Attributes:
      key: what members are drawn from.
      shared: of each parameter, the part its family shares over the population.
      std: of each parameter, its standard deviation, float32.
      population, leaves, treedef: what it was sampled for.

    Example:
      >>> import jax, nesjax
      >>> noise = nesjax.sample_noise(jax.random.key(0), jax.numpy.zeros((4, 3)), nesjax.Population(size=6, std=0.1))
      >>> noise.population.size, noise.leaves[0].shape
      (6, (4, 3))
    """

    key: jax.Array
    shared: tuple[Any, ...]
    std: tuple[jax.Array, ...]
    population: Population = dataclasses.field(metadata=static)
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata=static)
    treedef: Any = dataclasses.field(metadata=static)

    @property
    def on_outputs(self) -> bool:
        """Whether any parameter's noise is on the outputs of products."""
        return any(leaf.on_outputs for leaf in self.leaves)

    def direction(self, j: Any) -> tuple[Any, ...]:
        """Every parameter's own part of direction j, drawn from (key, j) alone."""
        return _direction(self.leaves, self.key, j)

    def check(self, name: str, params: Any) -> None:
        """Raises ValueError if `params` are not what the noise was sampled for."""
        check_params(name, params, self.leaves, self.treedef)


@functools.partial(jax.jit, static_argnums=0)
def _direction(leaves: tuple[Leaf, ...], key: jax.Array, j: Any) -> tuple[Any, ...]:
    """`Noise.direction`, jitted so that a generation, which draws to evaluate and to sum up, traces it once."""
    sample = lambda leaf, key: leaf.family.sample_member(key, j, leaf.noise_shape, leaf.dtype)
    read = lambda leaf, words: leaf.family.from_words(words, leaf.noise_shape)
    return draw(jax.random.fold_in(key, j), leaves, [leaf.words for leaf in leaves], read, sample)


def draw(key: jax.Array, leaves: tuple[Leaf, ...], sizes: list[int], read: Callable, sample: Callable) -> tuple:
    """A part of each leaf: `read(leaf, words)` of its share of random words, which are drawn in one call.

    A leaf whose size is 0 words gets `sample(leaf, key)`, with a key of its own, and a frozen one ().
    """
    words, parts = jax.random.bits(key, (sum(sizes),), jnp.uint32), [()] * len(leaves)
    keyed = any(leaf.family is not None and not size for leaf, size in zip(leaves, sizes))
    keys = jax.random.split(jax.random.fold_in(key, 2**32 - 1), len(leaves)) if keyed else [key] * len(leaves)
    for places in alike(leaves):
        leaf, size = leaves[places[0]], sizes[places[0]]
        if not size:
            for at in places if leaf.family is not None else ():
                parts[at] = leaf.over_stack(functools.partial(sample, leaf), keys[at])
            continue
        mine, words = jnp.split(words, [size * len(places)])
        found = functools.partial(read, leaf)
        for _ in (places, *leaf.stack):
            found = jax.vmap(found)
        found = found(mine.reshape(len(places), *leaf.stack, -1))
        for row, at in enumerate(places):
            parts[at] = jax.tree.map(lambda x: x[row], found)  # noqa: B023
    return tuple(parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Member:
    """The noise of one member. Made by `member`.

    Attributes:
      shared, own, scale: of each parameter, the shared part, the member's own, and std with the member's sign.
      leaves, treedef: what it was sampled for.

    Example:
      >>> import jax, nesjax
      >>> noise = nesjax.sample_noise(jax.random.key(0), jax.numpy.zeros((4, 3)), nesjax.Population(size=6, std=0.5))
      >>> nesjax.member(noise, 2).scale[0].tolist()
      0.5
    """

    shared: tuple[Any, ...]
    own: tuple[Any, ...]
    scale: tuple[jax.Array, ...]
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata=static)
    treedef: Any = dataclasses.field(metadata=static)


def sample_noise(key: jax.Array, params: Any, population: Population, *, step: Any = None, std: Any = None) -> Noise:
    """The noise of one generation.

    Args:
      key: a JAX key; the same key gives the same noise, whatever the population's size.
      params: the parameters to perturb; only their structure, shapes and dtypes count.
      population: size, std and rules.
      step: the step at which schedules in `population.std` are taken.
      std: in place of `population.std`: a number, or a tree of numbers like params; may be traced.

    Returns:
      A `Noise`.

    Raises:
      TypeError: the key is not one, or a parameter is not floating.
      ValueError: no parameters, a rule that matches none, a family that doesn't fit a shape, or a schedule and no step.

    Example:
      >>> import jax, jax.numpy as jnp, nesjax
      >>> params = {"w": jnp.ones((4, 3))}
      >>> noise = nesjax.sample_noise(jax.random.key(0), params, nesjax.Population(size=6, std=0.1))
      >>> nesjax.materialise(params, noise, 5)["w"].shape
      (4, 3)
    """
    key = checked_key(key)
    leaves = instance_of(Population, "population", population).leaves(params)

    stds = [_std(leaf, population, step) for leaf in leaves] if std is None else _given_std(std, params)
    stds = tuple(jnp.asarray(0.0 if leaf.family is None else x, jnp.float32) for leaf, x in zip(leaves, stds))

    sample = lambda leaf, key: leaf.family.sample_shared(key, leaf.noise_shape, leaf.dtype)
    read = lambda leaf, words: leaf.family.shared_from_words(words, leaf.noise_shape, leaf.dtype)
    own, shared = jax.random.split(key)
    parts = draw(shared, leaves, [leaf.shared_words for leaf in leaves], read, sample)
    return Noise(own, parts, stds, population, leaves, jax.tree.structure(params))


def _std(leaf: Leaf, population: Population, step: Any) -> Any:
    """Looks up the std of one parameter in the population's rules."""
    value = matching(population.std, leaf.path)
    if value is None and leaf.family is not None:
        raise ValueError(f"std has no rule that matches parameter {leaf.path}.")
    if callable(value):
        if step is None:
            raise ValueError("std is a schedule, so sample_noise needs step=...")
        value = value(step)
    return value


def _given_std(std: Any, params: Any) -> list[Any]:
    """Turns one scalar, or a tree of scalars like params, into one scalar per parameter."""
    leaves, structure = jax.tree.flatten(std)
    if structure != jax.tree.structure(0) and structure != jax.tree.structure(params):
        raise ValueError(f"std must be a number or a tree of numbers like params, got {structure}.")
    for leaf in leaves:
        if jnp.ndim(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.number):
            raise ValueError(f"std must hold scalars, one for each parameter, got {jnp.shape(leaf)} of {leaf!r}.")
    return leaves if structure == jax.tree.structure(params) else leaves * len(jax.tree.leaves(params))


def with_sign(noise: Noise, own: tuple[Any, ...], sign: Any) -> Member:
    """Makes a member from a direction's own parts and a sign, 1 or -1."""
    return Member(noise.shared, own, tuple(sign * std for std in noise.std), noise.leaves, noise.treedef)


def for_call(noise: Noise, own: tuple[Any, ...], k: Any) -> tuple[Any, ...]:
    """A direction's own parts for call `k` of several: noise on outputs is drawn anew, noise on weights stays."""
    return tuple(
        leaf.family.fold(part, k) if leaf.family is not None and leaf.on_outputs else part
        for leaf, part in zip(noise.leaves, own)
    )


def member(noise: Noise, i: Any) -> Member:
    """The noise of one member: call it inside your own vmap or scan.

    Args:
      noise: the generation's, from `sample_noise`.
      i: the member's number, an int or a traced integer scalar.

    Returns:
      A `Member`, for `perturbed`.

    Raises:
      IndexError: `i` is a Python int outside the population.
      TypeError: `i` is not one integer.

    Example:
      >>> import jax, nesjax
      >>> w = jax.numpy.zeros((4, 3))
      >>> noise = nesjax.sample_noise(jax.random.key(0), w, nesjax.Population(size=6, std=0.1))
      >>> nesjax.perturbed(lambda w, x: x @ w)(w, nesjax.member(noise, 5), jax.numpy.ones(4)).shape
      (3,)
    """
    instance_of(Noise, "noise", noise)
    if not jnp.issubdtype(jnp.result_type(i), jnp.integer) or jnp.ndim(i):
        raise TypeError(f"i must be one integer, got {i!r}.")
    if isinstance(i, numbers.Integral) and not 0 <= int(i) < noise.population.size:
        raise IndexError(f"i must be in [0, {noise.population.size}), the population, got {i}.")
    signs = noise.population.signs
    return with_sign(noise, noise.direction(i // signs), 1 - 2 * (jnp.asarray(i) % signs))


def member_keys(key: jax.Array, population: Population) -> jax.Array:
    """Keys for stochastic losses, to be mapped with `in_axes=0`: one a member, equal within an antithetic pair.

    Args:
      key: a JAX key; it may be the one that `sample_noise` gets.
      population: whose members they are for.

    Returns:
      Keys `[N]`; with `group_size` g > 1 one for each group, `[N / g]`.

    Raises:
      TypeError: `key` is no JAX key, or `population` no `Population`.

    Example:
      >>> import jax, nesjax
      >>> keys = nesjax.member_keys(jax.random.key(0), nesjax.Population(size=4, std=0.1, antithetic=True))
      >>> keys.shape, bool(keys[0] == keys[1]), bool(keys[1] == keys[2])
      ((4,), True, False)
    """
    instance_of(Population, "population", population)
    indices = jnp.arange(population.size // population.group_size)
    if population.group_size == 1:
        indices = indices // population.signs
    key = jax.random.fold_in(checked_key(key), 2**32 - 1)  # apart from what `sample_noise` makes of the same key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
