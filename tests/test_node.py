"""Noise on outputs: its expectation is the gradient, its draws are fresh, and what has no product is refused."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import KEY, normal, rms_norm, weight
from flax import nnx

import nesjax

T = 6


def token_losses(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]


# ---- models: losses `[T]` of `(params, tokens)`, each predicting the token after


def mlp(params, tokens):
    x = params["embed"][tokens[:-1]]
    return token_losses(jnp.tanh(x @ params["a"]) @ params["b"], tokens[1:])


def transformer(params, tokens):
    """A causal block: fused projections that are split, two heads, a tied embedding."""
    x = params["embed"][tokens[:-1]]
    q, k, v = (part.reshape(T, 2, 4) for part in jnp.split(rms_norm(x) @ params["qkv"], 3, 1))
    scores = jnp.where(jnp.tri(T, dtype=bool), jnp.einsum("thd,shd->hts", q, k), -1e9)
    x = x + jnp.einsum("hts,shd,hdo->to", jax.nn.softmax(scores), v, params["o"].reshape(2, 4, 8))
    block = jax.checkpoint(lambda x: x + jax.nn.gelu(rms_norm(x) @ params["up"]) @ params["down"])
    return token_losses(rms_norm(block(x)) @ params["embed"].T, tokens[1:])


def gru(params, tokens):
    """A recurrent cell over time, whose products the scan repeats."""

    def step(h, x):
        z, n = jax.nn.sigmoid(x @ params["xz"] + h @ params["hz"]), jnp.tanh(x @ params["xn"] + h @ params["hn"])
        h = z * h + (1 - z) * n
        return h, h @ params["out"]

    _, logits = jax.lax.scan(step, jnp.zeros(8), params["embed"][tokens[:-1]])
    return token_losses(logits, tokens[1:])


def layers(params, tokens):
    """Layers stacked for a scan, within each of which a scan runs over time."""

    def layer(x, weights):
        _, y = jax.lax.scan(lambda h, x: (h / 2 + x @ weights, jnp.tanh(h / 2 + x @ weights)), jnp.zeros(8), x)
        return x + y, None

    x, _ = jax.lax.scan(layer, params["embed"][tokens[:-1]], params["layers"])
    return token_losses(x @ params["out"], tokens[1:])


def convolution(params, tokens):
    """A causal convolution over time."""
    x = jnp.pad(params["embed"][tokens[:-1]], ((2, 0), (0, 0)))[None]
    y = jax.lax.conv_general_dilated(x, params["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return token_losses(jnp.tanh(y[0]) @ params["out"], tokens[1:])


SHAPES = {"embed": (5, 8), "out": (8, 5), "a": (8, 9), "b": (9, 5), "qkv": (8, 24), "o": (8, 8), "up": (8, 12),
          "down": (12, 8), "xz": (8, 8), "hz": (8, 8), "xn": (8, 8), "hn": (8, 8), "layers": (2, 8, 8),
          "kernel": (3, 8, 8)}  # fmt: skip
MODELS = {
    mlp: "embed a b", transformer: "embed qkv o up down", gru: "embed xz hz xn hn out", layers: "embed layers out",
    convolution: "embed kernel out",
}  # fmt: skip
TOKENS = jnp.array([1, 3, 0, 2, 4, 4, 1])


def made(model):
    return {name: weight(at, *SHAPES[name]) for at, name in enumerate(MODELS[model].split())}


def settings(size=1024, **options):
    rules = {"layers": nesjax.Stacked(nesjax.Node()), "": nesjax.Node()}
    return nesjax.Population(size=size, std=0.01, **{"noise": rules, **options})


def check_expectation(es_grad, params, expected, *args, generations=24):
    """The mean over generations is the gradient: in length along it, and elsewhere by no more than chance."""
    many = jax.jit(lambda keys: jax.lax.map(lambda key: es_grad(params, key, *args)[1], keys))
    grads = many(jax.random.split(jax.random.key(3), generations))
    for name, found in grads.items():
        slopes = np.einsum("nio,io->n", found.reshape(generations, -1, found.shape[-1]),
                           expected[name].reshape(-1, found.shape[-1])) / np.sum(expected[name] ** 2)  # fmt: skip
        error = slopes.std(ddof=1) / np.sqrt(generations)
        assert abs(slopes.mean() - 1) < 4.5 * error and error < 0.2, f"{name}: {slopes.mean()} +- {error}"
        errors = found.std(0, ddof=1) / np.sqrt(generations)
        z = (found.mean(0) - expected[name])[errors > 0] / errors[errors > 0]
        assert np.mean(z**2) < 2.5, name


@pytest.mark.parametrize(
    "model, credit", [*((model, "tokens") for model in MODELS), (mlp, None), (transformer, None)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_its_expectation_is_the_gradient(model, credit):
    params = made(model)
    mean = lambda params, tokens: model(params, tokens).mean()
    rules = settings().noise if model is layers else nesjax.Node()
    population = settings(1024, antithetic=True, noise=rules)
    es_grad = nesjax.value_and_grad(model if credit else mean, population, credit=credit)
    check_expectation(es_grad, params, jax.grad(mean)(params, TOKENS), TOKENS)


def test_credit_by_tokens_is_nearer_to_the_gradient():
    params = made(gru)
    mean = lambda params, tokens: gru(params, tokens).mean()
    expected = jax.flatten_util.ravel_pytree(jax.grad(mean)(params, TOKENS))[0]

    def error(loss_fn, **options):
        _, grads = jax.jit(nesjax.value_and_grad(loss_fn, settings(noise=nesjax.Node()), **options))(
            params, KEY, TOKENS
        )
        return jnp.sum((jax.flatten_util.ravel_pytree(grads)[0] - expected) ** 2)

    assert error(gru, credit="tokens") < 0.8 * error(mean)


def test_discount():
    """At 0 a position is credited with its own loss: exact where positions don't meet, else another estimate."""
    population, params = settings(1024, antithetic=True, noise=nesjax.Node()), made(mlp)
    expected = jax.grad(lambda params: mlp(params, TOKENS).mean())(params)
    check_expectation(nesjax.value_and_grad(mlp, population, credit="tokens", discount=0), params, expected, TOKENS)
    losses = jnp.array([[3.0, 1.0, -2.0], [0.5, 2.0, 4.0]])
    x, population = jnp.eye(3)[:, None], settings(2, noise=nesjax.Node(), antithetic=True)
    es_grad = nesjax.value_and_grad(
        lambda w, row, losses: losses + 0 * (row @ w).sum((1, 2)), population, baseline=None, credit="tokens",
        discount=0.5, in_axes=(None, 0),
    )  # fmt: skip
    _, grads = es_grad(jnp.zeros((3, 1)), KEY, x, losses)  # row t holds xi_t times its credit
    later = (losses[0] - losses[1]) @ jnp.array([[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]) / 3
    np.testing.assert_allclose(jnp.abs(grads[:, 0]), jnp.abs(later) / (2 * 0.01), rtol=1e-4)


PARTS = {
    "groups": {"antithetic": True, "group_size": 4}, "pairs": {"antithetic": True, "chunk_size": 12},
    "chunks": {"chunk_size": 10},
}  # fmt: skip
CREDITS = (None, 3), ("inputs", 3), ("tokens", None), ("tokens", 3)
# Each credit once, the last with everything but the plainest; the others are slow tests.
OFTEN = {
    (None, 3, "chunks"), ("inputs", 3, "pairs"), ("tokens", None, "chunks"), ("tokens", 3, "pairs"),
    ("tokens", 3, "groups"),
}  # fmt: skip


@pytest.mark.parametrize("credit, samples, parts", [
    pytest.param(*credit, parts, marks=() if (*credit, parts) in OFTEN else pytest.mark.slow)
    for credit in CREDITS for parts in PARTS
])  # fmt: skip
def test_chunks_change_nothing(credit, samples, parts):
    """Groups, pairs and samples: a chunk, two passes where weights need all losses, and the whole are one gradient."""
    options = PARTS[parts]
    count = 24 // options.get("group_size", 1)
    shape = (count, T + 1) if samples is None else (count, samples, T + 1)
    tokens = jax.random.randint(KEY, shape, 0, 5)
    params = made(mlp)
    loss = mlp if credit == "tokens" else lambda params, tokens: mlp(params, tokens).mean()

    def run(chunk_size):
        population = settings(24, **{**options, "noise": nesjax.Node(), "chunk_size": chunk_size})
        es_grad = nesjax.value_and_grad(loss, population, credit=credit, samples=samples, in_axes=0)
        return jax.jit(es_grad)(params, KEY, tokens)

    (loss_whole, whole), (loss_chunks, chunks) = run(None), run(options.get("chunk_size", 8))
    np.testing.assert_allclose(loss_whole, loss_chunks, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4), whole, chunks)


