"""The benchmarks run on small cases, keep what is done, and the README says what their results say."""

import importlib
import json
import re
import runpy
import shutil
import subprocess

import families as tested
import jax
import jax.numpy as jnp
import pytest
from families import Unable

import nesjax
from benchmarks import __main__ as main
from benchmarks import families, gpu, layers, measure, report

ROOT, RESULTS = measure.ROOT, measure.RESULTS
# Minutes of compiling, or processes of their own; faults, mutations, saves, soak and properties are tested elsewhere.
COSTLY = (
    "quality", "node", "accuracy", "credit", "tokens", "decoding", "peers", "memory", "examples", "faults", "mutations",
    "saves", "soak", "properties", "scale", "precision", "models", "profile", "rl", "crossover",
)  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in COSTLY else ()) for name in main.NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_quick_benchmarks_give_a_table(name, tmp_path):
    if name in ("peers", "rl"):
        pytest.importorskip("evosax", reason="the extra `peers`")
    module, about = importlib.import_module(f"benchmarks.{name}"), measure.device()
    if name == "modelled" and not importlib.import_module("benchmarks.h100").available():
        pytest.skip("compiling for an H100 needs the wheels of jax's CUDA plugin")
    path = tmp_path / "device" / f"{name}.json"
    main.run(name, module, path, about, quick=True)
    content = json.loads(path.read_text())
    assert content["complete"] and {"device", "jax", "commit", "date"} <= set(content)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- benchmark: {name} -->\nold\n<!-- end -->\nafter")
    report.write(tmp_path, [readme])
    text = readme.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after")
    assert about["commit"] in text and re.search(r"\|.*\d.*\|", text)
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_benchmark_keeps_its_rows(tmp_path):
    class Interrupted:
        cases = staticmethod(lambda quick: [{"case": 0}, {"case": 1}])

        @staticmethod
        def measure(case):
            yield {"figure": 1.5}
            if case:
                raise KeyboardInterrupt

    main.run("layers", Interrupted, tmp_path / "x.json", measure.device(), quick=True)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["rows"] == [{"case": 0, "figure": 1.5}] and not content["complete"]
    Interrupted.measure = staticmethod(lambda case: [{"figure": 2.5}])
    main.run("layers", Interrupted, tmp_path / "x.json", measure.device(), quick=True)  # goes on where it stopped
    content = json.loads((tmp_path / "x.json").read_text())
    assert [row["figure"] for row in content["rows"]] == [1.5, 2.5] and content["complete"]


def test_what_is_complete_stays_and_a_case_without_memory_is_said(tmp_path):
    """Under a limit of time; and a run that is stopped before its first case loses nothing."""

    class Limited:
        ran = 0
        cases = staticmethod(lambda quick: [{"case": at} for at in range(3)])

        @classmethod
        def measure(cls, case):
            cls.ran += 1
            if cls.ran == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            if cls.ran in (3, 4):
                raise KeyboardInterrupt
            return [{"figure": 1.0}]

    path, about = tmp_path / "x.json", measure.device()
    rows = [{"case": 0, "figure": 1.0}, {"case": 1, "failed": "RESOURCE_EXHAUSTED: Out of memory"}]
    for expected in (rows, rows, [*rows, {"case": 2, "figure": 1.0}]):
        main.run("x", Limited, path, about, quick=True, again=False)
        assert json.loads(path.read_text())["rows"] == expected
    main.run("x", Limited, path, about, quick=True, again=False)
    assert Limited.ran == 5  # nothing is left to do,
    main.run("x", Limited, path, {**about, "commit": "another"}, quick=True, again=False)
    assert Limited.ran == 8  # but at another commit all of it


def test_one_command_measures_what_is_left_of_a_gpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "PARTS", {"ceilings": 5, "nothing": 5})
    assert gpu.run(5, tmp_path, quick=True) == ["nothing"]
    (path,) = tmp_path.rglob("*.json")
    first = path.stat()
    assert len(json.loads(path.read_text())["rows"]) == 4 and path.parent.name.endswith("-quick")
    monkeypatch.setattr(gpu, "PARTS", {"ceilings": 5})
    assert gpu.run(5, tmp_path, quick=True) == [] and path.stat().st_mtime_ns == first.st_mtime_ns
    assert gpu.run(0.01, tmp_path, quick=True) == [] and "ceilings: no time left" in capfd.readouterr().out
    assert set(runpy.run_path(gpu.__file__, run_name="benchmarks.gpu")["PARTS"]) < set(main.NAMES)


