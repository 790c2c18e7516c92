"""The pictures of the READMEs, from the results' files: each function takes the content of one and a path."""

import itertools
import re

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker, transforms
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Text

FAMILIES = ("LowRank", "SignFlip", "Permuted both", "Permuted in", "Permuted out", "Sparse", "Gaussian")
STYLES = {"--": ("10 %", "rank 4", "k=2"), ":": ("50 %", "normal"), "-.": ("SignFlip in",)}  # by the end of a name
BASELINES = {  # what an example says that its result is to be compared with
    "byte_lm": ("bigram", r"bigram ([\d.]+)"),
    "phonemes": ("shipped weights", r"([\d.]+) % with the shipped weights"),
    "minatar": ("random actions", r"([\d.]+) \(random\)"),
}
STANDING_STILL = 1000  # brax rewards being alive with 1 a step
GREY = "0.45"


def colour(family: str) -> str:
    """One colour for a family in every picture; its modes share it."""
    known = [at for at, name in enumerate(FAMILIES) if family.startswith(name)]
    return f"C{max(known, key=lambda at: len(FAMILIES[at]))}" if known else GREY


def style(family: str):
    """The line of a family's mode."""
    return next((line for line, modes in STYLES.items() if family.endswith(modes)), "-")


def grouped(rows: list[dict], *names: str) -> dict:
    """Rows by what they have under `names`, in the order of their first."""
    out = {}
    for row in rows:
        out.setdefault(tuple(row[name] for name in names), []).append(row)
    return {key[0] if len(key) == 1 else key: rows for key, rows in out.items()}


def canvas(results: dict, count: int, columns: int, width: float, height: float):
    """A figure that says where its numbers were taken, and `count` panels."""
    columns = min(columns, count)
    lines = -(-count // columns)
    size = (width * columns, height * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, dpi=120, layout="constrained", squeeze=False)
    for axes in panels.flat[count:]:
        axes.remove()
    source = f"{results['device']}, jax {results['jax']}, {results['commit']}"
    figure.supxlabel(source, fontsize=6, color=GREY, x=0.99, ha="right")
    return figure, panels.flat[:count]


def save(figure, path) -> None:
    figure.savefig(path)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)  # a third of the bytes
    plt.close(figure)