@pytest.mark.parametrize("credit", (None, "inputs", "tokens"))
def test_samples_are_draws_of_their_own(credit):
    """K samples of a member have K draws, and the mean gradient of all."""
    params = made(mlp)
    mean = lambda params, tokens: mlp(params, tokens).mean()
    tokens = jnp.stack([TOKENS, jnp.flip(TOKENS), (TOKENS + 1) % 5])
    expected = jax.grad(lambda params: jnp.mean(jax.vmap(lambda t: mean(params, t))(tokens)))(params)
    population = settings(1024, antithetic=True, noise=nesjax.Node())
    loss = mlp if credit == "tokens" else mean
    es_grad = nesjax.value_and_grad(loss, population, credit=credit, samples=3, in_axes=0)
    check_expectation(es_grad, params, expected, jnp.broadcast_to(tokens, (1024, *tokens.shape)))


@pytest.mark.parametrize("spread, count", [("mesh", 8), ("pmap", 4), ("shard_map", 8)])
def test_devices_change_nothing(spread, count):
    params, tokens = made(transformer), jnp.broadcast_to(TOKENS, (16, T + 1))
    population = settings(16, antithetic=True, noise=nesjax.Node())
    make = functools.partial(nesjax.value_and_grad, transformer, population, credit="tokens", in_axes=0)
    mesh = jax.make_mesh((count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.PartitionSpec()
    if spread == "mesh":
        run = make(mesh=mesh)
    elif spread == "pmap":
        mapped = jax.pmap(make(axis_name="d"), "d", in_axes=(None, None, 0), devices=jax.devices()[:count])
        run = lambda *args: jax.tree.map(lambda x: x[0], mapped(*args[:2], args[2].reshape(count, -1, T + 1)))
    else:
        specs = (everywhere, everywhere, jax.sharding.PartitionSpec("d"))
        run = jax.jit(jax.shard_map(make(axis_name="d"), mesh=mesh, in_specs=specs, out_specs=everywhere))
    found, expected = run(params, KEY, tokens), jax.jit(make())(params, KEY, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


@pytest.mark.parametrize("values", ("rademacher", "normal"))
def test_draws(values):
    """Fresh at each step of a loop, place in the program, position, member and key; equal for equal ones."""
    w = jnp.eye(3)

    def fn(w):
        def step(_, x):
            return None, x @ w

        y = jax.lax.scan(step, None, jnp.zeros((2, 3)))[1]
        z = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1].at[s[0]].set(jnp.ones(3) @ w)), (0, y))[1]
        return jnp.concatenate([y, z - 1, jax.jit(lambda x: x @ w)(jnp.zeros((64, 3))), jnp.zeros((1, 3)) @ w])

    population = nesjax.Population(size=6, std=1.0, noise=nesjax.Node(values), antithetic=True)
    noise = nesjax.sample_noise(KEY, w, population)
    run = jax.jit(lambda noise: nesjax.population_apply(fn, w, noise))
    draws = np.asarray(run(noise))
    np.testing.assert_allclose(draws[::2], -draws[1::2], atol=1e-6)
    np.testing.assert_array_equal(draws, run(noise))
    np.testing.assert_allclose(draws[3], nesjax.perturbed(fn)(w, nesjax.member(noise, 3)), atol=1e-6)
    assert not np.allclose(draws, run(nesjax.sample_noise(jax.random.key(8), w, population)))
    rows = draws[::2].reshape(-1, 3)
    if values == "normal":
        assert len(np.unique(rows.round(5), axis=0)) == len(rows)
    else:
        np.testing.assert_allclose(np.abs(rows), 1, atol=1e-6)
    assert abs(rows.mean()) < 0.15 and abs(rows.std() - 1) < 0.1
    steps = draws[::2, :4].reshape(-1, 12)  # of both loops
    assert all(len(np.unique(row)) > 1 for row in steps)


