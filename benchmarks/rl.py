"""Returns of a policy in brax against environment steps and seconds: nesjax and evosax's Open_ES.

Both train one network from the same parameters, with the settings of evosax's own notebook (examples/02_rl.ipynb): 256
members in antithetic pairs, centered ranks, Adam from 0.01 down to a tenth and std from 0.05 down to a fifth over 512
generations, normalised observations, and tanh layers 32-32-32-32. Both also run with a quarter of the members, thus
four times the generations: the one setting that was changed, for nesjax, by 17 short runs of the ant on seeds 5 and 6.
Open_ES's members all play the same episode, as there; each of nesjax's pairs has its own. Both play by
`nesjax.rl.rollout`. Smaller than there: an episode per member, not 16, and a shorter one. The ant has no reward for
being alive and goes on after a fall (examples/brax_locomotion.py).

The forward pass and a generation are timed with layers 256-256 too; there no episode ends early. A generation is timed
on one device, with all members at a time and with CHUNK, and with the members spread over DEVICES, which on a CPU are
its cores: there a device runs the many small programs of a physics engine on a core of its own.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import nesjax

from .credit import Net
from .measure import compiled, in_own_process, interleave, summary
from .tables import count, markdown
from .tables import figure as number

OPTIMIZER = optax.adam(optax.exponential_decay(0.01, 512, 0.1))
STD = optax.exponential_decay(0.05, 512, 0.2)
MEMBERS, CHUNK, DEVICES = 256, 64, 2
SMALL, LARGE = (32, 32, 32, 32), (256, 256)
CHECKS, EVERY, FRESH = 8, 2, 32  # evaluations in a run, generations a call, episodes of an evaluation
SETTINGS = {"ant": {"healthy_reward": 0.0, "terminate_when_unhealthy": False}, "inverted_double_pendulum": {}}


class Game(NamedTuple):
    """An environment, a policy for it, and `key -> params`."""

    env: nesjax.rl.Environment
    policy: Callable
    draw: Callable[[jax.Array], Any]


def game(task: str, widths: tuple[int, ...], *, endless: bool = False) -> Game:
    from brax import envs

    env = nesjax.rl.from_brax(envs.get_environment(task, backend="spring", **SETTINGS[task]))
    if endless:
        env = dataclasses.replace(env, step=lambda *args, step=env.step: (*step(*args)[:3], False))
    net = Net((*widths, *env.output_shape), nn.tanh)
    return Game(env, lambda w, obs: jnp.tanh(net.apply(w, obs)), lambda key: net.init(key, jnp.zeros(env.obs_shape)))


class Method(NamedTuple):
    """`step(state, key) -> (state, environment steps)`; `trained(state) -> (params, obs_stats)`."""

    init: Callable[[Any, jax.Array], Any]
    step: Callable
    trained: Callable[[Any], tuple]


def ours(game: Game, members: int, length: int, chunk: int | None = None, mesh: Mesh | None = None) -> Method:
    population = nesjax.Population(members, STD, antithetic=True, chunk_size=chunk)
    train = nesjax.rl.make_rl_step(game.env, game.policy, OPTIMIZER, population, steps=length, mesh=mesh)

    def init(params, key):
        stats = nesjax.rl.ObsStats.create(game.env.obs_shape)
        return nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=key, obs_stats=stats)

    def step(state, key):
        state, metrics = train(state)
        return state, metrics["length"] * members

    return Method(init, step, lambda state: (state.params, state.obs_stats))


def evosax(game: Game, members: int, length: int, chunk: int | None = None, mesh: Mesh | None = None) -> Method:
    from evosax.algorithms import Open_ES

    play = nesjax.rl.rollout(game.env, game.policy, steps=length)
    like = game.draw(jax.random.key(0))
    strategy = Open_ES(members, like, optimizer=OPTIMIZER, std_schedule=STD, metrics_fn=lambda *_: {})
    settings = strategy.default_params

    def init(params, key):
        state = strategy.init(key, params, settings), nesjax.rl.ObsStats.create(game.env.obs_shape)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)  # or the second step compiles anew

    def step(state, key):
        state, stats = state
        key, episode = jax.random.split(key)
        population, state = strategy.ask(key, state, settings)
        if mesh is not None:
            cut = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
            population = jax.lax.with_sharding_constraint(population, cut)
        one = lambda params: play(params, episode, stats)
        many = functools.partial(jax.lax.map, one, batch_size=chunk) if chunk else jax.vmap(one)
        losses, episodes = many(population)
        state, _ = strategy.tell(key, population, losses, state, settings)
        return (state, stats.joined_by(episodes.obs_stats)), episodes.lengths.sum()

    return Method(init, step, lambda state: (strategy.get_mean(state[0]), state[1]))


def quarter(method: Callable) -> Callable:
    return lambda game, members, *settings: method(game, members // 4, *settings)


TIMED = {"nesjax": ours, "evosax Open_ES": evosax}
METHODS = TIMED | {f"{name}, a quarter of the members": quarter(method) for name, method in TIMED.items()}


def cases(quick: bool) -> list[dict]:
    sizes = {"inverted_double_pendulum": (8, 4, 64)} if quick else {
        "ant": (MEMBERS, 100, 1_024_000), "inverted_double_pendulum": (MEMBERS, 500, 3_072_000)
    }  # fmt: skip
    tasks = {task: {"task": task, "members": members} for task, (members, *_) in sizes.items()}
    return [
        *({"figure": "forward", **of, "widths": widths} for of in tasks.values() for widths in (SMALL, LARGE)),
        *({"figure": "generation", **of, "length": min(sizes[task][1], 100)} for task, of in tasks.items()),
        *(
            {"figure": "training", **of, "length": sizes[task][1], "limit": sizes[task][2], "seed": seed}
            for seed in range(1 if quick else 3)
            for task, of in tasks.items()
        ),
    ]


def measure(figure: str, **case) -> Iterator[dict]:
    if figure == "generation" and jax.default_backend() == "cpu":  # which has one device, chosen before all else
        yield from in_own_process(functools.partial(generation_on_cores, **case))
    else:
        yield from {"forward": forward, "generation": generation, "training": training}[figure](**case)


def forward(task: str, members: int, widths: tuple[int, ...]) -> Iterator[dict]:
    """Every member's action for an observation of its own; the noise is drawn, and evosax's members formed, before."""
    env, policy, draw = game(task, widths)
    params, population = draw(jax.random.key(0)), nesjax.Population(members, 0.05, antithetic=True)
    noise = nesjax.sample_noise(jax.random.key(1), params, population)
    formed = jax.jit(jax.vmap(lambda i: nesjax.materialise(params, noise, i)))(jnp.arange(members))
    inputs = [(jax.random.normal(jax.random.key(at), (members, *env.obs_shape)),) for at in range(3)]
    apply = lambda params, noise, obs: nesjax.population_apply(policy, params, noise, obs, in_axes=0, strict=True)
    programs = {}
    for name, function, given in (("nesjax", apply, (params, noise)), ("evosax Open_ES", jax.vmap(policy), (formed,))):
        program, temp = compiled(function, *given, *inputs[0])
        programs[name] = functools.partial(program, *given), temp
    yield from timed(programs, inputs)


def generation_on_cores(**case) -> list[dict]:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    return list(generation(**case))


def generation(task: str, members: int, length: int) -> Iterator[dict]:
    """One generation with layers 256-256 and the same environment steps, in every way."""
    of, key = game(task, LARGE, endless=True), jax.random.key(0)
    inputs, programs = [(jax.random.key(at),) for at in range(2)], {}
    ways: dict[str, dict] = {"": {}, f", {CHUNK} at a time": {"chunk": CHUNK}}
    if len(jax.devices()) >= DEVICES:
        mesh = Mesh(jax.devices()[:DEVICES], ("devices",), axis_types=(AxisType.Auto,))
        ways[f", on {DEVICES} devices"] = {"mesh": mesh}
    for (name, method), (way, settings) in itertools.product(TIMED.items(), ways.items()):
        init, step, _ = method(of, members, length, **settings)
        state = init(of.draw(key), key)
        if "mesh" in settings:
            state = jax.device_put(state, NamedSharding(settings["mesh"], PartitionSpec()))
        program, temp = compiled(step, state, key)
        programs[name + way] = functools.partial(program, state), temp
    yield from timed(programs, inputs)


def timed(programs: dict[str, tuple[Callable, int]], inputs: list[tuple]) -> Iterator[dict]:
    """Seconds of each program, in turns, and XLA's figure for its temporary memory."""
    times = interleave({name: program for name, (program, _) in programs.items()}, inputs, rounds=9, seconds=60)
    for name, (_, temp) in programs.items():
        yield {"method": name, **summary(times[name], times["nesjax"]), "temp_bytes": temp}