def beside(axes, texts: list[tuple[float, float, str, str]]) -> None:
    """Labels `(x, y, text, colour)` of curves' ends, in a column right of the axes and none over another."""
    height = lambda y: axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1]
    spots = sorted((height(y), x, y, text, color) for x, y, text, color in texts)
    gap = 10 / 72 * axes.figure.dpi / axes.get_window_extent().height
    places = [spot[0] for spot in spots]
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + gap)
    places[-1] = min(places[-1], 1)
    for at in reversed(range(len(places) - 1)):
        places[at] = min(places[at], places[at + 1] - gap)
    for place, (_, x, y, text, color) in zip(places, spots):
        axes.annotate(
            text, (x, y), (1.06, place), textcoords="axes fraction", color=color, fontsize=7.5, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


def around(axes, bars: list, texts: list[tuple[float, float, str, str]]) -> None:
    """Labels `(x, y, text, colour)` of points on bars, each where it and its line are the first to cross nothing."""
    scale = axes.figure.dpi / 72  # pixels a typographic point
    points = axes.transData.transform([spot[:2] for spot in texts])
    taken = [transforms.Bbox(axes.transData.transform(bar)).padded(4 * scale) for bar in bars]
    inside, lines = axes.get_window_extent(), []
    places = [
        distance * scale * np.array([np.cos(angle), np.sin(angle)])
        for distance, angle in itertools.product(range(9, 90, 3), np.arange(0, 2, 1 / 16) * np.pi)
    ]
    for (x, y, text, color), point in zip(texts, points):
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        label = axes.annotate(
            text, (x, y), (0, 0), color=color, textcoords="offset points", fontsize=7.5, arrowprops=arrow
        )
        label.set_in_layout(False)
        width, height = Text.get_window_extent(label).size  # without the line
        labels = taken[len(bars) :]
        for shift in places:
            corner = point + shift - (width if shift[0] < 0 else 0, height / 2)
            box = transforms.Bbox.from_bounds(*corner, width, height)
            line = Path([point, (box.p0 + box.p1) / 2])
            free = (
                not box.padded(scale).count_overlaps(taken)
                and inside.fully_contains(*box.p0)
                and inside.fully_contains(*box.p1)
            )
            crossed = [*map(line.intersects_bbox, labels), *map(line.intersects_path, lines)]
            if free and not any([*crossed, *(other.intersects_bbox(box) for other in lines)]):
                break
        taken.append(box)
        lines.append(line)
        label.set_position((corner - point) / scale)


def quality(results: dict, path) -> None:
    """Cosine against members, a panel a problem."""
    problems = grouped([row for row in results["rows"] if "bound" in row], "problem")
    figure, panels = canvas(results, len(problems), 3, 4.6, 4.2)
    for axes, (problem, rows) in zip(panels, problems.items()):
        axes.set(xlabel="members N", ylabel="cosine to the true gradient", ylim=(0, 1))
        axes.set_title(f"{problem}, d = {rows[0]['parameters']:,}")
        axes.set_xscale("log", base=2)
        bound = {row["members"]: row["bound"] for row in rows}
        axes.plot(bound.keys(), bound.values(), "k--", lw=1.5, zorder=5)
        labels = [(*list(bound.items())[-1], "√(N/(N+d))", "k")]
        for family, own in grouped(rows, "family").items():
            x, y = [[row[name] for row in own] for name in ("members", "cosine")]
            axes.errorbar(x, y, [row["error"] for row in own], color=colour(family), ls=style(family), lw=1.2)
            if own[0]["max_cosine"] < 0.9:
                limit = own[0]["max_cosine"]
                axes.plot(x[-1] * 1.15, limit, "<", color=colour(family), mfc="none", ms=5, clip_on=False)
            labels.append((x[-1], y[-1], family, colour(family)))
        axes.set_xlim(min(bound) / 1.1, max(bound) * 1.3)
        beside(axes, labels)
    handles = [
        Line2D([], [], color="k", ls="--", label="√(N/(N+d)), which independent noise reaches"),
        Line2D([], [], color=GREY, marker="<", mfc="none", ls="", label="mean limit for large N, where below 0.9"),
        *(Line2D([], [], color=GREY, ls=line, label=", ".join(modes)) for line, modes in STYLES.items()),
        Line2D([], [], color=GREY, marker="|", ls="", label="standard error over trials"),
    ]
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=(0.98, 0.12), fontsize=9, frameon=False)
    save(figure, path)


