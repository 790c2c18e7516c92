"""Many devices and huge populations: nothing changes but where members are computed (laws 5 and 8)."""

import ast
import functools
import math
import re
import signal
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import process
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nesjax
from benchmarks import h100

KEY = jax.random.key(0)
PARAMS = {"w": 0.1 * jax.random.normal(KEY, (6, 4)), "b": jnp.zeros(4), "frozen": jnp.ones(3)}
RULES = {"frozen": nesjax.Frozen(), "w": nesjax.LowRank(), "b": nesjax.Gaussian()}
OPTIMIZER = optax.sgd(1.0)
COMPILED = []  # the compilations of this process, in seconds
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(seconds) if event.endswith("backend_compile_duration") else None
)


def loss_fn(params, x, y):
    loss = jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)
    return loss, (loss, params)


def batch(population: nesjax.Population):
    """Own samples for every member or group, mapped along axes 0 and 1: `[N, 3, 6]` and `[3, N, 4]`."""
    size = population.size // population.group_size
    return jax.random.normal(KEY, (size, 3, 6)), jax.random.normal(jax.random.key(1), (3, size, 4))


def new_state(params=PARAMS):
    return nesjax.TrainState.create(params=params, optimizer=OPTIMIZER, key=KEY)


def make_step(population, **options):
    return nesjax.make_train_step(loss_fn, OPTIMIZER, population, in_axes=(0, 1), has_aux=True, **options)


def mesh_of(count: int, kind=AxisType.Auto) -> Mesh:
    return jax.make_mesh((count,), ("devices",), (kind,), devices=jax.devices()[:count])


def one_step(spread: str, count: int, population: nesjax.Population, **options):
    """The step on `count` devices, as `(params, metrics)` in NumPy."""
    args, split, rows = batch(population), lambda x: x.reshape(count, -1, *x.shape[1:]), P("devices")
    if spread == "mesh":
        out = make_step(population, mesh=mesh_of(count), **options)(new_state(), *args)
    elif spread == "pmap":
        x, y = args
        step = make_step(population, axis_name="devices", **options)
        run = jax.pmap(step, "devices", in_axes=(None, 0, 1), devices=jax.devices()[:count])
        state, metrics = run(new_state(), split(x), y.reshape(3, count, -1, 4))
        aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), metrics.pop("aux"))
        state, metrics = jax.tree.map(lambda leaf: leaf[0], (state, metrics))
        out = state, {**metrics, "aux": aux}
    elif spread == "shard_map":  # the caller's own, with its check that outputs are the same on every device

        def step(state, *args):
            state, metrics = make_step(population, axis_name="devices", **options)(state, *args)
            return state, metrics.pop("aux"), metrics

        run = jax.shard_map(
            step, mesh=mesh_of(count), in_specs=(P(), rows, P(None, "devices")), out_specs=(P(), rows, P())
        )
        state, aux, metrics = jax.jit(run)(new_state(), *args)
        out = state, {**metrics, "aux": aux}
    else:
        out = make_step(population, **options)(new_state(), *args)
    return jax.tree.map(np.asarray, (out[0].params, out[1]))


OPTIONS = {
    "plain": {},
    "pairs, chunks that don't divide": {"antithetic": True, "chunk_size": 3},
    "groups": {"group_size": 4, "chunk_size": 8},
    "groups of pairs": {"group_size": 4, "antithetic": True},
    "an odd number a device, one at a time": {"size": 24, "chunk_size": 1},
    "chunks that don't divide": {"size": 40, "chunk_size": 3},
}


@functools.cache
def on_one_device(name: str):
    options = {key: value for key, value in OPTIONS[name].items() if key != "chunk_size"}
    return one_step("none", 1, nesjax.Population(**{"size": 32, "std": 0.25, "noise": RULES, **options}))


