"""Credit by inputs: against the projection of materialised members, in NumPy, and against the plain estimate."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import each_family
from flax import nnx

import nesjax
from nesjax import CreditWarning

STD, SIZE = 0.01, 8


class Log:
    """Products whose inputs are remembered: what the reference projects on, found without nesjax."""

    def __init__(self):
        self.inputs = {}

    def __call__(self, name, x, w):
        self.inputs.setdefault(name, []).append(np.asarray(x, np.float64).reshape(-1, w.shape[-2]))
        return x @ w


def plain(name, x, w):
    return x @ w


def mlp(params, x, dot=plain):
    return jnp.sum(jnp.tanh(dot("b", jnp.tanh(dot("a", x, params["a"])), params["b"])) ** 2)


def attention(params, x, dot=plain):
    """A transformer block on 8 tokens, `x: [8, 12]`."""
    q, k, v = (dot(name, x, params[name]) for name in "qkv")
    x = x + dot("o", jax.nn.softmax(q @ k.T / 2) @ v, params["o"])
    return jnp.sum(jnp.sin(x + dot("down", jax.nn.gelu(dot("up", x, params["up"])), params["down"])))


def gru(params, x, dot=plain):
    """A recurrent cell by `lax.scan` over `x: [T, 12]`, or by a Python loop where inputs are remembered."""

    def cell(h, row):
        z = jax.nn.sigmoid(dot("u", h, params["u"]) + dot("w", row, params["w"]))
        return z * h + (1 - z) * jnp.tanh(dot("v", row, params["v"])), None

    h = jnp.ones(12) / 3
    if dot is plain:
        h, _ = jax.jit(lambda h, x: jax.lax.scan(cell, h, x))(h, x)
    else:
        for row in x:
            h, _ = cell(h, row)
    return jnp.sum(h**2)


def residual(params, x, dot=plain):
    """Layers stacked along the first axis, by `lax.scan`; each is fed a sequence by a scan of its own."""

    def layer(x, w):
        _, y = jax.lax.scan(lambda h, row: (h + row, jnp.tanh(row @ w)), x[0], x)
        return x + y, None

    if dot is plain:
        x, _ = jax.lax.scan(layer, x, params["layers"])
    else:
        for at, w in enumerate(params["layers"]):
            x = x + jnp.tanh(dot(f"layers {at}", x, w))
    return jnp.sum(x**2)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1], use_bias=False)(x)), None


def linen_scan(params, x, dot=plain):
    """The same layers by Flax's `nn.scan`."""
    if dot is not plain:
        return residual(params, x, dot)
    layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    return jnp.sum(layers.apply({"params": {"Dense_0": {"kernel": params["layers"]}}}, x, None)[0] ** 2)


def experts(params, x, dot=plain):
    """One product for a stack of matrices, each with inputs of its own."""
    x = jnp.stack([x, jnp.sin(x)])
    if dot is plain:
        return jnp.sum(jnp.einsum("eti,eio->eto", x, params["layers"]) ** 2)
    return sum(jnp.sum(dot(f"layers {at}", x[at], w) ** 2) for at, w in enumerate(params["layers"]))


def convolution(params, x, dot=plain):
    """A 3 x 3 convolution of a 4 x 4 image: 16 patches of 27 inputs."""
    x = x.reshape(1, 4, 4, 3)
    if dot is plain:
        dims = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=dims) ** 2)
    padded = jnp.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    patches = jnp.stack([padded[i : i + 3, j : j + 3].reshape(-1) for i in range(4) for j in range(4)])
    return jnp.sum(dot("k", patches, params["k"].reshape(27, -1)) ** 2)


def embedding(params, x, dot=plain):
    """Rows of a table, one of them twice."""
    rows = jnp.argsort(x)[jnp.array([0, 1, 1, 2])]
    if dot is plain:
        return jnp.sum(jnp.sin(params["table"][rows] * jnp.arange(1, 5)[:, None]))
    return jnp.sum(jnp.sin(dot("table", np.eye(12)[rows], params["table"]) * np.arange(1, 5)[:, None]))


