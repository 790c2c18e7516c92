"""The tables and pictures of README.md, benchmarks/README.md and examples/README.md, from the results files alone."""

import importlib
import json
import os
import pathlib
import re
from collections.abc import Iterable

from . import headlines, measure, pictures, scale

DOCUMENTS = tuple(measure.ROOT / folder / "README.md" for folder in ("", "benchmarks", "examples"))
PICTURES = {
    "quality": {"Quality against members": pictures.quality, "Quality against cost": pictures.frontier},
    "accuracy": {"Accuracy against seconds": pictures.accuracy},
    "peers": {"Accuracy against seconds, with other libraries": pictures.peers},
    "examples": {"Learning curves of the examples": pictures.examples},
}
ANYWHERE = ("modelled", "faults", "mutations", "saves", "soak", "properties")  # not about a GPU
COMPUTED = {"saturation": scale.saturation}  # by arithmetic alone
MARKER = re.compile(r"(<!-- (benchmark|computed|short): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def write(results: pathlib.Path, documents: Iterable[pathlib.Path] = DOCUMENTS) -> None:
    """Draws the pictures beside the results, and puts what was measured between the documents' markers."""
    for document in documents:
        fill = lambda found, document=document: f"{found[1]}{section(found[2], found[3], results, document)}{found[5]}"
        document.write_text(MARKER.sub(fill, document.read_text()))
        print(document)


def section(kind: str, name: str, results: pathlib.Path, document: pathlib.Path) -> str:
    """Every device's table and pictures, or a computed table; what GPUs lack is said."""
    if kind == "computed":
        return f"{COMPUTED[name]()}\n"
    needed = headlines.NEEDS[name] if kind == "short" else (name,)
    parts, platforms = [], set()
    for folder in sorted(results.iterdir()):
        paths = [folder / f"{need}.json" for need in needed]
        if folder.name.endswith("-quick") or not all(path.exists() for path in paths):
            continue
        contents = [json.loads(path.read_text()) for path in paths]
        for content in contents:
            content["rows"] = [row for row in content["rows"] if "failed" not in row]
        if not all(content["rows"] if kind == "benchmark" else content["complete"] for content in contents):
            continue
        platforms.add(contents[0]["platform"])
        if kind == "short":
            parts += [getattr(headlines, name)(*contents), f"({'; '.join(map(about, contents))})"]
            continue
        parts += [f"{about(contents[0])}:", importlib.import_module(f"benchmarks.{name}").table(contents[0])]
        for title, draw in PICTURES.get(name, {}).items() if contents[0]["complete"] else ():
            picture = folder / f"{draw.__name__}.png"
            draw(contents[0], picture)
            parts.append(f"![{title}]({os.path.relpath(picture, document.parent)})")
    if not parts:
        parts.append("Not measured yet.")
    elif name not in ANYWHERE and platforms <= {"cpu"}:
        parts.append("On a GPU: not measured yet.")
    return "\n\n".join(["", *parts, ""]).lstrip("\n")


def about(content: dict) -> str:
    """Where and when a table's figures were taken."""
    versions = f"Python {content['python']}, jax {content['jax']}, flax {content['flax']}"
    partly = "" if content["complete"] else "; interrupted, so incomplete"
    modelled = ", compiled for and not run: modelled" if content["platform"] == "modelled" else ""
    return f"{content['device']}{modelled}; {versions}; commit {content['commit']}, {content['date']}{partly}"
