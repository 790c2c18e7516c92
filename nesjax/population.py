"""What a population is: its size, its std, and which noise each parameter gets, by rules over paths."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .checks import NNX_SPLIT, positive_int
from .layers import LayerHint, layer_hints
from .noise import LowRank, NoiseFamily
from .paths import check_arrays, check_rules_used, checked_rules, matching, named_leaves, running_statistics


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A rule: the parameter is not perturbed and its gradient is zero. An integer parameter must be frozen.

    `make_train_step` never moves it. In a loop of your own, an optimizer with weight decay does, unless it is masked.

    Example:
      >>> Population(size=8, std=0.1, noise={"bias": Frozen()}).noise  # all biases; the rest gets the default
      (('bias', Frozen()),)
    """


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A rule: some axes stack independent parameters (scanned layers, experts), each with its own noise.

    Args:
      family: the noise of each stacked parameter; None for the layer's own family or the default.
      axes: the number of stack axes, at least 1. They stand side by side.
      first: the first of them: 0, or 1 for layers stacked along the second axis.

    Raises:
      TypeError: `family` is not a noise family.
      ValueError: `axes` is not a whole number of at least 1, or `first` of at least 0.

    Example:
      >>> Population(size=8, std=0.1, noise={"blocks": Stacked(LowRank(2))}).noise  # as `lax.scan` over blocks has them
      (('blocks', Stacked(family=LowRank(rank=2, values='rademacher'), axes=1, first=0)),)
    """

    family: NoiseFamily | None = None
    axes: int = 1
    first: int = 0

    def __post_init__(self):
        if self.family is not None and not isinstance(self.family, NoiseFamily):
            raise TypeError(f"Stacked family must be a noise family or None, got {self.family!r}.")
        positive_int("Stacked axes", self.axes)
        positive_int("Stacked first", self.first, least=0)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a tree and its noise: `family=None` if frozen, `axes` stack axes from axis `first`."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    family: NoiseFamily | None
    axes: int
    first: int = 0

    @property
    def stack(self) -> tuple[int, ...]:
        return self.shape[self.first : self.first + self.axes]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of one `E_i`, which is that of one entry of the stack."""
        return self.shape[: self.first] + self.shape[self.first + self.axes :]

    @property
    def permutation(self) -> tuple[int, ...]:
        """Of the axes as they are computed with, the stack in front, to the parameter's own."""
        stack, rest = range(self.axes), range(self.axes, len(self.shape))
        return (*rest[: self.first], *stack, *rest[self.first :])

    @property
    def on_outputs(self) -> bool:
        """Whether its noise is on the outputs of products, not on the parameter."""
        return self.family is not None and self.family.on_outputs

    @property
    def words(self) -> int:
        """Number of random words in one member's part, over the whole stack; 0 if it isn't made of words."""
        return self._words("words", "sample_member")

    @property
    def shared_words(self) -> int:
        """As `words`, of the part that members share."""
        return self._words("shared_words", "sample_shared")

    def _words(self, count: str, sample: str) -> int:
        """As the family counts them; 0 where a class that was made from it draws by `sample` instead."""
        for kind in type(self.family).__mro__ if self.family is not None else ():
            if count in vars(kind):
                return math.prod(self.stack) * getattr(self.family, count)(self.noise_shape)
            if sample in vars(kind):
                break
        return 0

    def over_stack(self, fn: Callable, key: jax.Array):
        """Calls `fn(key)` for each entry of the stack, with a key of its own; stack axes lead."""
        for size in reversed(self.stack):
            fn = jax.vmap(lambda key, i, fn=fn: fn(jax.random.fold_in(key, i)), in_axes=(None, 0))
            fn = lambda key, fn=fn, size=size: fn(key, jnp.arange(size))
        return fn(key)


def alike(leaves: Sequence[Leaf]) -> list[list[int]]:
    """The places of vectors that differ in their paths alone, of which one vmapped call computes something.

    A program then grows less with the network's depth. Every other leaf has a place of its own: computed in one call,
    matrices would run slower and take more memory.
    """
    places: dict[Any, list[int]] = {}
    for at, leaf in enumerate(leaves):
        vector = leaf.family is not None and len(leaf.noise_shape) < 2
        places.setdefault(dataclasses.replace(leaf, path="") if vector else at, []).append(at)
    return list(places.values())


