"""The README's tables and pictures, from the results files alone."""

import importlib
import json
import os
import pathlib
import re

from . import measure, pictures, scale

PICTURES = {
    "quality": {"Quality against members": pictures.quality, "Quality against cost": pictures.frontier},
    "accuracy": {"Accuracy against seconds": pictures.accuracy},
    "examples": {"Learning curves of the examples": pictures.examples},
}
ANYWHERE = ("modelled", "faults", "mutations", "soak", "properties")  # not about a GPU
COMPUTED = {"saturation": scale.saturation}  # by arithmetic alone
MARKER = re.compile(r"(<!-- (?:benchmark|computed): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def write(results: pathlib.Path, readme: pathlib.Path = measure.ROOT / "README.md") -> None:
    """Draws the pictures beside the results, and puts what was measured between the README's markers."""
    text = readme.read_text()
    readme.write_text(MARKER.sub(lambda found: found[1] + section(found[2], results, readme) + found[4], text))
    print(readme)


def section(name: str, results: pathlib.Path, readme: pathlib.Path) -> str:
    """Every device's table and pictures of one benchmark, or a computed table; what GPUs lack is said."""
    if name in COMPUTED:
        return f"{COMPUTED[name]()}\n"
    module = importlib.import_module(f"benchmarks.{name}")
    parts, platforms = [], set()
    for path in sorted(results.glob(f"*/{name}.json")):
        if path.parent.name.endswith("-quick"):
            continue
        content = json.loads(path.read_text())
        platforms.add(content["platform"])
        parts += [about(content), module.table(content)]
        for title, draw in PICTURES.get(name, {}).items():
            picture = path.with_name(f"{draw.__name__}.png")
            draw(content, picture)
            parts.append(f"![{title}]({os.path.relpath(picture, readme.parent)})")
    if name not in ANYWHERE and platforms <= {"cpu"}:
        parts.append("On a GPU: not measured yet.")
    return "\n\n".join(["", *parts, ""]).lstrip("\n")


def about(content: dict) -> str:
    """Where and when a table's figures were taken."""
    versions = f"Python {content['python']}, jax {content['jax']}, flax {content['flax']}"
    partly = "" if content["complete"] else "; interrupted, so incomplete"
    modelled = ", compiled for and not run: modelled" if content["platform"] == "modelled" else ""
    return f"{content['device']}{modelled}; {versions}; commit {content['commit']}, {content['date']}{partly}:"