def matrices(*shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {name: jax.random.normal(key, shape) / shape[-2] ** 0.5 for key, (name, *shape) in zip(keys, shapes)}


MODELS = {
    "mlp": (mlp, matrices(("a", 12, 7), ("b", 7, 5)), (12,)),
    "attention": (attention, matrices(*((n, 12, 12) for n in "qkvo"), ("up", 12, 20), ("down", 20, 12)), (8, 12)),
    "gru": (gru, matrices(*((n, 12, 12) for n in "uvw")), (5, 12)),
    "stacked": (residual, matrices(("layers", 3, 12, 12)), (4, 12)),
    "stacked by nn.scan": (linen_scan, matrices(("layers", 3, 12, 12)), (4, 12)),
    "experts": (experts, matrices(("layers", 2, 12, 7)), (4, 12)),
    "convolution": (convolution, matrices(("k", 3, 3, 3, 6)), (48,)),
    "embedding": (embedding, matrices(("table", 12, 7)), (12,)),
}
STACKED = {"layers": nesjax.Stacked(axes=1)}


def projections(params, loss, x, member, partner=None):
    """A member's `X^+ X (member - params)`, signed and in units of std: a tree like params, in float64.

    With a partner, which has the same samples, X is the mean of their rows.
    """
    logs = [Log() for _ in (member, partner)]
    for log, theta in zip(logs, (member, member if partner is None else partner)):
        loss(theta, x, log)

    def project(name, theta):
        rows, e = sum(np.concatenate(log.inputs[name]) for log in logs) / 2, np.asarray(theta, np.float64)
        return np.linalg.pinv(rows) @ rows @ e.reshape(rows.shape[1], -1)

    def of_leaf(name, w):
        e = (np.asarray(member[name], np.float64) - np.asarray(params[name], np.float64)) / STD
        if name == "layers":
            return np.stack([project(f"layers {at}", e[at]) for at in range(len(e))])
        return project(name, e).reshape(w.shape)

    return {name: of_leaf(name, w) for name, w in params.items()}


def reference(params, loss, x, population, key, weights):
    """`sum_i weights[i] P_i`, with weights `[N]` or `[N, K]` of the members' calls."""
    noise = nesjax.sample_noise(key, params, population)
    members = jax.jit(jax.vmap(lambda i: nesjax.materialise(params, noise, i)))(jnp.arange(SIZE))
    total = {name: np.zeros(w.shape) for name, w in params.items()}
    weights = weights.reshape(SIZE, -1)
    group = SIZE // len(x)
    thetas = [jax.tree.map(lambda leaf: np.asarray(leaf[i]), members) for i in range(SIZE)]  # noqa: B023
    for i, theta in enumerate(thetas):
        partner = thetas[i ^ 1] if population.antithetic and group > 1 else None
        for k in range(weights.shape[1]):
            mine = x[i // group] if weights.shape[1] == 1 else x[i // group][k]
            for name, p in projections(params, loss, mine, theta, partner).items():
                total[name] += weights[i, k] * p
    return total


def pairs(weights):
    """Partners share their weights' difference: their noise is opposite, and so is the sign that it has here."""
    half = (weights[0::2] - weights[1::2]) / 2
    return np.stack([half, -half], 1).reshape(weights.shape)


def assert_close(grads, expected, bound=1e-5):
    for name, want in expected.items():
        np.testing.assert_allclose(grads[name], want, rtol=0, atol=bound * np.abs(want).max(), err_msg=name)


def losses_of(params, loss, x, population, key):
    noise = nesjax.sample_noise(key, params, population)
    run = jax.jit(lambda params, x: nesjax.population_apply(loss, params, noise, x, in_axes=0))
    return np.asarray(run(params, x), np.float64)


@pytest.mark.parametrize("antithetic", (False, True))
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_projection(name, antithetic):
    loss, params, shape = MODELS[name]
    noise = STACKED if "layers" in params else nesjax.LowRank()
    population = nesjax.Population(size=SIZE, std=STD, antithetic=antithetic, noise=noise)
    x, key = jax.random.normal(jax.random.key(1), (SIZE, *shape)), jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, population, credit="inputs", baseline=None, in_axes=0)
    value, grads = jax.jit(es_grad)(params, key, x)
    losses = losses_of(params, loss, x, population, key)
    weights = pairs(losses) if antithetic else losses
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    assert_close(grads, reference(params, loss, x, population, key, weights / SIZE / STD), 3e-5)


def mean(losses):
    return losses - losses.mean(0)


OPTIONS = {
    "mean": ({"baseline": "mean"}, {}, mean),
    "leave one out": ({"baseline": "leave_one_out"}, {}, lambda losses: mean(losses) * SIZE / (SIZE - 1)),
    "leave one out, pairs": (
        {"baseline": "leave_one_out"}, {"antithetic": True}, lambda losses: pairs(mean(losses) * SIZE / (SIZE - 1)),
    ),
    "groups": (
        {"baseline": "mean"}, {"group_size": 4}, lambda losses: np.concatenate([*map(mean, np.split(losses, 2))]),
    ),
    "groups of pairs": ({"baseline": "mean"}, {"group_size": 4, "antithetic": True}, pairs),
    "ranks": ({"shaping": nesjax.centered_rank}, {}, None),
    "ranks, pairs": ({"shaping": nesjax.centered_rank}, {"antithetic": True}, None),
    "signs of pairs": ({"shaping": nesjax.pair_sign}, {"antithetic": True}, None),
    "unperturbed": ({"baseline": "unperturbed"}, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name, samples, chunk_size", [
    *((name, 3, 6) for name in OPTIONS),
    *(pytest.param(name, None, None, marks=() if name in ("mean", "ranks, pairs") else pytest.mark.slow)
      for name in OPTIONS),
])  # fmt: skip
def test_options(name, samples, chunk_size):
    """Baselines, shapings, pairs, groups and several samples, whole or in chunks (of which one needn't divide)."""
    options, settings, weigh = OPTIONS[name]
    population = nesjax.Population(size=SIZE, std=STD, chunk_size=chunk_size, **settings)
    loss, params, _ = MODELS["mlp"]
    slices = SIZE // population.group_size
    x = jax.random.normal(jax.random.key(1), (slices, *(() if samples is None else (samples,)), 12))
    key = jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, population, credit="inputs", samples=samples, in_axes=0, **options)
    value, grads = jax.jit(es_grad)(params, key, x)
    calls = loss if samples is None else jax.vmap(loss, (None, 0))
    losses = losses_of(params, calls, x, population, key)
    if name == "unperturbed":
        weights = losses - np.asarray(jax.vmap(calls, (None, 0))(params, x), np.float64)
    elif weigh is not None:
        weights = weigh(losses)
    else:  # sample by sample
        columns = jnp.asarray(losses.reshape(SIZE, -1).T)
        weights = np.asarray(jax.vmap(options["shaping"])(columns), np.float64).T.reshape(losses.shape) * STD
        weights = pairs(weights) if population.antithetic else weights
    expected = reference(params, loss, x, population, key, weights / SIZE / STD / (samples or 1))
    assert_close(grads, expected, 1e-4)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)


