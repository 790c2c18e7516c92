"""The shape of the project: what is at the top level, which module may import which, what is exported."""

import ast
import pathlib
import subprocess

import pytest

import nesjax

PACKAGE = pathlib.Path(nesjax.__file__).parent
# Each module imports only from those before it.
ORDER = (
    "noise",
    "views",
    "primal",
    "values",
    "layers",
    "population",
    "members",
    "forward",
    "devices",
    "fitness",
    "estimator",
    "train",
    "environments",
    "obs_stats",
    "rl",
    "checkpoint",
)


def imported(path: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, by the first part of their name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and path.parent == PACKAGE:
            found |= {(node.module or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2 and (node.module or "").split(".")[0] != "nesjax", (
                f"{path}: import relatively, backwards"
            )
    return found


def test_imports_point_backwards():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules - {"__init__"} == set(ORDER)
    for at, name in enumerate(ORDER):
        path = PACKAGE / f"{name}.py"
        if path.exists():
            assert imported(path) <= set(ORDER[:at]), name
    for path in (PACKAGE / "noise").glob("*.py"):
        imported(path)


def test_quax_is_in_one_file():
    users = {path.name for path in PACKAGE.rglob("*.py") if "import quax" in path.read_text()}
    assert users == {"values.py"}


def test_every_export_exists_and_is_documented():
    for name in nesjax.__all__:
        assert name == "FAMILIES" or getattr(nesjax, name).__doc__, name


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
