"""What all examples share: options, progress line, log, learning curve, checkpoints. The training itself is theirs.

A run lies in one folder, `runs/EXAMPLE-SEED` if `--out` names no other: `log.jsonl` (one line per generation, one of
the last evaluation), `curve.png` and `checkpoints/`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import optax

import nesjax

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f'the examples need {error.name}: pip install -e ".[examples]"') from None

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that is a whole number."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    number.__name__ = "int"  # for argparse's own words
    return number


def options(doc: str, *, steps: int, minutes: float) -> argparse.ArgumentParser:
    """The options that all examples have; an example adds its own. `doc` is the example's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=at_least(0), default=0, help="0 if not given")
    parser.add_argument("--steps", type=at_least(1), default=steps, help=f"generations; {steps:,} if not given")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"of training; {minutes:g} if not given")
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument("--out", type=Path, help="the run's folder; runs/EXAMPLE-SEED if not given")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options' values, checked."""
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"argument --minutes: must be more than 0, got {args.minutes}")
    args.out = args.out or Path("runs") / f"{Path(sys.argv[0]).stem}-{args.seed}"
    if not args.resume and any(args.out.glob("**/checkpoints")):
        parser.error(f"argument --out: {args.out} holds a run: go on with --resume, or name another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def population(parser: argparse.ArgumentParser, size: int, std, **settings) -> nesjax.Population:
    """A population, or one line on what is wrong with `--population`."""
    try:
        return nesjax.Population(size, std, **settings)
    except ValueError as error:
        parser.error(f"argument --population: {error}")


def need(*packages: str, extra: str = "examples", install: str | None = None) -> None:
    """Ends the program, and says what to install, if a package is missing."""
    missing = []
    for name in packages:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        install = install or f'pip install -e ".[{extra}]"'
        raise SystemExit(f"this example needs {', '.join(missing)}: {install}")


def updated(optimizer: optax.GradientTransformation, shaping: Callable) -> Callable:
    """Makes `(state, noise, losses) -> state`, jitted: a step by losses that were computed outside JAX."""

    @jax.jit
    def update(state, noise, losses):
        grads = nesjax.estimate_gradient(noise, losses, shaping=shaping)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1)

    return update


def train(
    args, state, step, population, *, inputs=lambda at: (), evaluate=lambda state: {}, every=10, show=("loss",),
    title="", log=lambda step, figures: None,
):  # fmt: skip
    """Trains until `--steps` or `--minutes` are over: `state, metrics = step(state, *inputs(at))`.

    Ctrl-C ends it after the generation under way, saves, and says how to go on.

    Args:
      args: from `parse`.
      state: before the first step. With `--resume` the newest checkpoint takes its place.
      step, population: what the state is trained by.
      inputs: the arguments of generation `at`, a function of nothing else, so that a resumed run sees the same.
      evaluate: the figures that matter, of a state: `{"accuracy": 0.9}`. The first is drawn.
      every: steps between evaluations, and between checkpoints.
      show: metrics in the progress line; the first is drawn.
      title: of the learning curve.
      log: `log(step, figures)`, called after each generation with its metrics, and its evaluation if there was one.

    Returns:
      The state, and the figures of its evaluation.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "log.jsonl"
    with nesjax.checkpoint.Run(args.out / "checkpoints", population, every=every) as run, interrupts() as interrupted:
        state = run.restore(state)
        at = int(state.step)
        rows = [json.loads(line) for line in path.read_text().splitlines()[:at]] if at else []
        begun = path.with_suffix(".tmp")
        begun.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        begun.replace(path)  # at once, so that a kill leaves the one or the other
        before, figures, progress = rows[-1]["seconds"] if rows else 0.0, {}, Progress(args, at)
        with path.open("a") as file:
            while at < args.steps and progress.seconds < 60 * args.minutes and not interrupted:
                state, metrics = step(state, *inputs(at))
                at += 1
                row = {"step": at, "seconds": before + progress.seconds, **numbers(metrics)}
                if at % every == 0:
                    figures = numbers(evaluate(state))
                    row |= figures
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()  # before the checkpoint, which may then not be ahead of it
                log(at, row)
                progress.say(at, figures | {name: row[name] for name in show}, lasting=at % every == 0)
                run.update(state, metrics)
        progress.end()
        run.save(state)
        if not interrupted:  # evaluating may take long, too
            figures = numbers(evaluate(state))
            rows.append({"step": at, "seconds": rows[-1]["seconds"] if rows else 0.0, **figures})
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    draw(rows, [*list(figures)[:1], show[0]], title, args.out / "curve.png")
    print(f"log, learning curve and checkpoints: {args.out}")
    if interrupted:
        again = [*sys.argv, *([] if args.resume else ["--resume"])]
        print(f"interrupted after {at} generations; to go on: python {shlex.join(again)}")
        raise SystemExit(128 + signal.SIGINT)
    return state, figures


@contextlib.contextmanager
def interrupts() -> Iterator[list]:
    """Notes a Ctrl-C, in the list that it gives; the second one ends the program, as ever."""
    heard = []

    def hear(number, frame):
        heard.append(number)
        signal.signal(signal.SIGINT, before)
        print("\nending after this generation; Ctrl-C again to end at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """A line that says how far a run is, by steps or minutes, whichever ends first; the figures stand at its end.

    On a terminal it is written over itself. Elsewhere only what `lasting` marks is written, a line each.
    """

    def __init__(self, args, at: int) -> None:
        self.args, self.first, self.begin, self.compiled = args, at + 1, time.perf_counter(), None
        self.terminal = sys.stderr.isatty()
        self.write("compiling")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def say(self, at: int, figures: dict, lasting: bool) -> None:
        if self.compiled is None:
            self.compiled = self.seconds
        per_step = (self.seconds - self.compiled) / max(at - self.first, 1)
        limit = 60 * self.args.minutes
        share = min(max(at / self.args.steps, self.seconds / limit), 1)
        left = max(min(per_step * (self.args.steps - at), limit - self.seconds), 0)
        known = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
        speed = f"{1 / per_step:.3g}/s, {left // 60:.0f}:{left % 60:02.0f} left" if at > self.first else "compiled"
        if self.terminal or lasting:
            self.write(f"{share:4.0%}, generation {at}, {speed}: {known}")

    def write(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(f"\r\x1b[K{text}" if self.terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        print(end="\n" * self.terminal, file=sys.stderr)


def numbers(values: dict) -> dict[str, float | None]:
    """The scalars as JSON has them; None for what isn't finite."""
    scalars = {name: float(value) for name, value in values.items() if name != "aux"}
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in scalars.items()}


def draw(rows: list[dict], names: list[str], title: str, path: Path) -> None:
    """The learning curve, one panel per name: a figure of each evaluation, or the population's metric.

    A metric that the figure's name holds (`return`, `mean return`) shares its scale.
    """
    shape = {"squeeze": False, "figsize": (6, 2.5 * len(names)), "layout": "constrained"}
    figure, panels = plt.subplots(len(names), sharex=True, sharey=names[-1] in names[0], **shape)
    for axes, name in zip(panels.flat, names):
        known = [row for row in rows if row.get(name) is not None]
        axes.plot([row["step"] for row in known], [row[name] for row in known], marker="." * (len(known) < 100))
        axes.set_ylabel(name if name is names[0] else f"population's {name}")
    panels[0, 0].set_title(title)
    panels[-1, 0].set_xlabel("generation")
    figure.savefig(path, dpi=120)
    plt.close(figure)