@each_family
def test_every_family(family):
    """No family knows of credit: the noise's own product is all it needs."""
    loss, params, _ = MODELS["mlp"]
    population = nesjax.Population(size=SIZE, std=STD, noise=family)
    x, key = jax.random.normal(jax.random.key(1), (SIZE, 12)), jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, population, credit="inputs", baseline=None, in_axes=0)
    _, grads = jax.jit(es_grad)(params, key, x)
    losses = losses_of(params, loss, x, population, key)
    assert_close(grads, reference(params, loss, x, population, key, losses / SIZE / STD), 1e-4)


# ---- what is expected of it


def batch_norm(params, x):
    """A layer whose samples meet in a batch norm, 4 of them a call."""
    h = x @ params["a"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)
    return jnp.mean(jnp.tanh(h @ params["b"]) * jnp.arange(4.0)[:, None])


def ranking(params, x):
    """Every pair of a call's samples is compared."""
    score = jnp.tanh(x @ params["a"]) @ params["b"]
    wanted = x.sum(-1)
    return jnp.mean(jax.nn.softplus(-(score[:, None, 0] - score[None, :, 0]) * jnp.sign(wanted[:, None] - wanted)))


@pytest.mark.parametrize("loss", (batch_norm, ranking))
def test_its_expectation_is_the_gradient(loss):
    """Along random directions, over 200 draws, within 4 standard errors; and it varies less than the plain estimate."""
    params, x = MODELS["mlp"][1], jax.random.normal(jax.random.key(1), (4, 12))
    population = nesjax.Population(size=128, std=1e-3, antithetic=True, noise=nesjax.LowRank(values="normal"))
    true = ravel(jax.grad(loss)(params, x))
    along = jnp.concatenate([true[None], jax.random.normal(jax.random.key(3), (7, true.size))])
    spread = {}
    for credit in (None, "inputs"):
        es_grad = nesjax.value_and_grad(loss, population, credit=credit)
        draws = jax.jit(lambda keys: jax.lax.map(lambda key: along @ ravel(es_grad(params, key, x)[1]), keys))  # noqa: B023
        found = np.asarray(draws(jax.random.split(jax.random.key(4), 200)), np.float64)
        error = found.std(0) / np.sqrt(len(found))
        assert (np.abs(found.mean(0) - np.asarray(along @ true)) < 4 * error + 1e-4).all(), credit
        spread[credit] = found.std(0).mean()
    assert spread["inputs"] < 0.8 * spread[None]


