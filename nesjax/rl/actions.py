"""Kinds of actions: what a policy returns for each, and the action that this means, the preferred one or one drawn.

Letters: `A` actions or their numbers.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import positive_int


class Actions(abc.ABC):
    """A kind of actions. `masked`: a policy's output has a number per action, so that illegal ones can be left out."""

    masked: ClassVar[bool]

    @abc.abstractmethod
    def outputs(self, drawn: bool) -> tuple[str, tuple]:
        """Says what the policy must return, in words, and the shapes that this may have."""

    @abc.abstractmethod
    def choose(self, output: Any, key: jax.Array | None) -> jax.Array:
        """Chooses the action that the output prefers, or with a key draws one."""

    def action(self, output: Any, name: str, key: jax.Array | None = None, legal: Any = None) -> jax.Array:
        """The action that a policy's output means in the environment `name`, of the `legal` ones if there is a mask.

        Raises:
          ValueError: `output` has another shape.
        """
        what, shapes = self.outputs(drawn=key is not None)
        if (came := jax.tree.map(jnp.shape, output)) not in shapes:
            raise ValueError(f"policy must return {what} of {name}, shape {shapes[0]}, got {came}.")
        return self.choose(output if legal is None else jnp.where(legal, output, -jnp.inf), key)


@dataclasses.dataclass(frozen=True)
class Discrete(Actions):
    """One of A actions, numbered from 0. The policy returns a preference for each, `[A]`: the logarithm of its odds."""

    count: int
    masked = True

    def outputs(self, drawn: bool) -> tuple[str, tuple]:
        return "a preference for each action", ((self.count,),)

    def choose(self, output: jax.Array, key: jax.Array | None) -> jax.Array:
        return output.argmax(-1) if key is None else jax.random.categorical(key, output)


@dataclasses.dataclass(frozen=True)
class Box(Actions):
    """Numbers between `low` and `high`. The policy returns them, or their mean and log-std, both of their shape."""

    low: Any
    high: Any
    masked = False

    def outputs(self, drawn: bool) -> tuple[str, tuple]:
        shape = np.shape(self.low)
        if drawn:
            return "the mean and log-std of an action", ((shape, shape),)
        return "an action", (shape, (shape, shape))

    def choose(self, output: Any, key: jax.Array | None) -> jax.Array:
        action = output[0] if isinstance(output, tuple) else output
        if key is not None:
            action += jnp.exp(output[1]) * jax.random.normal(key, jnp.shape(action))
        return jnp.clip(action, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class MultiDiscrete(Actions):
    """Several choices at a time, as Gymnasium's: `Environment(..., actions=MultiDiscrete((2, 3)))`.

    The policy returns the preferences of all choices in a row, `[5]` here; an action is an int32 array like `counts`.

    Args:
      counts: how many actions each choice has; ints in a tuple or an array.

    Raises:
      ValueError: counts that are not ints of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> MultiDiscrete((2, 3)).choose(jnp.array([0.0, 1, 5, 7, 6]), None).tolist()
      [1, 1]
    """

    counts: Any
    masked = True

    def __post_init__(self):
        counts = np.asarray(self.counts)
        if not counts.size or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 1:
            raise ValueError(f"counts must be ints >= 1, got {self.counts!r}.")
        object.__setattr__(self, "counts", counts)

    def outputs(self, drawn: bool) -> tuple[str, tuple]:
        return "the preferences of all choices", ((int(self.counts.sum()),),)

    def choose(self, output: jax.Array, key: jax.Array | None) -> jax.Array:
        parts = jnp.split(output, np.cumsum(self.counts)[:-1])
        keys = [None] * len(parts) if key is None else jax.random.split(key, len(parts))
        chosen = [Discrete(part.size).choose(part, key) for part, key in zip(parts, keys)]
        return jnp.stack(chosen).reshape(self.counts.shape)


@dataclasses.dataclass(frozen=True)
class MultiBinary(Actions):
    """Several switches at a time, as Gymnasium's: `Environment(..., actions=MultiBinary(4))`.

    The policy returns the logarithm of each one's odds of being on; an action is an int32 array of zeros and ones.

    Args:
      shape: of an action; an int or a tuple of ints.

    Raises:
      ValueError: a shape that is not made of ints of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> MultiBinary(3).choose(jnp.array([-1.0, 2, 0]), None).tolist()
      [0, 1, 0]
    """

    shape: Any
    masked = True

    def __post_init__(self):
        sizes = self.shape if isinstance(self.shape, (tuple, list)) else (self.shape,)
        object.__setattr__(self, "shape", tuple(positive_int("shape", size) for size in sizes))

    def outputs(self, drawn: bool) -> tuple[str, tuple]:
        return "the log-odds of each switch", (self.shape,)

    def choose(self, output: jax.Array, key: jax.Array | None) -> jax.Array:
        on = output > 0 if key is None else jax.random.bernoulli(key, jax.nn.sigmoid(output))
        return on.astype(jnp.int32)


Kind = Discrete | Box | MultiDiscrete | MultiBinary


def kind_of(actions: Any) -> Kind:
    """The kind that `Environment.actions` means.

    Raises:
      ValueError: it is none.
    """
    if isinstance(actions, (MultiDiscrete, MultiBinary)):
        return actions
    if not isinstance(actions, (tuple, list)):
        return Discrete(positive_int("actions (without bounds)", actions))
    if len(actions) != 2 or np.shape(actions[0]) != np.shape(actions[1]):
        raise ValueError(f"actions must be bounds (low, high) of one shape, got {actions!r}.")
    if np.any(np.asarray(actions[0]) > np.asarray(actions[1])):
        raise ValueError(f"actions must be bounds low <= high, got {actions!r}.")
    return Box(*actions)


def actions_of(space: Any, name: str) -> Any:
    """`Environment.actions` of a Gymnasium or gymnax space."""
    if not np.any(getattr(space, "start", 0)):
        if hasattr(space, "nvec"):
            return MultiDiscrete(space.nvec)
        if hasattr(space, "n"):
            shape = getattr(space, "shape", ())
            return MultiBinary(shape) if shape else space.n
    if all(hasattr(space, part) for part in ("low", "high", "shape")):
        return np.broadcast_to(space.low, space.shape), np.broadcast_to(space.high, space.shape)
    kinds = "Discrete (from 0), Box, MultiDiscrete (from 0) or MultiBinary"
    raise ValueError(f"{name} must have {kinds} actions, got {space}: wrap it so that it has.")
