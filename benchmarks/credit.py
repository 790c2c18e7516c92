"""Network evaluations and seconds to a held-out accuracy, with `credit="inputs"` and without; and what credit costs.

Every method runs at the settings that needed fewest evaluations in pilots, mostly on seed 0: learning rates 0.0005 to
0.03, std 0.003 to 0.3; pairs, groups of 4 to 32 members on the same samples, or the unperturbed network as baseline;
512 or 1,024 members; 1 or 8 samples per member. All use Adam, or `optax.contrib.muon`, with a constant rate, b2 = 0.99.
evosax's Open_ES has the settings of `peers` instead.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import nesjax

from .accuracy import load
from .measure import compiled, interleave, summary
from .peers import Method, open_es
from .tables import figure as number
from .tables import markdown

DEFAULT = nesjax.LowRank()
B2, EVERY = 0.99, 4  # generations between evaluations
COSTS = [([64, 256, 256, 10], 1), ([784, 1024, 1024, 10], 1)]
COSTS += [([256, 256, 256, 10], rows) for rows in (1, 8, 32, 128)]


def sign(x):
    return jnp.where(x < 0, -1.0, 1.0)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def error(logits, labels):
    return (logits.argmax(-1) != labels).mean()


class Net(nn.Module):
    widths: tuple[int, ...]
    activation: Callable

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class Task(NamedTuple):
    """What a network of two hidden layers, 256 wide, learns, after `warm` batches of 32 by backpropagation."""

    data: str
    goals: tuple[float, ...]  # held-out accuracies
    activation: Callable = nn.elu
    loss: Callable = cross_entropy
    warm: int = 0


TASKS = {
    "digits": Task("digits", (0.9, 0.93, 0.95)),
    "digits, sign activations": Task("digits", (0.8, 0.9), activation=sign),
    "digits, 0/1 error from a warm start": Task("digits", (0.93,), loss=error, warm=8),
    "digits, 0/1 error from scratch": Task("digits", (0.8, 0.9), loss=error),
    "MNIST, 5,000 images": Task("MNIST", (0.8, 0.85, 0.9)),
}
METHODS = {"plain": None, "credit": "inputs"}
SHARING = {1: "unperturbed baseline", 2: "pairs"}  # by how many members share samples
RECIPES = {  # members, samples per member, members that share samples, learning rate, std
    "digits": {
        "plain": (1024, 1, 8, 0.003, 0.03),
        "plain, Muon": (1024, 1, 8, 0.02, 0.02),
        "credit": (512, 1, 8, 0.002, 0.01),
        "credit, Muon": (512, 1, 8, 0.03, 0.01),
        "evosax Open_ES": (1024, 8, 2, 0.01, 0.02),
    },
    "digits, sign activations": {
        "plain": (1024, 8, 16, 0.01, 0.03),
        "credit": (512, 1, 8, 0.0015, 0.03),
        "credit, Muon": (512, 1, 8, 0.01, 0.03),
        "evosax Open_ES": (1024, 8, 2, 0.01, 0.02),
    },
    "digits, 0/1 error from a warm start": {
        "plain": (1024, 1, 8, 0.003, 0.02),
        "credit": (512, 1, 8, 0.001, 0.03),
        "evosax Open_ES": (1024, 8, 2, 0.01, 0.02),
    },
    "digits, 0/1 error from scratch": {
        "plain": (1024, 1, 8, 0.01, 0.03),
        "credit": (512, 1, 8, 0.002, 0.03),
        "evosax Open_ES": (1024, 8, 2, 0.01, 0.02),
    },
    "MNIST, 5,000 images": {
        "plain": (1024, 1, 8, 0.003, 0.02),
        "credit": (1024, 1, 8, 0.0005, 0.01),
        "credit, Muon": (1024, 1, 8, 0.01, 0.01),
        "evosax Open_ES": (1024, 8, 2, 0.01, 0.02),
    },
}
FIELDS = ("members", "samples", "group", "rate", "std")
LIMIT = 400_000  # evaluations in a run


def cases(quick: bool) -> list[dict]:
    if quick:
        small = {"members": 32, "seeds": 1, "limit": 1000}
        return [
            {"figure": "cost", "sizes": [16, 32, 10], "rows": 2, "members": 32},
            {"figure": "generation", "task": "digits", "methods": ["plain", "credit"], "members": 32},
            *({"figure": "training", "task": "digits", "method": method, **small} for method in ("plain", "credit")),
        ]
    return [
        *({"figure": "cost", "sizes": sizes, "rows": rows, "members": 512} for sizes, rows in COSTS),
        *({"figure": "generation", "task": task, "methods": list(RECIPES[task])} for task in TASKS),
        *(
            {"figure": "training", "task": task, "method": method, "seeds": 3, "limit": LIMIT}
            for task in TASKS
            for method in RECIPES[task]
        ),
    ]


def measure(figure: str, **case) -> Iterator[dict]:
    yield from {"cost": cost, "generation": generation, "training": training}[figure](**case)


class Setting(NamedTuple):
    init: Callable[[Any, jax.Array], Any]  # of parameters and a key: the state
    several: Callable  # (state, images, labels, key) -> the state after EVERY generations
    accuracy: Callable  # of a state, images and labels
    evaluations: int  # of one sample by one network, per generation


def setting(
    task: Task, method: str, *, members: int, samples: int, group: int, rate: float, std: float,
    noise: nesjax.NoiseFamily = DEFAULT,
) -> Setting:  # fmt: skip
    net = Net((256, 256, 10), task.activation)
    optimizer = optax.contrib.muon(rate, adam_b2=B2) if "Muon" in method else optax.adam(rate, b2=B2)
    loss_fn = lambda params, x, labels: task.loss(net.apply(params, x), labels)
    if method == "evosax Open_ES":
        params = net.init(jax.random.key(0), load(task.data, 0)[0][0][:1])
        made = open_es(loss_fn, params, members, shared=False, optimizer=optimizer, std=std)
    else:
        made = ours(loss_fn, optimizer, members, samples, group, std, "credit" in method, noise)

    @jax.jit
    def several(state, images, labels, key):
        def one(state, key):
            drawn, own = jax.random.split(key)
            rows = jax.random.randint(drawn, (members // group, samples), 0, len(images))
            return made.step(state, images[rows], labels[rows], own), None

        return jax.lax.scan(one, state, jax.random.split(key, EVERY))[0]

    @jax.jit
    def accuracy(state, images, labels):
        return (net.apply(made.params(state), images).argmax(-1) == labels).mean()

    return Setting(made.init, several, accuracy, members * samples * (2 if group == 1 else 1))


def ours(
    loss_fn, optimizer, members: int, samples: int, group: int, std: float, credit: bool, noise: nesjax.NoiseFamily
) -> Method:
    population = nesjax.Population(members, std, antithetic=group == 2, group_size=group, noise=noise)
    train = nesjax.make_train_step(
        loss_fn, optimizer, population, baseline="unperturbed" if group == 1 else "mean", in_axes=0,
        credit="inputs" if credit else None, samples=samples if credit else None,
    )  # fmt: skip

    create = lambda params, key: nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)
    return Method(create, lambda state, x, labels, key: train(state, x, labels)[0], lambda state: state.params)


def start(task: Task, seed: int) -> tuple:
    """First parameters, and images and labels: for training, and held out; inputs of unit variance."""
    (images, labels), (test_images, test_labels) = load(task.data, seed)
    scale = images.std()
    train, held_out = (images / scale, labels), (test_images / scale, test_labels)
    net, optimizer, key = Net((256, 256, 10), task.activation), optax.adam(1e-3), jax.random.key(seed)
    params = net.init(key, train[0][:1])

    def one(carry, key):
        rows = jax.random.randint(key, (32,), 0, len(images))
        grads = jax.grad(lambda params: cross_entropy(net.apply(params, train[0][rows]), labels[rows]))(carry[0])
        updates, opt_state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), opt_state), None

    warm = jax.jit(lambda params: jax.lax.scan(one, (params, optimizer.init(params)), jax.random.split(key, task.warm)))
    return warm(params)[0][0] if task.warm else params, train, held_out


def training(task: str, method: str, seeds: int, limit: int, **changes) -> Iterator[dict]:
    """A row per seed: network evaluations until each held-out accuracy, at most `limit`."""
    goals = TASKS[task].goals
    recipe = dict(zip(FIELDS, RECIPES[task][method])) | changes
    made, program = setting(TASKS[task], method, **recipe), None
    for seed in range(seeds):
        params, train, held_out = start(TASKS[task], seed)
        key = jax.random.key(seed + 1000)
        state = made.init(params, key)
        program = program or made.several.lower(state, *train, key).compile()
        curve = []
        while len(curve) * EVERY * made.evaluations < limit:
            state = program(state, *train, jax.random.fold_in(key, len(curve)))
            curve.append(round(float(made.accuracy(state, *held_out)), 4))
            if curve[-1] >= max(goals):
                break
        reached = {str(goal): next((at for at, found in enumerate(curve, 1) if found >= goal), None) for goal in goals}
        yield {
            "seed": seed,
            **recipe,
            "generations": {goal: at and at * EVERY for goal, at in reached.items()},
            "evaluations": {goal: at and at * EVERY * made.evaluations for goal, at in reached.items()},
            "accuracy": max(curve),
        }


def generation(task: str, methods: list[str], **changes) -> Iterator[dict]:
    """Seconds per generation, all methods of a task in turns."""
    params, train, _ = start(TASKS[task], 0)
    key = jax.random.key(0)
    functions = {}
    for method in methods:
        made = setting(TASKS[task], method, **dict(zip(FIELDS, RECIPES[task][method])) | changes)
        functions[method] = functools.partial(made.several, made.init(params, key), *train)
    inputs = [(jax.random.key(at),) for at in range(2)]
    times = interleave(functions, inputs, rounds=9, seconds=45)
    for method, taken in times.items():
        yield {"method": method, **summary([seconds / EVERY for seconds in taken], [s / EVERY for s in times["plain"]])}


def cost(sizes: list[int], rows: int, members: int) -> Iterator[dict]:
    """The step with credit as a multiple of the plain one, and both gradients' cosines to backpropagation's."""
    net, key, optimizer = Net(tuple(sizes[1:]), nn.relu), jax.random.key(0), optax.sgd(1.0)  # an update is a gradient
    params = net.init(key, jnp.zeros((1, sizes[0])))
    loss_fn = lambda params, x, labels: cross_entropy(net.apply(params, x), labels)
    population = nesjax.Population(members, std=0.01, antithetic=True, group_size=2)  # partners share their samples

    @jax.jit
    def draw(key):
        x = jax.random.normal(key, (members // 2, rows, sizes[0]))
        return x, jax.random.randint(key, x.shape[:2], 0, sizes[-1])

    inputs = [draw(jax.random.key(at)) for at in range(4)]
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)
    step = lambda credit: nesjax.make_train_step(loss_fn, optimizer, population, in_axes=0, credit=credit)
    programs = {name: compiled(step(credit), state, *inputs[0]) for name, credit in METHODS.items()}
    truth = jax.jit(jax.grad(lambda params, x, labels: jax.vmap(functools.partial(loss_fn, params))(x, labels).mean()))
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    cosine = lambda a, b: float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    functions = {name: functools.partial(program, state) for name, (program, _) in programs.items()}
    times = interleave(functions, inputs, rounds=15, seconds=20)
    for name, run in functions.items():
        found = [(flat(params) - flat(run(*drawn)[0].params), flat(truth(params, *drawn))) for drawn in inputs]
        yield {
            "method": name,
            **summary(times[name], times["plain"]),
            "temp_bytes": programs[name][1],
            "cosine": round(statistics.mean(cosine(*pair) for pair in found), 4),
        }


def table(results: dict) -> str:
    """Evaluations and seconds to the goals (medians over seeds), then what a step with credit costs and gives."""
    rows = results["rows"]
    return f"{goals_table(rows)}\n\n{cost_table([row for row in rows if row['figure'] == 'cost'])}"


def goals_table(rows: list[dict]) -> str:
    """A line for each task and method: thousands of evaluations, and seconds: generations times their median time."""
    seconds = {(row["task"], row["method"]): row["seconds"][0] for row in rows if row["figure"] == "generation"}
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows if row["figure"] == "training"):
        for method in dict.fromkeys(row["method"] for row in rows if row.get("task") == task and "seed" in row):
            runs = [row for row in rows if (row.get("task"), row.get("method")) == (task, method) and "seed" in row]
            reached = []
            for goal in runs[0]["evaluations"]:
                evaluations, generations = (
                    sorted(run[name][goal] or math.inf for run in runs)[len(runs) // 2]
                    for name in ("evaluations", "generations")
                )
                cell = f"{number(evaluations / 1e3)}k, {number(generations * seconds[task, method], 2)} s"
                reached.append(f"{float(goal):.0%}: {cell if evaluations < math.inf else 'not reached'}")
            first = runs[0]
            setting = f"N {first['members']}, B {first['samples']}, {SHARING.get(first['group'], 'groups of {}')}, "
            setting = setting.format(first["group"]) + f"lr {first['rate']:g}, std {first['std']:g}"
            accuracy = f"{statistics.median(run['accuracy'] for run in runs):.3f} in {first['limit'] // 1000}k"
            lines.append([task, method, setting, "<br>".join(reached), accuracy])
    return markdown(["task", "method", "settings", "evaluations and seconds to", "best held out"], lines)


def cost_table(rows: list[dict]) -> str:
    lines = []
    for plain, credit in zip(rows[::2], rows[1::2]):
        widths = "-".join(map(str, plain["sizes"]))
        lines.append([
            widths, str(plain["rows"]), number(plain["seconds"][0] * 1e3), number(credit["multiple"][0]),
            *(f"{row['cosine']:.3f}" for row in (plain, credit)),
        ])  # fmt: skip
    return markdown(
        ["network", "rows per call", "plain step, ms", "step with credit in pairs, times", "cosine", "with credit"],
        lines,
    )
