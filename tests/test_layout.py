"""The shape of the project: what is at the top level, which module may import which, what is exported."""

import ast
import dataclasses
import pathlib
import subprocess

import pytest

import nesjax

PACKAGE = pathlib.Path(nesjax.__file__).parent
# The pipeline: each module imports only from those before it.
ORDER = (
    "checks",
    "noise",
    "views",
    "taps",
    "formed",
    "perturbed",
    "primal",
    "rules",
    "paths",
    "layers",
    "population",
    "members",
    "forward",
    "outside",
    "credit",
    "describe",
    "devices",
    "shaping",
    "gradient",
    "model",
    "value_and_grad",
    "train",
    "rl",
    "checkpoint",
)
PACKAGES = {
    "checkpoint": ("description", "lock", "store", "termination", "run"),
    "noise": ("base", "gaussian", "low_rank", "sign_flip", "permuted", "sparse"),
    "rl": ("actions", "observations", "obs_stats", "environments", "policies", "rollout", "step", "vector"),
}


def imported(path: pathlib.Path, level: int) -> set[str]:
    """The modules that a file imports from the package `level` dots up, by the first part of their name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "nesjax", f"{path}: import relatively"
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def names_in(folder: pathlib.Path) -> set[str]:
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return found - {"__init__"}


def test_imports_point_backwards():
    assert names_in(PACKAGE) == set(ORDER)
    for at, name in enumerate(ORDER):
        if name not in PACKAGES:
            assert imported(PACKAGE / f"{name}.py", 1) <= set(ORDER[:at]), name
            continue
        inner = PACKAGES[name]
        assert names_in(PACKAGE / name) == set(inner)
        for place, part in enumerate(inner):
            path = PACKAGE / name / f"{part}.py"
            assert imported(path, 1) <= set(inner[:place]), path
            assert imported(path, 2) <= set(ORDER[:at]), path


def test_quax_is_where_noise_meets_operations():
    users = {path.name for path in PACKAGE.rglob("*.py") if "import quax" in path.read_text()}
    assert users == {"perturbed.py", "rules.py"}


def documented(value) -> bool:
    """Whether somebody wrote its docstring: a dataclass without one gets its signature for it."""
    return bool(value.__doc__) and not value.__doc__.startswith(f"{value.__name__}(")


def test_every_export_exists_and_is_documented():
    for name in nesjax.__all__:
        assert name == "FAMILIES" or documented(getattr(nesjax, name)), name
    assert not documented(dataclasses.make_dataclass("Bare", ["field"]))


def test_top_level():
    """What the repository holds; what examples and tools leave beside it doesn't matter."""
    root = pathlib.Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    allowed = {"nesjax", "tests", "benchmarks", "examples", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in (file.split("/")[0] for file in files) if not name.startswith(".")} <= allowed
