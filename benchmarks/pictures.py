"""The pictures of the README, from the results' files: each function takes the content of one and a path."""

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FAMILIES = ("LowRank", "SignFlip", "Permuted both", "Permuted in", "Permuted out", "Sparse", "Gaussian")
STYLES = {"10 %": (0, (4, 1.5)), "50 %": (0, (1, 1)), "normal": ":", "rank 4": "--", "k=2": "--"}  # by mode
GREY = "0.45"


def colour(family: str) -> str:
    """One colour for a family in every picture; its modes share it, and a family without one is grey."""
    return next((f"C{at}" for at, name in enumerate(FAMILIES) if family.startswith(name)), GREY)


def style(family: str):
    """The line of a family's mode."""
    return next((line for mode, line in STYLES.items() if family.endswith(mode)), "-")


def grouped(rows: list[dict], *names: str) -> dict:
    """Rows by what they have under `names`, in the order of their first."""
    out = {}
    for row in rows:
        out.setdefault(tuple(row[name] for name in names), []).append(row)
    return {key[0] if len(key) == 1 else key: rows for key, rows in out.items()}


def beside(axes, texts: list[tuple[float, float, str, str]], gap: float) -> None:
    """Labels `(x, y, text, colour)` right of their points, moved apart by at least `gap` (a share of the axis)."""
    to_axes = lambda x, y: axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    spots = sorted((*to_axes(x, y), text, color) for x, y, text, color in texts)
    spots.sort(key=lambda spot: spot[1])
    heights = np.array([spot[1] for spot in spots])
    for _ in range(200):  # neighbours that are too close push each other
        for at in range(len(heights) - 1):
            lack = gap - (heights[at + 1] - heights[at])
            if lack > 0:
                heights[at] -= lack / 2
                heights[at + 1] += lack / 2
        heights = heights.clip(0.02, 0.98)
    for (x, y, text, color), height in zip(spots, heights):
        label = axes.annotate(
            text, (x, y), (x + 0.03, height), "axes fraction", color=color, fontsize=7.5, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip
        label.set_in_layout(False)


def finish(figure, path, results: dict) -> None:
    figure.supxlabel(
        f"{results['device']}, jax {results['jax']}, {results['commit']}", fontsize=6, color=GREY, x=0.99, ha="right"
    )
    figure.savefig(path, dpi=120)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)  # a third of the bytes
    plt.close(figure)


def quality(results: dict, path) -> None:
    """Cosine against members, one panel per problem; dashed `sqrt(N / (N + d))`, dotted at the right `max_cosine`."""
    problems = grouped([row for row in results["rows"] if "bound" in row], "problem")
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 4.3 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(problems) :]:
        axes.remove()
    for axes, (problem, rows) in zip(panels.flat, problems.items()):
        axes.set(xlabel="members N", title=f"{problem}, d = {rows[0]['parameters']:,}")
        axes.set_xscale("log", base=2)
        bound = {row["members"]: row["bound"] for row in rows}
        axes.plot(bound.keys(), bound.values(), "k--", lw=1.5, zorder=5)
        labels = [(*list(bound.items())[-1], "√(N/(N+d))", "k")]
        for family, own in grouped(rows, "family").items():
            x, y = [[row[name] for row in own] for name in ("members", "cosine")]
            axes.errorbar(x, y, [row["error"] for row in own], color=colour(family), ls=style(family), lw=1.2)
            if own[0]["max_cosine"] < 0.9:
                axes.hlines(own[0]["max_cosine"], x[-1] / 2, x[-1], colour(family), ":", lw=1)
            labels.append((x[-1], y[-1], family, colour(family)))
        axes.set_xlim(min(bound) / 1.1, max(bound) * (max(bound) / min(bound)) ** 0.55)  # room for the labels
        axes.set_ylim(bottom=0)
        beside(axes, labels, 0.036)
    figure.supylabel("cosine to the true gradient")
    finish(figure, path, results)


def frontier(results: dict, path) -> None:
    """What an estimate is worth against what it takes; along a grey line squared cosine a second is the same."""
    problems = grouped([row for row in results["rows"] if "seconds" in row], "problem")
    figure, panels = plt.subplots(
        1, len(problems), figsize=(4.8 * len(problems), 3.8), layout="constrained", squeeze=False
    )
    for axes, (problem, rows) in zip(panels[0], problems.items()):
        seconds, worth = (
            np.array(values) for values in zip(*((row["seconds"][0], row["cosine"] ** 2) for row in rows))
        )
        axes.set(
            xscale="log", yscale="log", xlabel="seconds an estimate", title=f"{problem}, N = {rows[0]['members']:,}"
        )
        for row, x, y in zip(rows, seconds, worth):
            axes.plot([row["seconds"][1], row["seconds"][2]], [y, y], color=colour(row["family"]), lw=1)
            axes.plot(x, y, "o", color=colour(row["family"]), ms=5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.set(xlim=(seconds.min() / 1.5, seconds.max() * 4), ylim=(worth.min() / 1.6, worth.max() * 1.6))
        for rate in np.geomspace(*(f(worth / seconds) for f in (np.min, np.max)), 5):
            ends = [(x, rate * x) for x in (seconds.min(), seconds.max())]
            axes.axline(*ends, color="0.85", lw=0.8, zorder=0)
        beside(axes, [(x, y, row["family"], colour(row["family"])) for row, x, y in zip(rows, seconds, worth)], 0.045)
    panels[0, 0].set_ylabel("squared cosine")
    finish(figure, path, results)


def accuracy(results: dict, path) -> None:
    """Held-out accuracy against seconds of training: a family's median over seeds, drawn as far as all of them went."""
    data = grouped([row for row in results["rows"] if "curve" in row], "data")
    figure, panels = plt.subplots(1, len(data), figsize=(4.8 * len(data), 3.8), layout="constrained", squeeze=False)
    for axes, (name, rows) in zip(panels[0], data.items()):
        labels = []
        for family, own in grouped(rows, "family").items():
            curves = list(zip(*(row["curve"] for row in own)))
            seconds, right = np.median([[at[1:] for at in point] for point in curves], axis=1).T
            axes.plot(seconds, right, color=colour(family), ls=style(family), lw=1.3, marker=".", markevery=[-1])
            labels.append((seconds[-1], right[-1], family, colour(family)))
        start, end = min(row["curve"][0][1] for row in rows), max(x for x, *_ in labels)
        axes.set(
            xlim=(start, end * (end / start) ** 0.4),
            xscale="log",
            xlabel="seconds of training",
            title=f"{name}, {rows[0]['members']:,} members",
        )
        axes.set_ylim(0.5, 1)
        for target in (0.9, 0.95):
            axes.axhline(target, color="0.85", lw=0.8, zorder=0)
        beside(axes, labels, 0.045)
    panels[0, 0].set_ylabel("held-out accuracy")
    finish(figure, path, results)


def examples(results: dict, path) -> None:
    """Learning curves, a panel an example and a line a seed."""
    groups = grouped(results["rows"], "example")
    lines = -(-len(groups) // 3)
    figure, panels = plt.subplots(lines, 3, figsize=(11, 3 * lines), layout="constrained", squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    for axes, (example, rows) in zip(panels.flat, groups.items()):
        for row in rows:
            _, seconds, reached = zip(*row["curve"])
            axes.plot([second / 60 for second in seconds], reached, lw=1.2)
        axes.set(xlabel="minutes of training", ylabel=rows[0]["figure"])
        axes.set_title(example, fontsize=9)
    finish(figure, path, results)