OFTEN = "pairs, chunks that don't divide", "groups"  # run each time, with every way of spreading them
CASES = [
    *((name, "mesh", 8) for name in OPTIONS),
    *(pytest.param(name, "pmap", 4, marks=() if name in OFTEN else pytest.mark.slow) for name in OPTIONS),
    *(pytest.param(name, "shard_map", 8, marks=pytest.mark.slow) for name in ("plain", "groups of pairs")),
    *((name, "none", 1) for name in OPTIONS if "chunk_size" in OPTIONS[name]),
    *((name, "shard_map", 8) for name in OFTEN),
    *((OFTEN[0], "mesh", count) for count in (1, 2)),
    pytest.param(OFTEN[0], "mesh", 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, spread, count", CASES)
def test_devices_and_chunks_change_nothing(name, spread, count):
    """Noise bit for bit, losses within 1e-5, gradients within what summing in another order does in float32.

    Normal values come from the same bits too, but XLA may round the last one of their inverse error function otherwise
    in a loop of another length.
    """
    population = nesjax.Population(**{"size": 32, "std": 0.25, "noise": RULES, **OPTIONS[name]})
    params, metrics = one_step(spread, count, population)
    expected, expected_metrics = on_one_device(name)
    (losses, members), (expected_losses, expected_members) = metrics.pop("aux"), expected_metrics["aux"]
    assert len(losses) == population.size and len(np.unique(members["w"].sum((1, 2)))) > population.size / 4
    np.testing.assert_allclose(members.pop("b"), expected_members["b"], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(members["w"], expected_members["w"])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, expected)
    for metric, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[metric], rtol=1e-4, atol=1e-5, err_msg=metric)


@pytest.mark.parametrize("options", [{"shaping": nesjax.centered_rank}, {"baseline": "unperturbed"}], ids=str)
def test_ranks_and_baselines_use_all_losses(options):
    population = nesjax.Population(32, std=0.25, noise=RULES)
    for a, b in zip(*(jax.tree.leaves(one_step(spread, 8, population, **options)[0]) for spread in ("none", "mesh"))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "params over the other axis"])
def test_a_meshs_other_axes_stay_the_compilers(kind, sharded):
    mesh = jax.make_mesh((4, 2), ("devices", "model"), (kind, kind))
    population, params = nesjax.Population(32, std=0.25, noise=RULES), PARAMS
    if sharded:
        params = {**params, "w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "model")))}
    state, _ = make_step(population, mesh=mesh, axis_name="devices")(new_state(params), *batch(population))
    assert ("model" in state.params["w"].sharding.spec) == sharded
    assert all(state.params[name].sharding.is_fully_replicated for name in ("b", "frozen"))  # as it was
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(on_one_device("plain")[0])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_argument_that_is_whole_on_the_mesh_is_split(kind):
    mesh, population = mesh_of(4, kind), nesjax.Population(32, std=0.25, noise=RULES)
    args = jax.device_put(batch(population), NamedSharding(mesh, P()))
    state, _ = make_step(population, mesh=mesh)(new_state(), *args)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(on_one_device("plain")[0])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_a_second_step_compiles_nothing(kind):
    """Though the state is on one device before the first, and on all of them after it. Members' outputs stay spread."""
    population = nesjax.Population(32, std=0.25, noise=RULES)
    step, args, state = make_step(population, mesh=mesh_of(8, kind)), batch(population), new_state()
    state, _ = step(state, *args)
    before = len(COMPILED)
    for _ in range(2):
        state, metrics = step(state, *args)
    assert before and len(COMPILED) == before
    assert int(state.step) == 3
    losses, members = metrics["aux"]
    assert {shard.data.shape for shard in losses.addressable_shards} == {(4,)}
    assert {shard.data.shape for shard in members["w"].addressable_shards} == {(4, 6, 4)}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_value_and_grad_on_a_mesh():
    population = nesjax.Population(32, std=lambda step: 0.25 + step, noise=RULES)
    one, many = (
        nesjax.value_and_grad(loss_fn, population, in_axes=(0, 1), has_aux=True, mesh=mesh)
        for mesh in (None, mesh_of(8))
    )
    expected = jax.jit(one)(PARAMS, KEY, *batch(population), step=0)
    for run in (many, jax.jit(many)):  # it is jitted by itself, and may be part of a larger program
        got = run(PARAMS, KEY, *batch(population), step=0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
        assert jax.tree.leaves(got[0][1])[0].sharding.spec == P("devices")


def test_steps_on_a_mesh_run_under_scan():
    population = nesjax.Population(32, std=0.25, noise=RULES)
    step, args = make_step(population, mesh=mesh_of(4)), batch(population)
    scanned, _ = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, *args), state, length=2))(new_state())
    state = new_state()
    for _ in range(2):
        state, _ = step(state, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), scanned.params, state.params)