@functools.cache
def trainer(name: str, task: str, members: int, length: int) -> tuple[Method, Callable]:
    """A method, and `(state, key) -> (state, environment steps)` of EVERY generations."""
    method = METHODS[name](game(task, SMALL), members, length)

    @jax.jit
    def several(state, key):
        state, steps = jax.lax.scan(method.step, state, jax.random.split(key, EVERY))
        return state, steps.sum()

    return method, several


@functools.cache
def evaluation(task: str, length: int) -> Callable:
    """`(params, obs_stats, key) -> ` the mean return of fresh episodes, the same for every method."""
    env, policy, _ = game(task, SMALL)
    play = nesjax.rl.rollout(env, policy, steps=length, episodes=FRESH)
    return jax.jit(lambda params, stats, key: -play(params, key, stats)[0])


@dataclasses.dataclass
class Run:
    """Training as far as it went; the curve has environment steps, seconds and return."""

    state: Any
    calls: int = 0
    steps: int = 0
    seconds: float = 0.0
    curve: list = dataclasses.field(default_factory=list)

    def go_on(self, several: Callable, key: jax.Array, limit: float) -> None:
        while self.steps < limit:
            start = time.perf_counter()
            self.state, steps = jax.block_until_ready(several(self.state, jax.random.fold_in(key, self.calls)))
            self.seconds += time.perf_counter() - start
            self.calls, self.steps = self.calls + 1, self.steps + round(float(steps))


