"""What a folder's run was begun with: its id, and which checkpoints it keeps."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from .description import sealed, unsealed


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads the record; nothing if there is none."""
    return unsealed(json.loads(path.read_text())) if path.exists() else {}


def write(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the record, whole or not at all."""
    begun = path.with_suffix(f"{path.suffix}.tmp")
    begun.write_text(json.dumps(sealed(settings)))
    begun.replace(path)


def check(record: dict[str, Any], keep: int | None, best: str | None, steps: list[int], folder: pathlib.Path) -> None:
    """Raises ValueError if `keep` or `best` would delete checkpoints that are kept so far."""
    names = f"checkpoints {steps} in {folder}"
    kept = record.get("keep")
    if keep is not None and keep < (math.inf if kept is None else kept) and len(steps) > keep:
        so_far = "all" if kept is None else kept
        raise ValueError(f"keep={keep} would delete some of the {names}, where {so_far} are kept so far.")
    if record.get("best") not in (None, best) and steps:
        raise ValueError(
            f"best={best!r} would delete one of the {names}: the lowest {record['best']!r} is kept so far."
        )
