"""Which parameters a function forms as a whole for every member, and the user's line that does it."""

from __future__ import annotations

import pathlib
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

PACKAGE = str(pathlib.Path(__file__).parent)
INSTALLED = (PACKAGE, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
Line = tuple[str, int]  # file and number


class MaterialiseWarning(UserWarning):
    """A perturbed parameter met an operation that needs it dense. The result is right, but every member has a copy."""


class Formed:
    """What one evaluation forms: one warning at its end, an error at once if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.jaxpr: Any = None
        self.found: dict[tuple[str, str], tuple[str, Line]] = {}

    @contextmanager
    def during(self, jaxpr: Any) -> Iterator[None]:
        """The evaluation of a jaxpr. It warns at the line that forms the first parameter."""
        self.jaxpr = jaxpr
        yield
        if self.found:
            text = "\n  ".join(["Formed as a whole for every member:", *(text for text, _ in self.found.values())])
            _, line = next(iter(self.found.values()))
            warnings.warn_explicit(text, MaterialiseWarning, *line)

    def add(self, path: str, operation: str, size: int) -> None:
        """Notes a parameter of `size` bytes, formed by the equation under evaluation: once per kind of operation."""
        if (path, operation) in self.found:
            return
        line = self._line()
        text = f"{path}: {operation} has no rule for a perturbed parameter ({size:,} bytes each, {line[0]}:{line[1]})"
        if self.strict:
            raise ValueError(f"{text}. strict=True forbids to form it as a whole for every member.")
        self.found[path, operation] = text, line

    def refuse(self, path: str, operation: str, family: Any) -> NoReturn:
        """Raises for a parameter whose noise is on the outputs of products and that meets anything else."""
        line = self._line()
        raise ValueError(
            f"{path}: {family} perturbs the outputs of products, but met {operation} ({line[0]}:{line[1]}). Give this "
            "parameter a noise on weights by a rule (nesjax.LowRank()), or freeze it."
        )

    def _line(self) -> Line:
        # JAX evaluates an equation under the traceback of the line that made it, and so does what is traced meanwhile.
        (equation,) = jax.make_jaxpr(lambda x: -x)(0.0).eqns
        source = equation.source_info.traceback
        stack = ((frame.filename, frame.lineno or 1) for frame in reversed(traceback.extract_stack()))
        call = next((line for line in stack if not line[0].startswith(INSTALLED)), ("<unknown>", 1))
        return _line_of(source) or _line_around(source, self.jaxpr, None) or call


def _line_of(source: Any) -> Line | None:
    """The innermost line of a traceback outside installed packages; None if it only leads back to nesjax."""
    for frame in source.frames if source else ():
        if frame.file_name.startswith(PACKAGE):
            return None
        if not frame.file_name.startswith(INSTALLED):
            return frame.file_name, frame.line_num
    return None


def _line_around(source: Any, jaxpr: Any, outer: Line | None) -> Line | None:
    """The user's line nearest around the equation of `source`, whose traceback ends where a jit or a scan begins."""
    for equation in jaxpr.eqns:
        line = _line_of(equation.source_info.traceback) or outer
        if equation.source_info.traceback == source:
            return line
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            found = _line_around(source, inner, line) if hasattr(inner, "eqns") else None
            if found:
                return found
    return None
