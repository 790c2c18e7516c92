"""An hour of training that is saved, resumed and moved to other devices over and over: nothing may grow."""

from collections.abc import Iterator
from typing import Any

from soak import DEVICES, EVERY, check, train

from .measure import in_own_process
from .tables import count, figure, markdown


def cases(quick: bool) -> list[dict]:
    return [{"minutes": 1 if quick else 60}]


def measure(minutes: float) -> Iterator[dict[str, Any]]:
    rows = in_own_process(train, minutes)
    check(rows)
    every = max(1, len(rows) // 60)  # about a row a minute
    yield from [{"round": at, **row} for at, row in enumerate(rows) if at % every == 0 or at == len(rows) - 1]


def table(results: dict) -> str:
    rows = results["rows"]
    shown = [rows[at] for at in sorted({0, len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4, len(rows) - 1})]
    return markdown(
        ["minutes", "steps", "saves", "resumes", "resident memory", "open files", "threads", "compilations"],
        [
            [
                figure(row["seconds"] / 60), f"{row['steps']:,}", f"{row['steps'] // EVERY:,}",
                f"{(row['round'] + 1) * len(DEVICES):,}", count(row["resident"]), f"{row['files']}",
                f"{row['threads']}", f"{row['compilations']}",
            ]
            for row in shown
        ],
    )  # fmt: skip