def training(task: str, members: int, length: int, limit: int, seed: int) -> Iterator[dict]:
    """The methods in turns, an eighth of the environment steps each; compiling and evaluating are off the clock."""
    key, fresh, evaluate = jax.random.key(seed), jax.random.key(seed + 1000), evaluation(task, length)
    params, made = game(task, SMALL).draw(key), {name: trainer(name, task, members, length) for name in METHODS}
    runs = {name: Run(method.init(params, key)) for name, (method, _) in made.items()}
    for name, run in runs.items():
        jax.block_until_ready(made[name][1](run.state, key))
    for check in range(CHECKS + 1):
        for name, run in runs.items():
            run.go_on(made[name][1], key, check * limit / CHECKS)
            reached = float(evaluate(*made[name][0].trained(run.state), fresh))
            run.curve.append([run.steps, round(run.seconds, 3), round(reached, 2)])
    for name, run in runs.items():
        yield {"method": name, "generations": run.calls * EVERY, "curve": run.curve}


def table(results: dict) -> str:
    """Returns after parts of the environment steps (median and range of the seeds), then what a policy costs."""
    rows = results["rows"]
    tables = [table_of_runs([row for row in rows if row["figure"] == "training"])]
    tables.append(table_of_costs([row for row in rows if row["figure"] != "training"]))
    return "\n\n".join(filter(None, tables))


def table_of_runs(rows: list[dict]) -> str:
    lines = []
    for task, name in dict.fromkeys((row["task"], row["method"]) for row in rows):
        curves = [row["curve"] for row in rows if (row["task"], row["method"]) == (task, name)]
        median = lambda at, part: statistics.median(curve[at][part] for curve in curves)  # noqa: B023
        cells = []
        for at in (0, CHECKS // 4, CHECKS // 2, CHECKS):
            ends = [curve[at][2] for curve in curves]
            cells.append(f"{median(at, 2):,.0f} ({min(ends):,.0f} to {max(ends):,.0f}) at {median(at, 0) / 1e3:,.0f}k")
        lines.append([task, name, *cells, number(median(CHECKS, 1))])
    header = ["environment", "method", "return at environment steps", "", "", "", "seconds"]
    return markdown(header, lines) if lines else ""


def table_of_costs(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        widths = "-".join(map(str, row.get("widths", LARGE)))
        what = "forward pass" if row["figure"] == "forward" else f"generation, {row['length']} steps"
        cost = [number(row["seconds"][0] * 1e3), number(row["multiple"][0]), count(row["temp_bytes"])]
        lines.append([row["task"], widths, what, row["method"], *cost])
    header = ["environment", "layers", "of all members", "method", "ms", "times nesjax", "temporary memory"]
    return markdown(header, lines)
