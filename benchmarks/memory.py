"""Peak memory of a generation against N: measured in a process of its own, and as XLA computes it beforehand.

The setting is that of `peers`, one sample per member.
"""

from collections.abc import Iterator

from .measure import in_own_process
from .peers import CHUNK, peak, setting
from .tables import count, pivot

MATRIX = ("evosax Open_ES", "vmap over Gaussian parameters")  # hold N x parameters numbers, several times over
LARGEST = 4096  # of those: more doesn't fit everywhere


def cases(quick: bool) -> list[dict]:
    sizes = (64,) if quick else (256, 1024, 4096, 16384, 65536)
    chosen = ("nesjax",) if quick else ("nesjax", f"nesjax, chunk_size={CHUNK}", *MATRIX)
    return [
        {"method": method, "members": members}
        for method in chosen
        for members in sizes
        if members <= LARGEST or method not in MATRIX
    ]


def measure(method: str, members: int) -> Iterator[dict]:
    yield {
        "temp_bytes": setting(method, members, 1).temp_bytes,
        "peak_bytes": in_own_process(peak, method, members, 1),
    }


def table(results: dict) -> str:
    """Measured peak and, in brackets, XLA's figure for temporary memory, by method and N."""
    value = lambda row: f"{count(row['peak_bytes'])} ({count(row['temp_bytes'])})"
    return pivot(results["rows"], "method", lambda row: f"N = {row['members']:,}", value)
