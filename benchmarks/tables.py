"""Rows of results as Markdown tables."""

from collections.abc import Callable, Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pivot(rows: Iterable[dict], index: str, column: Callable[[dict], str], value: Callable[[dict], str]) -> str:
    """A table with a line for each `row[index]` and a column for each `column(row)`, both in order of appearance."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        columns[column(row)] = None
        cells.setdefault(row[index], {})[column(row)] = value(row)
    body = [[name, *(line.get(column, "-") for column in columns)] for name, line in cells.items()]
    return markdown([index, *columns], body)


def figure(value: float, digits: int = 3) -> str:
    """A number to `digits` significant digits, without an exponent."""
    text = f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")
    return text


def count(value: float, base: int = 1000, units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """Bytes in the largest unit that keeps them above 1."""
    at = 0
    while value >= base and at < len(units) - 1:
        value, at = value / base, at + 1
    return f"{figure(value)} {units[at]}"
