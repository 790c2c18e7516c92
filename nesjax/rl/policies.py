"""A policy as it plays: what it remembers, and how an action is chosen from what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .obs_stats import ObsStats
from .observations import scaled


def _described(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)


@dataclasses.dataclass(frozen=True)
class Player:
    """A policy in an environment: see `rollout` for the arguments.

    Args:
      action: `(output, state, key) -> action`, as `Environment.action`.

    Raises:
      TypeError: a policy that is none, or a carry that is not made of arrays.
    """

    action: Callable
    policy: Callable
    carry: Any = None
    sample: bool = False

    def __post_init__(self):
        if not callable(self.policy):
            raise TypeError(f"policy must be a function of (params, obs), got {type(self.policy).__name__}.")
        try:
            # With dtypes of their own: a Python number's changes with what is added to it.
            carry = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), self.carry)
        except TypeError as error:
            raise TypeError(f"carry must be a tree of arrays, got {self.carry!r}.") from error
        object.__setattr__(self, "carry", carry)

    def act(
        self, params: Any, carry: Any, obs: Any, obs_stats: ObsStats | None, key: jax.Array, state: Any = None
    ) -> tuple[Any, jax.Array]:
        """`(carry, action)` after one more observation; `key` is for `sample`, `state` for what is legal.

        Raises:
          TypeError: a policy with a carry doesn't return `(carry, output)`.
          ValueError: the carry or the output has another tree, shape or dtype than it must.
        """
        obs = scaled(obs) if obs_stats is None else obs_stats.normalise(obs)
        if self.carry is None:
            output = self.policy(params, obs)
        else:
            before, out = _described(carry), self.policy(params, carry, obs)
            if not isinstance(out, tuple) or len(out) != 2:
                got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
                raise TypeError(f"policy must return (carry, output) where there is a carry, got {got}.")
            carry, output = out
            if _described(carry) != before:
                raise ValueError(
                    f"policy must return a carry like the one it is given, {before}, got {_described(carry)}."
                )
        return carry, self.action(output, state, key if self.sample else None)