def test_tables_of_half_done_benchmarks(tmp_path):
    for path in (path for path in RESULTS.rglob("*.json") if path.stem in gpu.PARTS):
        content = json.loads(path.read_text())
        for count in {1, len(content["rows"]) // 2} - {0}:
            half = {**content, "rows": content["rows"][:count]}
            assert importlib.import_module(f"benchmarks.{path.stem}").table(half).startswith("|"), path


def test_sources_tell_their_commit_without_git(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b.py", "b/c.py", "a.py"):
        (tmp_path / name).write_text(f"# {name}")
    git = lambda *args: subprocess.run(["git", *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    try:
        git("init"), git("add", ".")
        expected = git("write-tree").strip()
    except FileNotFoundError:
        pytest.skip("needs git")
    (tmp_path / ".git").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "__pycache__").mkdir()
    assert measure.tree(tmp_path).hex() == expected


def test_a_wrong_program_gets_no_time(monkeypatch):
    """A family whose fast path isn't what it materialises is refused before it is timed."""

    class Wrong(nesjax.LowRank):
        def contract(self, shared, member, shape, x, axes, *, precision=None):
            return 1.1 * super().contract(shared, member, shape, x, axes, precision=precision)

    monkeypatch.setitem(families.FAMILIES, "Wrong", Wrong())
    case = {"layer": "dense", "shape": [32, 32], "members": 8, "dtype": "float32", "family": "Wrong"}
    with pytest.raises(ValueError, match=r"Wrong: .* away from its materialised members"):
        list(layers.measure(**case))


def test_a_new_family_is_measured_and_tested_without_another_edit(monkeypatch):
    """The lists of the benchmarks and of the tests, made anew with one family more in `nesjax.FAMILIES`."""
    monkeypatch.setattr(nesjax, "FAMILIES", (*nesjax.FAMILIES, Unable))
    measured = runpy.run_path(families.__file__)
    assert all("Unable" in measured["names"](benchmark) for benchmark in families.BENCHMARKS)
    assert measured["FAMILIES"]["Unable"] == Unable()
    assert Unable() in runpy.run_path(tested.__file__)["VARIANTS"] and Unable() not in tested.VARIANTS


def test_rounds_are_interleaved():
    order = []
    functions = {name: lambda x, name=name: order.append(name) or x for name in "ab"}
    times = measure.interleave(functions, [(jnp.ones(1),), (jnp.zeros(1),)], rounds=4, least=0)
    assert len(times["a"]) == len(times["b"]) == 4
    assert order[-8:] == ["a", "b"] * 4
    assert measure.summary([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])["multiple"][0] == 1.5


def test_documents_say_what_the_results_say(tmp_path):
    """`python -m benchmarks report` changes nothing in a checkout, and every benchmark has a place in them."""
    shutil.copytree(RESULTS, tmp_path / RESULTS.relative_to(ROOT))
    copies = {document: tmp_path / document.relative_to(ROOT) for document in report.DOCUMENTS}
    for document, copy in copies.items():
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(document, copy)
    report.write(tmp_path / RESULTS.relative_to(ROOT), copies.values())
    for document, copy in copies.items():
        assert copy.read_text() == document.read_text(), document
    text = "".join(document.read_text() for document in report.DOCUMENTS)
    assert all(f"<!-- benchmark: {name} -->" in text for name in main.NAMES)


def test_links_lead_somewhere():
    """Links within the repository, to a heading too."""
    for document in (*report.DOCUMENTS, ROOT / "tests" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            path, _, heading = link.partition("#")
            target = document.parent / path if path else document
            assert link.startswith("https://") or target.exists(), f"{document}: {link}"
            if heading and not link.startswith("https://"):
                heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_memory_is_measured():
    assert measure.peak_bytes(lambda: jax.jit(lambda: jnp.ones(1 << 24))()) > 0.9 * (1 << 26)