@pytest.mark.parametrize("family", [*(family() for family in nesjax.FAMILIES), nesjax.Permuted("both")], ids=str)
def test_every_family_works_in_the_callers_shard_map(family):
    """With its check, on by default, that what differs between devices is marked so."""
    population, w, x = (
        nesjax.Population(16, std=0.25, noise=family, chunk_size=2),
        PARAMS["w"],
        jax.random.normal(KEY, (16, 3, 6)),
    )
    grad = lambda **axis: nesjax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), population, in_axes=0, **axis)
    rows, mesh = P("devices"), mesh_of(4)
    run = jax.shard_map(grad(axis_name="devices"), mesh=mesh, in_specs=(P(), P(), rows), out_specs=P())
    for a, b in zip(jax.jit(run)(w, KEY, x), jax.jit(grad())(w, KEY, x)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- what crosses devices, and what they hold


def collectives(compiled) -> list[tuple[str, int]]:
    """The operations of a compiled program that talk to other devices, and how many numbers each of them yields."""
    kinds = r"all-reduce|all-gather|reduce-scatter|collective-\w+|all-to-all|ragged-all-to-all"
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(-done)?\(", line):  # not -start: its type lists the operands too
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            found.append((match[2], sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)))
    return found


def compiled_step(mesh: Mesh, population: nesjax.Population, **options):
    """A two-layer network's step on a mesh, from shapes alone, and the number of its parameters."""
    on = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    params = {"a": on((64, 32)), "b": on((32,)), "c": on((32, 10))}
    optimizer = optax.adam(0.1)
    step = nesjax.make_train_step(
        lambda p, x: jnp.mean((jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]) ** 2), optimizer, population, mesh=mesh,
        in_axes=1, shaping=nesjax.centered_rank,
    )  # fmt: skip
    make = lambda params: nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY)
    args = jax.eval_shape(make, params), on((2, population.size // population.group_size, 64), None, mesh.axis_names[0])
    return jax.jit(step).lower(*args).compile(**options), sum(leaf.size for leaf in jax.tree.leaves(params))


def check_collectives(compiled, size: int, members: int):
    """One all-gather of the losses and a sum of the params' size: nothing else, and not twice."""
    found = collectives(compiled)
    gathers = [count for kind, count in found if kind == "all-gather"]
    sums = [count for kind, count in found if kind == "all-reduce"]
    assert len(gathers) + len(sums) == len(found), found
    assert gathers == [members] and sum(sums) == size, found


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_only_losses_and_one_params_sized_sum_cross_devices(kind):
    compiled, size = compiled_step(mesh_of(8, kind), nesjax.Population(512, std=0.1, chunk_size=16))
    check_collectives(compiled, size, 512)


@pytest.mark.gpu_aot
@pytest.mark.skipif(not h100.available(), reason="needs the wheels that benchmarks/h100.py names")
def test_only_losses_and_one_params_sized_sum_cross_four_h100s():
    """XLA compiles for four H100s without one; nothing runs."""
    options = h100.CUBLAS | {"xla_gpu_enable_cub_radix_sort": False}
    population = nesjax.Population(4096, std=0.1, chunk_size=256)
    compiled, size = compiled_step(h100.h100_mesh(4), population, compiler_options=options)
    check_collectives(compiled, size, 4096)


class Transformer(nn.Module):
    """A block that predicts the next token."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 32)(tokens)
        x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x += nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(32)(nn.LayerNorm()(x))


# Which axis of a parameter lies along "model": the first rule that matches.
CUT = {"(out|Dense_1)/kernel|Embed": 0, "kernel": 1, "": None}


def test_sharded_kernels_are_never_gathered():
    """Across devices go losses, a device's share of the gradient, numbers, and activations."""
    mesh = jax.make_mesh((2, 4), ("population", "model"), (AxisType.Auto,) * 2)
    model, tokens = Transformer(), jnp.zeros((8, 1, 5), jnp.int32)
    params = model.init(KEY, tokens[0])["params"]

    def placed(path, leaf):
        axis = next(axis for rule, axis in CUT.items() if re.search(rule, "/".join(entry.key for entry in path)))
        spec = P() if axis is None else P(*(None,) * axis, "model")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = jax.tree.map_with_path(placed, params)
    optimizer = optax.adam(0.1)
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY)
    held = lambda tree: sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
    kernels = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.size >= 32 * 32]
    assert len(kernels) == 3 * 8 and held(kernels) == sum(leaf.size for leaf in kernels) / 4

    def loss_fn(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    step = nesjax.make_train_step(
        loss_fn, optimizer, nesjax.Population(8, std=0.1), in_axes=0, mesh=mesh, axis_name="population"
    )
    tokens = jax.device_put(tokens, NamedSharding(mesh, P("population")))
    found = collectives(jax.jit(step).lower(state, tokens).compile())
    assert {kind for kind, _ in found} == {"all-reduce", "all-gather"}, found  # no permute: words are drawn everywhere
    gathers, sums = ([n for kind, n in found if kind == which] for which in ("all-gather", "all-reduce"))
    assert 8 in gathers and max(gathers) < 32 * 32, found  # the losses, and activations at most
    assert held(kernels) / 3 <= max(sums) <= held(params), found


@pytest.mark.parametrize(
    "chunk, options",
    [
        pytest.param(1024, {}, marks=pytest.mark.slow),
        (1000, {"antithetic": True}),
        pytest.param(1024, {"group_size": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_chunk_bounds_memory(chunk, options):
    """From 2^12 to 2^20 members temporary memory grows by scalars alone, though a member has 512 bytes of input."""
    temp = {}
    for size in (2**12, 2**20):
        population = nesjax.Population(size, std=0.1, chunk_size=chunk, **options)
        one = Mesh(np.array(jax.devices()[:1]), "devices")
        temp[size] = compiled_step(one, population)[0].memory_analysis().temp_size_in_bytes
    assert temp[2**12] > 100_000  # a chunk's activations: the analysis sees them
    assert temp[2**20] - temp[2**12] < 64 * 2**20, temp


# ---- several processes


def start(*what: str) -> list[subprocess.Popen]:
    """Two processes on this machine, with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, process.__file__, str(port)]
    return [
        subprocess.Popen([*command, str(rank), "2", *what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]


@pytest.fixture
def started():
    running = []
    yield lambda *what: running.extend(start(*what)) or running[-2:]
    for each in running:
        each.kill()
        each.wait()


def test_two_processes_train_as_one(started):
    expected = process.train(KEY)
    for each in started("train"):
        output, _ = each.communicate(timeout=120)
        assert each.returncode == 0, output
        result = next(line for line in output.splitlines() if line.startswith("result"))
        np.testing.assert_allclose(ast.literal_eval(result.removeprefix("result ")), expected, rtol=1e-5)


def test_processes_with_other_keys_are_refused(started):
    for each in started("other keys"):
        output, _ = each.communicate(timeout=120)
        assert "refused key must be the same in every process, got [[0, 0], [0, 1]]" in output, output


@pytest.mark.parametrize("dies", [0, 1])
def test_when_a_process_dies_the_other_ends(started, dies):
    """By JAX's own heartbeat, here of 5 seconds: the other one sleeps, so no collective fails."""
    processes = started("stay")
    for each in processes:
        while (line := each.stdout.readline()) and not line.startswith("result"):
            pass
        assert line, "it didn't train"
    processes[dies].kill()
    assert processes[1 - dies].wait(timeout=60) != 0


def test_processes_save_and_end_together_when_one_is_told_to(started, tmp_path):
    """SIGTERM to one of them, twice: each time both have saved the same step, from which they go on."""
    reached = [0]
    for told in (0, 1):
        processes = started("checkpoints", str(tmp_path))
        said = []
        for each in processes:
            while not (line := each.stdout.readline()).startswith("at"):
                assert line, "it didn't train"
            assert line == f"at {reached[-1] + 1}\n"
            said.append(line)
        processes[told].terminate()
        for at, each in enumerate(processes):
            each.wait(timeout=300)  # the pipe holds what little it says
            said[at] += each.stdout.read()
        assert [each.returncode for each in processes] == [128 + signal.SIGTERM] * 2, said
        with nesjax.checkpoint.Run(tmp_path, process.POPULATION) as run:
            reached.append(run.steps[-1])
        for output in said:
            assert [line for line in output.splitlines() if line.startswith("at")][-1] == f"at {reached[-1]}"
    assert reached[2] > reached[1] > 0