def ravel(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


# ---- where it can't be had


def tied(params, x):
    return jnp.sum(jnp.tanh(x @ params["a"]) @ params["a"].T)


def branch(params, x):
    return jax.lax.cond(x.sum() > 0, lambda w: jnp.sum(x @ w), lambda w: jnp.sum(x @ w) * 2, params["a"])


def penalised(params, x):
    return jnp.sum(x @ params["a"]) + jnp.sum(jnp.exp(params["a"]))


def indexed(params, x):
    return jnp.sum(x @ params["layers"][0]) + jnp.sum(jnp.sin(x) @ params["layers"][1])


FALLBACKS = {
    "as many rows as inputs": (
        MODELS["mlp"][0],
        MODELS["mlp"][1],
        (12, 12),
        ["a (12 rows of 12 inputs)", "b (12 rows"],
    ),
    "a matrix and its transpose": (tied, matrices(("a", 12, 12)), (2, 12), ["a (used in several ways)"]),
    "a branch": (branch, matrices(("a", 12, 12)), (2, 12), ["a (used inside cond)"]),
    "elementwise": (penalised, matrices(("a", 12, 12)), (2, 12), ["a (formed as a whole)"]),
    "an indexed stack": (indexed, matrices(("layers", 2, 12, 12)), (2, 12), ["layers (its stack is indexed"]),
}


@pytest.mark.filterwarnings("ignore::nesjax.MaterialiseWarning")
@pytest.mark.parametrize("name", FALLBACKS)
def test_the_plain_estimate_elsewhere(name):
    """The same gradient as without credit, and a warning that says for which parameter and why."""
    loss, params, shape, reasons = FALLBACKS[name]
    population = nesjax.Population(size=SIZE, std=STD, noise=STACKED if "layers" in params else nesjax.LowRank())
    args = params, jax.random.key(2), jax.random.normal(jax.random.key(1), (SIZE, *shape))
    with pytest.warns(CreditWarning) as caught:
        _, grads = jax.jit(nesjax.value_and_grad(loss, population, credit="inputs", in_axes=0))(*args)
    (message,) = {str(warning.message) for warning in caught if warning.category is CreditWarning}
    assert all(reason in message for reason in reasons), message
    _, expected = jax.jit(nesjax.value_and_grad(loss, population, in_axes=0))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, expected)


