"""The READMEs' short tables, each from the results that `NEEDS` names, of one device."""

import math

from .tables import count, figure, markdown

NEEDS = {"peers": ("peers",), "families": ("layers", "quality"), "credit": ("credit",)}
METHODS = ("nesjax", "evosax Open_ES", "vmap over Gaussian parameters", "backpropagation")
FAMILIES = {  # its name in the results: how to write it, and what a member's noise is
    "LowRank": ("`LowRank()`, the default", "outer product of one sign vector per axis"),
    "SignFlip": ("`SignFlip()`", "one shared matrix of signs; each member flips rows and columns"),
    "Permuted both": ('`Permuted("both")`', "one shared normal matrix; each member permutes rows and columns"),
    "Permuted in": ('`Permuted("in")`', "the same, one side permuted"),
    "Permuted in 10 %": ("`Permuted(in_sparsity=0.1)`", "the same, a tenth of the inputs perturbed"),
    "Sparse k=1": ("`Sparse(1)`", "independent normal noise on one input row per member"),
    "Gaussian": ("`Gaussian()`", "independent normal noise on every weight"),
}
WIDTH = 1024


def peers(peers: dict) -> str:
    """A generation's cost at one sample per member, and the ratio to evosax at every number of samples."""
    costs = {(row["samples"], row["method"]): row for row in peers["rows"] if row["figure"] == "generation"}
    body = [
        [method, figure(cost["seconds"][0] * 1e3), figure(cost["multiple"][0]), count(cost["peak_bytes"])]
        for method in METHODS
        if (cost := costs.get((1, method)))
    ]
    ratios = {samples: figure(row["multiple"][0]) for (samples, name), row in costs.items() if "evosax" in name}
    members = next(iter(costs.values()))["members"]
    said = [f"{ratio} times with {samples}" + " that all share" * (samples >= 256) for samples, ratio in ratios.items()]
    table = markdown([f"N = {members:,}, one sample each", "ms per generation", "times nesjax", "peak memory"], body)
    return f"{table}\n\nevosax's time per generation, over nesjax's, by samples per member: {', '.join(said)}."


def families(layers: dict, quality: dict) -> str:
    """What a layer costs with each family, and what the gradient is worth."""
    costs = {row["family"]: row for row in layers["rows"] if row["shape"] == [WIDTH, WIDTH]}
    linear = [row for row in quality["rows"] if row["problem"] == "linear" and "bound" in row]
    most = max(row["members"] for row in linear)
    worth = {row["family"]: row for row in linear if row["members"] == most}
    body = []
    for name, (code, noise) in FAMILIES.items():
        multiples = [figure(costs[name][part]["multiple"][0]) for part in ("forward", "drawn", "gradient")]
        body.append([code, noise, *multiples, figure(worth[name]["cosine"]), f"{worth[name]['max_cosine']:.2f}"])
    heads = ["family", "a member's noise `E_i`", "forward", "forward, noise drawn", "gradient"]
    return markdown([*heads, f"cosine at N = {most:,}", "its limit"], body)


def credit(credit: dict) -> str:
    """Evaluations to each accuracy without and with credit, and what credit costs and gives by the rows of a call."""
    runs = [row for row in credit["rows"] if row["figure"] == "training"]

    def evaluations(task, method, goal):  # the median over seeds
        own = sorted(
            row["evaluations"][goal] or math.inf for row in runs if (row["task"], row["method"]) == (task, method)
        )
        return f"{figure(own[len(own) // 2] / 1e3)}k" if own[len(own) // 2] < math.inf else "not reached"

    goals = dict.fromkeys((row["task"], goal) for row in runs for goal in row["evaluations"])
    body = [
        [task, f"{float(goal):.0%}", *(evaluations(task, method, goal) for method in ("plain", "credit"))]
        for task, goal in goals
    ]
    costs = [row for row in credit["rows"] if row["figure"] == "cost"]
    said = [
        f"{with_credit['rows']} of {with_credit['sizes'][0]}: {figure(with_credit['multiple'][0], 2)} times the step, "
        f"{figure(with_credit['cosine'] / plain['cosine'], 2)} times the cosine"
        for plain, with_credit in zip(costs[::2], costs[1::2])
    ]
    table = markdown(["task", "held out", "evaluations without", "with credit"], body)
    return f"{table}\n\nBy rows of inputs per call, {'; '.join(said)}."
