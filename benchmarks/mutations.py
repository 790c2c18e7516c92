"""A checkpoint damaged in every file, a thousand times: what is restored is right, or it is refused."""

import pathlib
import tempfile
from collections.abc import Iterator

from mutations import mutate

from .tables import markdown


def cases(quick: bool) -> list[dict]:
    return [{"seed": seed, "count": 20 if quick else 250} for seed in range(1 if quick else 4)]


def measure(seed: int, count: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        yield from mutate(pathlib.Path(folder), count, seed)


def table(results: dict) -> str:
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in results["rows"]):
        outcomes = [row["outcome"] for row in results["rows"] if row["kind"] == kind]
        other = [outcome for outcome in outcomes if outcome not in ("right", "refused")]
        rows.append(
            [kind, f"{len(outcomes)}", *(f"{outcomes.count(o)}" for o in ("right", "refused")), f"{len(other)}"]
        )
    return markdown(["damage to one file", "times", "restored to the bit", "refused", "anything else"], rows)