def test_the_same_draws_for_any_population():
    w, x = weight(0, 8, 4), normal(1, 2, 8)
    small, large = (nesjax.sample_noise(KEY, w, settings(size, noise=nesjax.Node())) for size in (4, 16))
    run = lambda noise: nesjax.population_apply(lambda w: x @ w, w, noise)
    np.testing.assert_array_equal(run(small), run(large)[:4])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(5)(nn.gelu(nn.DenseGeneral((2, 6))(y)).reshape(-1, 12))


def libraries():
    """Models of three libraries as `(params, apply)`: kernels have noise on outputs, other parameters on weights."""
    x = normal(2, T, 8)
    variables = Linen().init(KEY, x)
    yield variables, Linen().apply
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(8, 9, rngs=nnx.Rngs(0)), nnx.Linear(9, 5, rngs=nnx.Rngs(1))))
    yield state, lambda state, x: nnx.merge(graph, state)(x)
    arrays, static = eqx.partition(eqx.nn.MLP(8, 5, 9, 1, key=KEY), eqx.is_array)
    yield arrays, lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)


@pytest.mark.parametrize("params, apply", list(libraries()), ids=("Linen", "NNX", "Equinox"))
def test_models_of_others(params, apply):
    """Biases and norms keep noise on weights; the gradient of the whole points where backpropagation's does."""
    x, targets = normal(2, T, 8), jnp.array([0, 1, 2, 3, 4, 0])
    loss = lambda params: token_losses(apply(params, x), targets).mean()
    population = settings(1 << 14, antithetic=True, noise={"kernel|weight": nesjax.Node(), "": nesjax.LowRank()})
    _, grads = jax.jit(nesjax.value_and_grad(loss, population))(params, KEY)
    found, expected = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (grads, jax.grad(loss)(params)))
    assert jnp.vdot(found, expected) / jnp.linalg.norm(found) / jnp.linalg.norm(expected) > 0.85
    assert 0.8 < jnp.linalg.norm(found) / jnp.linalg.norm(expected) < 1.25