def frontier(results: dict, path) -> None:
    """What an estimate is worth against what it takes; along a grey line squared cosine per second is the same."""
    problems = grouped([row for row in results["rows"] if "seconds" in row], "problem")
    figure, panels = canvas(results, len(problems), 2, 4.8, 3.8)
    labels = []
    for axes, (problem, rows) in zip(panels, problems.items()):
        rows.sort(key=lambda row: row["seconds"][0])
        x, worth = (np.array(values) for values in zip(*((row["seconds"][0], row["cosine"] ** 2) for row in rows)))
        axes.set(xscale="log", yscale="log", title=f"{problem}, N = {rows[0]['members']:,}")
        axes.set(xlabel="seconds per estimate", ylabel="squared cosine")
        bars = [[(row["seconds"][1], y), (row["seconds"][2], y)] for row, y in zip(rows, worth)]
        for row, bar, y in zip(rows, bars, worth):
            axes.plot(*zip(*bar), color=colour(row["family"]), lw=1)
            axes.plot(row["seconds"][0], y, "o", color=colour(row["family"]), ms=5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.set(xlim=(x.min() / 1.6, x.max() * 2.5), ylim=(worth.min() / 1.8, worth.max() * 1.8))
        for rate in np.geomspace(*(f(worth / x) for f in (np.min, np.max)), 5):
            axes.axline((x.min(), rate * x.min()), (x.max(), rate * x.max()), color="0.85", lw=0.8, zorder=0)
        labels.append((bars, [(at, y, row["family"], colour(row["family"])) for row, at, y in zip(rows, x, worth)]))
    same = Line2D([], [], color="0.85", lw=0.8, label="same cos² per second")
    panels[0].legend(handles=[same], loc="lower right", fontsize=7.5)
    figure.draw_without_rendering()  # panels are where they stay
    for axes, (bars, texts) in zip(panels, labels):
        around(axes, bars, texts)
    save(figure, path)


def medians(runs: list[dict]) -> np.ndarray:
    """Points `[n, 2]` of a median run, seconds and accuracy, as far as all runs went."""
    curves = zip(*(run["curve"] for run in runs))
    return np.median([[at[1:] for at in point] for point in curves], axis=1)


def accuracy(results: dict, path) -> None:
    """Held-out accuracy against seconds of training: a family's median over seeds."""
    data = grouped([row for row in results["rows"] if "curve" in row], "data")
    figure, panels = canvas(results, len(data), 2, 5, 3.8)
    for axes, (name, rows) in zip(panels, data.items()):
        axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out accuracy", ylim=(0.5, 1))
        axes.set_title(f"{name}, {rows[0]['members']:,} members")
        labels = []
        for family, own in grouped(rows, "family").items():
            seconds, right = medians(own).T
            axes.plot(seconds, right, color=colour(family), ls=style(family), lw=1.3, marker=".", markevery=[-1])
            labels.append((seconds[-1], right[-1], family, colour(family)))
        for target in (0.9, 0.95):
            axes.axhline(target, color="0.85", lw=0.8, zorder=0)
        beside(axes, labels)
    targets = Line2D([], [], color="0.85", lw=0.8, label="90 % and 95 %, as in the table")
    panels[0].legend(handles=[targets], loc="lower right", fontsize=7.5)
    save(figure, path)


def peers(results: dict, path) -> None:
    """Held-out accuracy against seconds of training, a panel a number of samples; medians over seeds."""
    trained = [row for row in results["rows"] if row["figure"] == "training"]
    panels_of, methods = grouped(trained, "samples"), list(grouped(trained, "method"))
    figure, panels = canvas(results, len(panels_of), 3, 3.6, 3.3)
    for axes, (samples, rows) in zip(panels, panels_of.items()):
        shared = "samples shared by all members" if samples >= 256 else f"sample{'s' * (samples > 1)} per member"
        axes.set(xscale="log", xlabel="seconds of training", ylim=(0, 1))
        axes.set_title(f"{samples} {shared}", fontsize=10)
        for method, runs in grouped(rows, "method").items():
            seconds, right = medians(runs).T
            axes.plot(seconds, right, color=f"C{methods.index(method)}", lw=1.5, label=method)
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def examples(results: dict, path) -> None:
    """Learning curves, a panel an example and a line a seed; dashed, what they are to be compared with."""
    groups = grouped(results["rows"], "example")
    figure, panels = canvas(results, len(groups), 3, 3.7, 3)
    for axes, (example, rows) in zip(panels, groups.items()):
        for row in rows:
            _, seconds, reached = zip(*row["curve"])
            axes.plot([second / 60 for second in seconds], reached, lw=1.2)
        name, said = BASELINES.get(example, ("standing still", None))
        if said:
            axes.axhline(float(re.search(said, " ".join(rows[0]["said"]))[1]), color=GREY, ls="--", lw=1, label=name)
        elif example.startswith("brax"):
            axes.axhline(STANDING_STILL, color=GREY, ls="--", lw=1, label=name)
        axes.set(xlabel="minutes of training", ylabel=rows[0]["figure"])
        axes.set_title(example, fontsize=9)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        if "return" in rows[0]["figure"]:
            axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5)
    save(figure, path)
