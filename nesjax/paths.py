"""Parameters by name: the paths of a tree's leaves, and rules by regular expression over them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

from .noise import NoiseFamily


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Lists the leaves of a tree with their paths, as "a/b/c"."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def check_arrays(named: list[tuple[str, Any]]) -> None:
    """Raises TypeError for a leaf that is not an array or a number."""
    for path, leaf in named:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise TypeError(
                f"parameter {path or 'params'} must be an array, got {leaf!r}. Split a model that holds functions, as "
                "Equinox's do: params, static = eqx.partition(model, eqx.is_inexact_array), and put it together in the "
                "loss: eqx.combine(params, static)."
            )


def running_statistics(tree: Any) -> set[str]:
    """Finds the paths of what batch normalisation updates by itself: Linen's batch_stats and NNX's BatchStat."""

    def is_statistic(node: Any) -> bool:
        return type(node).__name__ == "BatchStat"

    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_statistic)[0]
    found = set()
    for path, node in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_statistic(node):
            found |= {f"{name}/{inner}".rstrip("/") for inner, _ in named_leaves(node)}
        elif "batch_stats" in name.split("/"):
            found.add(name)
    return found


def checked_rules(name: str, value: Any, check: Callable) -> Any:
    """Checks one value, or rules, which become a hashable tuple of (regex, value)."""
    if isinstance(value, dict):
        value = tuple(value.items())
    if not isinstance(value, tuple):
        if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0 and not isinstance(value, jax.core.Tracer):
            value = float(value)
        check(value, name)
        return value
    for item in value:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(f"{name} given as rules must map regular expressions to values, got {item!r}.")
        pattern, rule = item
        check(rule, f"{name}[{pattern!r}]")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} has the rule {pattern!r}, which is not a regular expression: {error}.") from None
    return value


def matching(rules: Any, path: str) -> Any:
    """The value of the first rule whose pattern matches `path`, or None.

    A bare value applies to every path, except a bare noise family, which is only the default: it gives None.
    """
    if not isinstance(rules, tuple):
        return None if isinstance(rules, NoiseFamily) else rules
    return next((rule for pattern, rule in rules if re.search(pattern, path)), None)


def check_rules_used(name: str, rules: Any, named: list[tuple[str, Any]]) -> None:
    """Raises ValueError for a rule that decides nothing: it matches no parameter, or only those of earlier rules."""
    left = [path for path, _ in named]
    for pattern, _ in rules if isinstance(rules, tuple) else ():
        if not any(re.search(pattern, path) for path, _ in named):
            paths = ", ".join(path for path, _ in named)
            raise ValueError(f"{name} has the rule {pattern!r}, which matches no parameter; there are: {paths}.")
        rest = [path for path in left if not re.search(pattern, path)]
        if len(rest) == len(left):
            raise ValueError(
                f"{name} has the rule {pattern!r}, but earlier rules match all that it matches: put it first."
            )
        left = rest
