"""Training that is killed over and over, also while it saves: what lies on the disk is whole, and training goes on."""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from faults import MOMENTS, kill

from .tables import markdown


def cases(quick: bool) -> list[dict]:
    """Each goes on in one folder of its own."""
    return [
        {"every": every, "kills": 2 if quick else 10, "seed": every} for every in ((1,) if quick else (1, 2, 3, 5, 8))
    ]


def measure(every: int, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        yield from kill(pathlib.Path(folder), kills, every, seed)


def table(results: dict) -> str:
    chains = {}
    for row in results["rows"]:
        chains.setdefault(row["every"], []).append(row)
    rows = [
        [f"{every}", f"{len(chain)}", *(f"{sum(row['killed'] == moment for row in chain)}" for moment in MOMENTS),
         f"{len(chain)}", f"{max(row['lost'] for row in chain)}", f"{chain[-1]['restored']:,}"]
        for every, chain in chains.items()
    ]  # fmt: skip
    header = ["saved every", "kills", *MOMENTS, "went on exactly", "most steps lost", "steps reached"]
    return markdown(header, rows)