def test_losses_of_tokens_without_noise_on_outputs_are_averaged():
    params, population = made(mlp), settings(64, noise=nesjax.LowRank(), antithetic=True)
    found = nesjax.value_and_grad(mlp, population, credit="tokens")(params, KEY, TOKENS)
    expected = nesjax.value_and_grad(lambda *args: mlp(*args).mean(), population)(params, KEY, TOKENS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


def test_a_step_trains():
    params, optimizer = made(mlp), optax.adam(0.02)
    step = nesjax.make_train_step(mlp, optimizer, settings(256, noise=nesjax.Node()), credit="tokens")
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY)
    for _ in range(60):
        state, metrics = step(state, TOKENS)
    assert metrics["loss"] < 0.5 < float(mlp(params, TOKENS).mean())
    assert -1 < metrics["grad_snr"] < 1


def test_snr_is_the_cosine_of_halves():
    """What chance would give is known without halves: with losses of chance the ratio is 0 on average."""
    params = made(gru)
    population = settings(64, noise=nesjax.Node())
    step = nesjax.make_train_step(lambda params, key: jax.random.normal(key, (T,)) + 0 * gru(params, TOKENS),
                                  optax.sgd(0.0), population, credit="tokens", in_axes=0)  # fmt: skip
    state = nesjax.TrainState.create(params=params, optimizer=optax.sgd(0.0), key=KEY)
    ratios = []
    for seed in range(40):
        state, metrics = step(state, jax.random.split(jax.random.key(seed), 64))
        ratios.append(float(metrics["grad_snr"]))
    assert abs(np.mean(ratios)) < 4 * np.std(ratios) / np.sqrt(40) + 0.02


def test_describe_says_what_is_kept():
    text = nesjax.describe(made(gru), settings(noise=nesjax.Node()), gru, TOKENS, credit="tokens")
    (line,) = (line for line in text.splitlines() if line.startswith("hn"))
    assert f"{T * 8:,} outputs, {4 * 2 * T * 8:,} bytes kept" in line


def run(loss_fn, params, population=None, **options):
    args = options.pop("args", (TOKENS,))
    return nesjax.value_and_grad(loss_fn, population or settings(4, noise=nesjax.Node()), **options)(params, KEY, *args)


def sampled():
    return nesjax.sample_noise(KEY, W, settings(4, noise=nesjax.Node()))


def branch(params, tokens):
    return jax.lax.cond(tokens[0] > 0, lambda: jnp.ones(8) @ params["w"], lambda: jnp.zeros(8)).sum()


W = {"w": weight(0, 8, 8)}
REFUSED = {
    "function": (lambda: run(lambda p, t: jnp.exp(p["w"]).sum(), W), r"w: Node\(\) .*exp .*test_node\.py"),
    "activation": (lambda: run(lambda p, t: jnp.tanh(normal(1, 8, 8) + p["w"]).sum(), W), r"w: Node\(\) .*products"),
    "unused": (lambda: run(lambda p, t: 0.0, W), r"w .*Node\(\).*never multiplied"),
    "branch": (lambda: run(branch, W), r"w .*Node\(\).*inside cond"),
    "scan": (lambda: run(layers, made(layers), credit="tokens"), r"layers.*Stacked"),
    "materialise": (lambda: nesjax.materialise(W, sampled(), 0), "w: Node"),
    "weighted_sum": (lambda: nesjax.weighted_sum(sampled(), jnp.ones(4)), "Node"),
    "estimate": (lambda: nesjax.estimate_gradient(sampled(), jnp.ones(4)), "value_and"),
    "a scalar": (lambda: run(lambda *a: mlp(*a).mean(), made(mlp), credit="tokens"), r"losses \[T\].*\(\)"),
    "tokens without credit": (lambda: run(mlp, made(mlp)), 'credit="tokens"'),
    "unmatched": (lambda: run(lambda *a: mlp(*a)[1:], made(mlp), credit="tokens"), r"5 losses.*\[6\]"),
    "ambiguous": (lambda: run(lambda p, t: (jnp.ones((3, 3, 8)) @ p["w"]).sum((1, 2)), W, credit="tokens"), r"3, 3"),
    "discount": (lambda: run(mlp, made(mlp), credit="tokens", discount=1.5), r"discount.*\[0, 1\].*1\.5"),
    "discount alone": (lambda: run(mlp, made(mlp), discount=0.5), "discount.*tokens"),
    "values": (lambda: nesjax.Node("uniform"), "Node values"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        call()
