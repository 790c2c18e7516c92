"""`python -m benchmarks NAME [--quick]` measures and writes `benchmarks/results/<device>/NAME.json`.

`report` then makes every table and picture of the README from those files.
"""

import argparse
import importlib
import json
import pathlib

from tqdm import tqdm

from . import measure

NAMES = (
    "layers",
    "sizes",
    "quality",
    "step",
    "memory",
    "peers",
    "accuracy",
    "credit",
    "tokens",
    "decoding",
    "scale",
    "modelled",
    "examples",
    "faults",
    "mutations",
    "soak",
    "properties",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*NAMES, "report"))
    parser.add_argument(
        "--quick", action="store_true", help="small cases, to see that all runs: results in DEVICE-quick"
    )
    parser.add_argument("--results", type=pathlib.Path, default=measure.RESULTS, help="where results lie")
    args = parser.parse_args()
    module = importlib.import_module(f"benchmarks.{args.name}")
    if args.name == "report":
        module.write(args.results)
        return
    about = getattr(module, "device", measure.device)()  # one compiles for a device that it doesn't run on
    path = args.results / (measure.folder(about) + "-quick" * args.quick) / f"{args.name}.json"
    run(args.name, module, path, about, quick=args.quick)


def run(name: str, module, path: pathlib.Path, about: dict, *, quick: bool) -> None:
    """Measures every case of a benchmark; what is done when it is interrupted stays, and the next run goes on there."""
    content = {"benchmark": name, **about, "cases": 0, "complete": False, "rows": []}
    if path.exists():
        begun = json.loads(path.read_text())
        if not begun["complete"] and all(begun[key] == about[key] for key in about.keys() - {"commit", "date"}):
            commits = dict.fromkeys([*begun["commit"].split(", "), about["commit"]])
            content |= {"rows": begun["rows"], "cases": begun["cases"], "commit": ", ".join(commits)}
    cases = module.cases(quick)
    try:
        with tqdm(cases[content["cases"] :], unit="case") as progress:
            for case in progress:
                progress.set_postfix_str(", ".join(f"{key} {value}" for key, value in case.items())[:100])
                content["rows"] += [{**case, **row} for row in module.measure(**case)]
                content["cases"] += 1
                measure.save(path, content)
        content["complete"] = True
        measure.save(path, content)
    except KeyboardInterrupt:
        print(f"interrupted: {len(content['rows'])} rows kept")
    print(path)


if __name__ == "__main__":
    main()
