"""The shape of the project: what is at the top level, which module may import which, what is exported."""

import ast
import dataclasses
import inspect
import pathlib
import re
import subprocess
import tomllib

import flax.linen as nn
import pytest

import nesjax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(nesjax.__file__).parent
# The pipeline: each module imports only from those before it.
ORDER = (
    "checks",
    "kernels",
    "noise",
    "views",
    "taps",
    "formed",
    "perturbed",
    "dense",
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
    "estimate",
    "value_and_grad",
    "train",
    "rl",
    "checkpoint",
)
PACKAGES = {
    "checkpoint": ("description", "lock", "packing", "record", "store", "termination", "run"),
    "kernels": ("signed_product",),
    "noise": ("base", "gaussian", "low_rank", "node", "sign_flip", "permuted", "sparse"),
    "rules": ("lazy", "outputs", "products", "arithmetic", "reductions", "rows", "structure", "functions"),
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
    users = {path for path in PACKAGE.rglob("*.py") if "import quax" in path.read_text()}
    assert {path.relative_to(PACKAGE).parts[0] for path in users} == {"perturbed.py", "rules"}


def lines_of_code(function: ast.FunctionDef, lines: list[str]) -> int:
    """From the first statement after the docstring, without comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    code = lines[body[0].lineno - 1 : function.end_lineno] if body else []
    return sum(not line.strip().startswith("#") and line.strip() != "" for line in code)


def test_any_file_is_read_in_one_sitting():
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, path
        functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
        assert {node.name for node in functions if lines_of_code(node, lines) > 40} == set(), path


def exports():
    for module in (nesjax, nesjax.rl, nesjax.outside, nesjax.checkpoint):
        yield from ((name, getattr(module, name)) for name in module.__all__)


def own_parameters(value) -> list[str]:
    """The parameters that a docstring must explain: for a class the fields that its own module defines."""
    if inspect.isfunction(value):
        return list(inspect.signature(value).parameters)
    known = inspect.signature(value).parameters if value.__module__.startswith("nesjax") else ()
    inherited = {name for base in value.__mro__[1:] for name in getattr(base, "__annotations__", ())}
    flax = {"parent", "name"} if issubclass(value, nn.Module) else set()
    return [name for name in known if name not in inherited | flax | {"args", "settings"} and name[0] != "_"]


def refuses(value) -> bool:
    """Whether a function, or the making of a class's object, raises an error of its own or by a check."""
    made_by = [value] if inspect.isfunction(value) else [vars(value).get("__post_init__")]
    if inspect.isclass(value) and not dataclasses.is_dataclass(value):
        made_by.append(vars(value).get("__init__"))
    source = "".join(inspect.getsource(function) for function in made_by if function)
    return re.search(r"\braise \w|\b(one_of|positive_int|instance_of|check\w*)\(", source) is not None


def lacks(name: str, value) -> set[str]:
    """What a public name's docstring leaves out: a parameter, what is returned or raised, an example."""
    doc = inspect.getdoc(value) or ""
    if isinstance(value, type) and issubclass(value, Exception):
        return set() if doc else {"a docstring"}
    explained = re.findall(r"^ +([\w*, ]+):", doc, re.MULTILINE)
    explained = {word.strip("* ") for names in explained for word in names.split(",")}
    missing = {parameter for parameter in own_parameters(value) if parameter not in explained}
    if "Example:" not in doc:
        missing.add("Example")
    returned = inspect.signature(value).return_annotation if inspect.isfunction(value) else None
    if returned not in (None, "None") and "Returns:" not in doc:
        missing.add("Returns")
    if refuses(value) and "Raises:" not in doc:
        missing.add("Raises")
    return missing


def public_methods(kind: type):
    for name, value in vars(kind).items():
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if name[0] != "_" and inspect.isfunction(value) and value.__module__.startswith("nesjax"):
            yield f"{kind.__name__}.{name}", getattr(kind, name)


def test_every_export_is_documented():
    documented = {name: value for name, value in exports() if name not in ("FAMILIES", "checkpoint", "outside", "rl")}
    lacking = {name: missing for name, value in documented.items() if (missing := lacks(name, value))}
    assert lacking == {}
    methods = [item for value in documented.values() if inspect.isclass(value) for item in public_methods(value)]
    assert [name for name, value in methods if name != "PerturbedModel.setup" and not inspect.getdoc(value)] == []


def test_extras_are_named_as_every_pip_knows_them():
    """Metadata has them normalised, and pip before 23.3 then leaves out an extra asked for by another spelling."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [name for name in extras if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)] == []


def test_the_version_is_said_alike():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^## \[{version}\]|^## \[Unreleased\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_top_level():
    """What the repository holds; what examples and tools leave beside it doesn't matter."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    allowed = {"nesjax", "tests", "benchmarks", "examples", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in (file.split("/")[0] for file in files) if not name.startswith(".")} <= allowed
