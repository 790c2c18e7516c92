"""Random cases of whatever may be passed: how many gave a right result, how many were refused naming what is wrong.

The cases and what is checked are those of `tests/properties.py`; anything else ends the run with the smallest case.
"""

from collections.abc import Iterator
from typing import Any

from .tables import markdown


def cases(quick: bool) -> list[dict]:
    return [{"seed": seed, "count": 20 if quick else 250} for seed in range(1 if quick else 40)]


def measure(seed: int, count: int) -> Iterator[dict[str, Any]]:
    from properties import many  # with hypothesis, which tables don't need

    yield many(count, seed)


def table(results: dict) -> str:
    totals = (sum(row[name] for row in results["rows"]) for name in ("count", "right", "refused"))
    return markdown(["cases", "right", "refused, naming what is wrong"], [[f"{total:,}" for total in totals]])