@dataclasses.dataclass(frozen=True)
class Population:
    """A population of perturbed networks. Hashable.

    Args:
      size: N, the number of members per generation. With `antithetic` it must be even, for N / 2 directions.
      std: standard deviation of each weight's perturbation, in the weight's units: a float, an optax schedule of the
        step, or rules `{regex: either}` over parameter paths.
      antithetic: whether members 2j and 2j + 1 get opposite noise.
      group_size: g, the number of consecutive members that share one slice of the mapped arguments; baselines and
        shaping are then taken within each group. None (or 1): each member gets its own slice, and the whole population
        is one group.
      noise: the family of every parameter, or rules `{regex: family, Frozen() or Stacked(family)}`, searched for in the
        parameter's path ("params/Dense_0/kernel"). The first rule that matches beats a layer's own family, which beats
        the default, `LowRank()`.
      chunk_size: number of members evaluated at a time (on each device), which bounds memory; None for all.
      layers: what `for_model` found.

    Raises:
      ValueError or TypeError: a setting makes no sense; the message names it.

    Example:
      >>> Population(size=7, std=0.1, antithetic=True)
      Traceback (most recent call last):
      ...
      ValueError: size must be even with antithetic=True, got 7.
    """

    size: int
    std: Any
    _: dataclasses.KW_ONLY
    antithetic: bool = False
    group_size: Any = None  # an int from here on
    noise: Any = LowRank()  # noqa: RUF009 (frozen)
    chunk_size: int | None = None
    layers: tuple[LayerHint, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        object.__setattr__(self, "group_size", 1 if self.group_size is None else self.group_size)
        for name in ("size", "group_size", "chunk_size"):
            value = getattr(self, name)
            if (name, value) != ("chunk_size", None):
                object.__setattr__(self, name, positive_int(name, value))
        if self.antithetic and self.size % 2:
            raise ValueError(f"size must be even with antithetic=True, got {self.size}.")
        group = int(self.group_size or 1)
        if self.size % group:
            raise ValueError(f"group_size must divide size {self.size}, got {group}.")
        if self.antithetic and group > 1 and group % 2:
            raise ValueError(f"group_size must be 1 or even with antithetic=True, got {self.group_size}.")
        object.__setattr__(self, "noise", checked_rules("noise", self.noise, _check_noise))
        object.__setattr__(self, "std", checked_rules("std", self.std, _check_std))

    def for_model(self, model: nn.Module, *example_args: Any, **kwargs: Any) -> Population:
        """Adds the families and stack axes of a Flax Linen model's layers, found by tracing `init`.

        Args:
          model: a Linen module; stacked layers of other libraries are declared by rules with `Stacked`.
          *example_args: what `model.init` takes after the keys (arrays or shapes).
          **kwargs: further arguments of `model.init`.

        Returns:
          A new population.

        Raises:
          TypeError: `model` is not a Linen module.
        """
        return dataclasses.replace(self, layers=layer_hints(model, *example_args, **kwargs))

    def leaves(self, params: Any) -> tuple[Leaf, ...]:
        """Resolves the noise of each parameter of a tree, in the order of `jax.tree.leaves`.

        Args:
          params: a tree of arrays.

        Returns:
          One `Leaf` per parameter.

        Raises:
          ValueError or TypeError: a rule matches nothing, a family doesn't fit a shape, or a leaf can't be perturbed.
        """
        named = named_leaves(params)
        if not named:
            raise ValueError("params has no leaves: there is nothing to perturb.")
        check_arrays(named)
        check_rules_used("noise", self.noise, named)
        check_rules_used("std", self.std, named)
        leaves = tuple(self._leaf(path or "params", leaf) for path, leaf in named)
        perturbed = {leaf.path for leaf in leaves if leaf.family is not None}
        if not perturbed:
            raise ValueError(f"noise freezes every parameter, so there is nothing to train, got {self.noise!r}.")
        if statistics := sorted(perturbed & running_statistics(params)):
            raise ValueError(
                f"params must hold no running statistics, got {statistics[0]}: they would be perturbed and trained. "
                f'Take Linen\'s variables["params"], split an NNX model ({NNX_SPLIT}), or freeze them by a rule.'
            )
        return leaves

    def _leaf(self, path: str, leaf: Any) -> Leaf:
        known = [layer for layer in self.layers if f"/{layer.path}/" in f"/{path}/"]
        layer = max(known, key=lambda layer: len(layer.path), default=LayerHint(path, None, 0, 0))
        rule = matching(self.noise, path)
        shape, dtype, axes, first = jnp.shape(leaf), jnp.result_type(leaf), layer.axes, layer.first
        if isinstance(rule, Frozen):
            return Leaf(path, shape, dtype, None, 0)
        if isinstance(rule, Stacked):
            rule, axes, first = rule.family, rule.axes, rule.first
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {path} must be floating, got {dtype}: leave it out of params (of an NNX model: "
                f"{NNX_SPLIT}) or freeze it with the rule {{{path!r}: nesjax.Frozen()}}."
            )
        if first + axes > len(shape):
            raise ValueError(f"parameter {path} must have {axes} stack axes from axis {first}, got shape {shape}.")
        default = self.noise if isinstance(self.noise, NoiseFamily) else LowRank()
        family = rule or layer.family or default
        try:
            family = family.for_shape(shape[:first] + shape[first + axes :])
        except ValueError as error:
            raise ValueError(f"parameter {path} of shape {shape}: {error}") from None
        return Leaf(path, shape, dtype, family, axes, first)

    @property
    def signs(self) -> int:
        """Number of members per direction: 2 with antithetic partners, else 1."""
        return 2 if self.antithetic else 1


def _check_noise(rule: Any, where: str) -> None:
    if not isinstance(rule, NoiseFamily | Frozen | Stacked):
        raise TypeError(f"{where} must be a noise family (nesjax.LowRank() ...), Frozen or Stacked, got {rule!r}.")
    try:
        hash(rule)
    except TypeError as error:
        raise TypeError(
            f"{where} must be hashable (tuples in place of lists or arrays), got {rule!r}: {error}."
        ) from None


def _check_std(value: Any, where: str) -> None:
    if not callable(value) and not (isinstance(value, numbers.Real) and 0 < float(value) < math.inf):
        raise ValueError(f"{where} must be a finite number > 0 or a schedule of the step, got {value!r}.")