def test_equal_and_empty_rows_are_no_trouble():
    """Rows that repeat count once, rows of zeros not at all, in a solve that stays finite."""
    params = matrices(("a", 12, 7))
    x = jax.random.normal(jax.random.key(1), (SIZE, 1, 12))
    rows = jnp.concatenate([x, x, 2 * x, 0 * x], 1)
    population, key = nesjax.Population(size=SIZE, std=STD), jax.random.key(2)

    def grads(x, loss):
        return jax.jit(nesjax.value_and_grad(loss, population, credit="inputs", in_axes=0))(params, key, x)[1]["a"]

    one = grads(x, lambda params, x: jnp.sum(jnp.sin(x @ params["a"])))
    several = grads(rows, lambda params, x: jnp.sum(jnp.sin((x @ params["a"])[:1])))
    np.testing.assert_allclose(several, one, atol=0.02 * np.abs(one).max())
    assert not grads(0 * rows, lambda params, x: jnp.sum(x @ params["a"]) + 1).any()


# ---- in company


def tokens(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2), x


@pytest.mark.parametrize("antithetic, options, chunk_size", [
    (True, {}, 3),
    (False, {"shaping": nesjax.centered_rank}, 3),
    pytest.param(True, {}, None, marks=pytest.mark.slow),
    pytest.param(False, {"shaping": nesjax.centered_rank}, None, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("spread, count", [("mesh", 8), ("pmap", 4), ("shard_map", 8)])
def test_devices_change_nothing(spread, count, antithetic, options, chunk_size):
    population = nesjax.Population(32, std=0.1, antithetic=antithetic, chunk_size=chunk_size)
    params, key, x = {"w": jnp.ones((6, 4)) / 3}, jax.random.key(0), jax.random.normal(jax.random.key(1), (32, 2, 6))
    make = lambda **more: nesjax.value_and_grad(
        tokens, population, in_axes=0, credit="inputs", has_aux=True, **options, **more
    )
    (loss, aux), expected = jax.jit(make())(params, key, x)
    np.testing.assert_array_equal(aux, x)
    devices = jax.make_mesh((count,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])
    if spread == "mesh":
        (value, aux), grads = make(mesh=devices)(params, key, x)
    elif spread == "pmap":
        run = jax.pmap(make(axis_name="d"), "d", in_axes=(None, None, 0), devices=jax.devices()[:count])
        (value, aux), grads = run(params, key, x.reshape(count, -1, 2, 6))
        value, grads = jax.tree.map(lambda leaf: leaf[0], (value, grads))
    else:
        specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")
        run = jax.shard_map(
            make(axis_name="d"), mesh=devices, in_specs=(specs[0], specs[0], specs[1]), out_specs=(specs, specs[0])
        )
        (value, aux), grads = jax.jit(run)(params, key, x)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"antithetic": True}, {"group_size": 8}, {"shaping": nesjax.centered_rank}], ids=str
)
def test_a_chunk_bounds_memory(options):
    """From 2^12 to 2^18 members, in the compiled program, temporary memory grows by less than 64 bytes a member."""
    shaping = options.get("shaping")
    settings = {name: value for name, value in options.items() if name != "shaping"}
    params = {"w": jnp.ones((64, 64))}

    def temporary(size):
        population = nesjax.Population(size, std=0.1, chunk_size=256, **settings)
        es_grad = nesjax.value_and_grad(
            lambda params, x: jnp.sum(jnp.sin(x @ params["w"])), population, credit="inputs", shaping=shaping, in_axes=0
        )
        x = jax.ShapeDtypeStruct((size // population.group_size, 64), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.jit(es_grad).lower(params, key, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2**18) - temporary(2**12) < 64 * (2**18 - 2**12)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.sign(nn.Dense(16)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.two(jnp.sign(self.one(x)))


class Equinox(eqx.Module):
    one: eqx.nn.Linear
    two: eqx.nn.Linear

    def __init__(self, key):
        self.one, self.two = eqx.nn.Linear(12, 16, key=key), eqx.nn.Linear(16, 1, key=key)

    def __call__(self, x):
        return self.two(jnp.sign(self.one(x)))


def libraries():
    key = jax.random.key(0)
    linen = Linen()
    yield "Linen", linen.init(key, jnp.ones(12)), linen.apply
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    yield "NNX", state, lambda state, x: nnx.merge(graph, state)(x)
    arrays, static = eqx.partition(Equinox(key), eqx.is_array)
    yield "Equinox", arrays, lambda arrays, x: eqx.combine(arrays, static)(x)


@pytest.mark.parametrize("name, params, apply", list(libraries()), ids=("Linen", "NNX", "Equinox"))
def test_a_step_trains_a_sign_network(name, params, apply):
    """In every library: kernels are credited, biases plain, and the loss falls by a quarter in 30 steps."""
    optimizer = optax.adam(0.02)
    population = nesjax.Population(size=64, std=0.1, antithetic=True)
    loss_fn = lambda params, x: jnp.sum((apply(params, x) - x[:3].sum()) ** 2)
    step = nesjax.make_train_step(loss_fn, optimizer, population, in_axes=0, credit="inputs", samples=2)
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=jax.random.key(1))
    table = nesjax.describe(params, population, loss_fn, jnp.ones(12), credit="inputs")
    assert table.count("1 row of 12 inputs") == table.count("1 row of 16 inputs") == 1
    losses = []
    for at in range(30):
        x = jnp.repeat(jax.random.normal(jax.random.fold_in(jax.random.key(2), at), (32, 2, 12)), 2, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5]), losses
    assert metrics["nonfinite"] == 0 and metrics["update_applied"] > 0.99


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("chunk_size", (None, 2))
def test_a_failed_call_weighs_nothing(rows, chunk_size):
    """One call's input is NaN, and so are what it multiplied and its loss: the gradient is that of the other calls."""
    params, key = {"w": jnp.ones((6, 4)) / 3}, jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), (4, 3, rows, 6))
    population = nesjax.Population(4, std=0.1, chunk_size=chunk_size)

    def loss(params, x, weight):
        return weight * jnp.sum(jnp.sin(x @ params["w"]))

    options = {"in_axes": 0, "credit": "inputs", "samples": 3, "baseline": None}
    es_grad = jax.jit(nesjax.value_and_grad(loss, population, **options))
    ones = jnp.ones((4, 3))
    value, found = es_grad(params, key, x.at[1, 2].set(jnp.nan), ones)
    _, expected = es_grad(params, key, x, ones.at[1, 2].set(0))
    assert np.isfinite(value) and expected["w"].any()
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)


def test_std_may_be_traced():
    """The seam for an adaptive std: a scalar, or a tree like params, under vmap; a std of zero gives no gradient."""
    loss, params, _ = MODELS["mlp"]
    x, key = jax.random.normal(jax.random.key(1), (SIZE, 12)), jax.random.key(2)
    es_grad = nesjax.value_and_grad(loss, nesjax.Population(SIZE, std=STD), in_axes=0, credit="inputs")
    run = jax.jit(jax.vmap(lambda std: es_grad(params, key, x, std=std)[1]))
    grads = run({"a": jnp.array([STD, 0.0]), "b": jnp.array([STD, STD])})
    expected = es_grad(params, key, x)[1]
    for name in params:
        np.testing.assert_allclose(grads[name][0], expected[name], rtol=1e-4, atol=1e-5)
    assert not grads["a"][1].any() and grads["b"][1].any()
    np.testing.assert_allclose(es_grad(params, key, x, std=STD)[1]["a"], expected["a"], rtol=1e-5)
    for std in ({"a": 0.1}, jnp.ones(2)):
        with pytest.raises(ValueError, match="std must"):
            es_grad(params, key, x, std=std)
