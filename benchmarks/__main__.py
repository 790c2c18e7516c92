"""`python -m benchmarks NAME [--quick] [--minutes M]` measures and writes `benchmarks/results/<device>/NAME.json`.

`gpu` runs all that is worth knowing of a GPU, one after the other. `report` then makes every table and picture of the
README from those files.
"""

import argparse
import importlib
import json
import os
import pathlib
import signal
import sys

import jax
from tqdm import tqdm

from . import measure

NAMES = (
    "ceilings",
    "precision",
    "layers",
    "sizes",
    "quality",
    "node",
    "crossover",
    "step",
    "profile",
    "models",
    "memory",
    "peers",
    "rl",
    "accuracy",
    "credit",
    "tokens",
    "decoding",
    "scale",
    "modelled",
    "examples",
    "faults",
    "mutations",
    "saves",
    "soak",
    "properties",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*NAMES, "gpu", "report"))
    parser.add_argument(
        "--quick", action="store_true", help="small cases, to see that all runs: results in DEVICE-quick"
    )
    parser.add_argument("--minutes", type=float, help="go on for so long where the last call stopped")
    parser.add_argument("--results", type=pathlib.Path, default=measure.RESULTS, help="where results lie")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or a process would hold most of a GPU's memory
    module = importlib.import_module(f"benchmarks.{args.name}")
    if args.name == "report":
        module.write(args.results)
        return
    if args.name == "gpu":
        failed = module.run(args.minutes, args.results, quick=args.quick)
        sys.exit(f"failed: {', '.join(failed)}" if failed else None)
    if args.minutes is not None:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        about = getattr(module, "device", measure.device)()  # one compiles for a device that it doesn't run on
        path = args.results / (measure.folder(about) + "-quick" * args.quick) / f"{args.name}.json"
        run(args.name, module, path, about, quick=args.quick, again=args.minutes is None)
    except KeyboardInterrupt:
        print("interrupted before the first case")


def run(name: str, module, path: pathlib.Path, about: dict, *, quick: bool, again: bool = True) -> None:
    """Measures every case of a benchmark; what is done when it is interrupted stays, and the next run goes on there.

    What is complete is measured `again`, or else only if the commit is another.
    """
    content = {"benchmark": name, **about, "cases": 0, "complete": False, "rows": []}
    if path.exists():
        begun = json.loads(path.read_text())
        commits = begun["commit"].split(", ")
        same = all(begun[key] == about[key] for key in about.keys() - {"commit", "date"})
        if same and begun["complete"] and not again and commits[-1] == about["commit"]:
            print(f"{path}: complete")
            return
        if same and not begun["complete"]:
            commits = ", ".join(dict.fromkeys([*commits, about["commit"]]))
            content |= {"rows": begun["rows"], "cases": begun["cases"], "commit": commits}
    cases = module.cases(quick)
    try:
        with tqdm(cases[content["cases"] :], unit="case") as progress:
            for case in progress:
                progress.set_postfix_str(", ".join(f"{key} {value}" for key, value in case.items())[:100])
                content["rows"] += [{**case, **row} for row in measured(module, case)]
                content["cases"] += 1
                measure.save(path, content)
        content["complete"] = True
        measure.save(path, content)
    except KeyboardInterrupt:
        print(f"interrupted: {len(content['rows'])} rows kept")
    print(path)


def measured(module, case: dict) -> list[dict]:
    """A case's rows; one that says why, where memory doesn't suffice."""
    try:
        return list(module.measure(**case))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [{"failed": str(error).splitlines()[0][:200]}]


if __name__ == "__main__":
    main()
