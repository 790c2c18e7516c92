"""From losses to steps: shaping, failed members, baselines, the optax link, the training step (law 8)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import nesjax

pytestmark = pytest.mark.optimised
KEY = jax.random.key(0)
PARAMS = {"w": 0.1 * jax.random.normal(KEY, (6, 4)), "b": jnp.zeros(4, jnp.bfloat16)}
SHAPINGS = (None, nesjax.centered_rank, nesjax.standardize, nesjax.pair_sign, nesjax.top_k(2))
BAD = (jnp.nan, jnp.inf, -jnp.inf)


def noise_of(size=8, params=PARAMS, **options) -> nesjax.Noise:
    return nesjax.sample_noise(KEY, params, nesjax.Population(size, **{"std": 0.1, **options}))


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"].astype(jnp.float32) - y) ** 2)


def batch(size: int, samples: int = 3):
    return jax.random.normal(KEY, (size, samples, 6)), jax.random.normal(jax.random.key(1), (size, samples, 4))


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerance}), a, b)


# ---- shaping


@pytest.mark.parametrize("seed", range(5))
def test_centered_rank_averages_ties_as_scipy_does(seed):
    losses = np.random.default_rng(seed).integers(0, 4 + seed, 11).astype(np.float32)
    expected = (scipy.stats.rankdata(losses) - 1) / 10 - 0.5
    np.testing.assert_allclose(nesjax.centered_rank(jnp.asarray(losses)), expected, atol=1e-6)
    assert nesjax.centered_rank(jnp.asarray(losses)).sum() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bad", BAD)
def test_failed_members_rank_worst_and_tie(bad):
    got = nesjax.centered_rank(jnp.array([1.0, bad, 1e30, jnp.nan]))
    np.testing.assert_allclose(got, [-0.5, 1 / 3, 1 / 3 - 0.5, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("baseline", [None, "mean", "leave_one_out"])
def test_failed_members_weigh_nothing_and_are_left_out_of_means(bad, baseline):
    noise, losses = noise_of(), jnp.arange(8.0).at[2].set(bad)
    got = nesjax.estimate_gradient(noise, losses, baseline=baseline)["w"]
    finite = np.array([0.0, 1, 3, 4, 5, 6, 7])
    mean = {None: 0, "mean": finite.mean(), "leave_one_out": (finite.sum() - np.arange(8)) / 6}[baseline]
    weights = np.where(np.arange(8) == 2, 0, np.arange(8) - mean)
    close(got, nesjax.weighted_sum(noise, weights)["w"] / (8 * 0.1**2))


@pytest.mark.parametrize("shaping", [None, nesjax.standardize, nesjax.pair_sign, nesjax.top_k(3), jnp.cbrt])
def test_a_failed_members_partner_weighs_nothing_either(shaping):
    """Changing the loss of member 3, whose partner 2 failed, changes nothing."""
    noise = noise_of(antithetic=True)
    losses = jnp.array([1.0, 2, jnp.nan, 0, 4, 3, 9, 7])
    grads = [
        nesjax.estimate_gradient(noise, losses.at[3].set(value), shaping=shaping, baseline="mean")["w"]
        for value in (0.0, 100.0)
    ]
    np.testing.assert_array_equal(*grads)
    assert np.isfinite(grads[0]).all() and np.abs(grads[0]).max() > 0


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda shaping: getattr(shaping, "__qualname__", "None"))
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_any_share_of_failed_members_gives_a_finite_gradient(shaping, share):
    noise = noise_of(16, antithetic=True)
    losses = jnp.where(jnp.arange(16) < share * 16, jnp.nan, jnp.arange(16.0) ** 2)
    grads = nesjax.estimate_gradient(noise, losses, shaping=shaping)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(grads))
    assert bool(jnp.any(grads["w"] != 0)) == (share < 1)


@pytest.mark.parametrize("shaping", SHAPINGS[:3], ids=["None", "centered_rank", "standardize"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_equal_losses_give_a_zero_gradient(shaping, size):
    for baseline in ("mean", "leave_one_out") if shaping is None else ("mean",):
        grads = nesjax.estimate_gradient(noise_of(size), jnp.full(size, 0.1), shaping=shaping, baseline=baseline)
        assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("losses", [jnp.array([3, 1, 2, 0]), jnp.array([True, False, True, True])], ids=["int", "bool"])
def test_integer_and_bool_losses_are_cast(losses):
    noise = noise_of(4)
    for shaping in SHAPINGS[:4]:
        got = nesjax.estimate_gradient(noise, losses, shaping=shaping)
        close(got, nesjax.estimate_gradient(noise, losses.astype(jnp.float32), shaping=shaping))
    assert got["w"].any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_free_shaping_is_free_of_scale(scale):
    losses = jnp.array([2.0, 1.0, 4.0, 8.0])
    for shaping in SHAPINGS[1:]:
        np.testing.assert_allclose(shaping(scale * losses), shaping(losses), rtol=1e-5, atol=1e-6)


def test_groups_are_shaped_and_centered_on_their_own():
    """What is added to all losses of a group changes nothing."""
    noise, losses = noise_of(8, group_size=4), jax.random.normal(KEY, (8,))
    offset = losses + jnp.repeat(jnp.array([0.0, 10.0]), 4)
    for shaping in SHAPINGS[:4]:
        close(*(nesjax.estimate_gradient(noise, each, shaping=shaping)["w"] for each in (losses, offset)), atol=1e-3)


def test_top_k_keeps_the_best_pairs():
    """ARS: pairs by their better half; the update is their difference over k and the deviation of the losses used."""
    losses = jnp.array([5.0, 6.0, 1.0, 9.0, 2.0, 3.0, 8.0, 8.5])
    noise = noise_of(8, antithetic=True)
    got = nesjax.estimate_gradient(noise, losses, shaping=nesjax.top_k(2))["w"]
    deviation = np.std([1.0, 9.0, 2.0, 3.0])
    weights = np.array([0, 0, 1 - 9, 0, 2 - 3, 0, 0, 0]) / (2 * deviation)  # on the positive half of each pair
    close(got, nesjax.weighted_sum(noise, weights)["w"] / 0.1)


# ---- the estimator's three faces


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"group_size": 4}], ids=str)
@pytest.mark.parametrize("shaping", [None, nesjax.centered_rank])
def test_by_hand_value_and_grad_and_from_losses_agree(shaping, options):
    population = nesjax.Population(8, std=0.1, **options)
    x, y = batch(8 // population.group_size)
    loss, grads = jax.jit(nesjax.value_and_grad(loss_fn, population, shaping=shaping, in_axes=0))(PARAMS, KEY, x, y)
    noise = nesjax.sample_noise(KEY, PARAMS, population)
    losses = jax.jit(lambda: nesjax.population_apply(loss_fn, PARAMS, noise, x, y, in_axes=0))()
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    by_hand = nesjax.estimate_gradient(noise, losses, shaping=shaping)
    tx = optax.chain(nesjax.from_losses(shaping=shaping), optax.sgd(0.5))
    updates, _ = tx.update(noise, tx.init(PARAMS), PARAMS, losses=losses)
    chex.assert_trees_all_equal_shapes_and_dtypes(PARAMS, grads, by_hand, updates)
    close(grads, by_hand, rtol=1e-2)  # of the bfloat16 bias
    close(jax.tree.map(lambda g: -0.5 * g, by_hand), updates, rtol=1e-2)


def test_unperturbed_baseline_is_the_plain_networks_loss():
    population = nesjax.Population(8, std=0.1)
    x, y = batch(8)
    _, grads = jax.jit(nesjax.value_and_grad(loss_fn, population, baseline="unperturbed", in_axes=0))(PARAMS, KEY, x, y)
    noise = nesjax.sample_noise(KEY, PARAMS, population)
    losses = jax.jit(lambda: nesjax.population_apply(loss_fn, PARAMS, noise, x, y, in_axes=0))()
    plain = jax.vmap(lambda x, y: loss_fn(PARAMS, x, y))(x, y)
    close(grads["w"], nesjax.estimate_gradient(noise, losses - plain, baseline=None)["w"])


def test_aux_is_stacked():
    def with_aux(params, x, y):
        return loss_fn(params, x, y), {"norm": jnp.linalg.norm(x @ params["w"], axis=-1)}

    es_grad = jax.jit(nesjax.value_and_grad(with_aux, nesjax.Population(8, std=0.1), has_aux=True, in_axes=0))
    (loss, aux), grads = es_grad(PARAMS, KEY, *batch(8))
    assert loss.shape == () and aux["norm"].shape == (8, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(PARAMS, grads)


def test_a_loss_that_is_a_plain_python_or_integer_function_works():
    def error_rate(params, x):
        return jnp.sum(x @ params["w"] > 0)  # an integer, without a gradient

    es_grad = jax.jit(nesjax.value_and_grad(error_rate, nesjax.Population(64, std=0.1)))
    loss, grads = es_grad(PARAMS, KEY, batch(1)[0][0])
    assert loss.dtype == jnp.float32 and grads["w"].any()


# ---- the step


@pytest.fixture(scope="module")
def trained():
    """Twenty steps: `(states, metrics, traces of the loss function)`."""
    traces, optimizer = [], optax.adam(0.05)

    def counted(params, x, y):
        traces.append(1)
        return loss_fn(params, x, y)

    std = optax.linear_schedule(0.1, 0.05, 20)
    step = nesjax.make_train_step(counted, optimizer, nesjax.Population(64, std=std))
    state = nesjax.TrainState.create(params=PARAMS, optimizer=optimizer, key=KEY)
    states, metrics = [state], []
    for _ in range(20):
        state, each = step(state, *(part[0] for part in batch(1, 32)))
        states.append(state)
        metrics.append(each)
    return states, metrics, traces


def test_a_second_step_compiles_nothing(trained):
    states, _, traces = trained
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(states[0], states[-1])
    assert int(states[-1].step) == 20


def test_weight_decay_leaves_frozen_parameters_where_they_are():
    population, optimizer = (
        nesjax.Population(8, std=0.1, noise={"b": nesjax.Frozen()}),
        optax.adamw(0.1, weight_decay=0.5),
    )
    params = {"w": PARAMS["w"], "b": jnp.ones(4)}
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY)
    state, _ = nesjax.make_train_step(loss_fn, optimizer, population)(state, *(part[0] for part in batch(1)))
    np.testing.assert_array_equal(state.params["b"], params["b"])
    assert (state.params["w"] != params["w"]).all()


def test_weakly_typed_params_compile_once():
    traces, optimizer = [], optax.sgd(0.1)
    step = nesjax.make_train_step(lambda p: traces.append(1) or p * p, optimizer, nesjax.Population(4, std=0.1))
    state = nesjax.TrainState.create(params=1.5, optimizer=optimizer, key=KEY)
    for _ in range(3):
        state, _ = step(state)
    assert len(traces) == 1


def test_metrics_say_what_happened(trained):
    states, metrics, _ = trained
    first = metrics[0]
    assert set(first) == {
        "loss", "loss_min", "loss_max", "loss_std", "grad_norm", "update_norm", "grad_snr", "nonfinite", "std",
        "skipped", "update_applied",
    }  # fmt: skip
    assert first["loss_min"] < first["loss"] < first["loss_max"] and first["loss_std"] > 0
    assert first["nonfinite"] == 0 and first["std"] == pytest.approx(0.1)
    assert metrics[10]["std"] == pytest.approx(0.075)
    moved = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), states[1].params, states[0].params)
    assert first["update_norm"] == pytest.approx(float(optax.tree.norm(moved)), rel=0.02)
    assert -1 <= first["grad_snr"] <= 1
    assert metrics[-1]["loss"] < 0.95 * first["loss"]


def test_signal_to_noise_is_one_for_signal_and_zero_for_noise():
    """A linear loss with N >> d is nearly all signal; a random loss is all noise."""

    optimizer = optax.sgd(0.0)
    state = nesjax.TrainState.create(params=jnp.zeros(16), optimizer=optimizer, key=KEY)

    def snr(loss_fn, size):
        step = nesjax.make_train_step(loss_fn, optimizer, nesjax.Population(size, std=0.1), in_axes=0)
        return lambda *args: float(step(state, *args)[1]["grad_snr"])

    assert snr(lambda p: p.sum(), 8192)() > 0.99
    of_chance = snr(lambda p, u: u, 512)
    assert abs(np.mean([of_chance(jax.random.normal(jax.random.key(at), (512,))) for at in range(8)])) < 0.25
    assert snr(lambda p: p.sum() * 0, 8)() == 0  # equal losses: no gradient, not NaN


@pytest.mark.parametrize("antithetic", [False, True])
def test_signal_to_noise_is_the_mean_cosine_of_halves(antithetic):
    population = nesjax.Population(512, std=0.1, antithetic=antithetic)
    x, target = jax.random.normal(KEY, (32, 6)), jax.random.normal(jax.random.key(1), (32, 4))
    error, optimizer = lambda w: jnp.mean((jnp.tanh(x @ w) - target) ** 2), optax.sgd(0.0)
    state = nesjax.TrainState.create(params=PARAMS["w"], optimizer=optimizer, key=KEY)
    _, metrics = nesjax.make_train_step(error, optimizer, population)(state)
    noise = nesjax.sample_noise(jax.random.fold_in(KEY, 0), PARAMS["w"], population)
    losses = nesjax.population_apply(error, PARAMS["w"], noise)

    @jax.vmap
    def cosine(key):
        half = jax.random.permutation(key, jnp.arange(512 // population.signs) % 2).repeat(population.signs)
        a, b = (nesjax.weighted_sum(noise, (losses - losses.mean()) * part) for part in (half, 1 - half))
        return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)

    assert metrics["grad_snr"] == pytest.approx(float(cosine(jax.random.split(KEY, 200)).mean()), abs=0.03)


def test_metrics_leave_failed_members_out():
    optimizer = optax.sgd(0.1)
    step = nesjax.make_train_step(lambda p, x: p.sum() * 0 + x, optimizer, nesjax.Population(6, std=0.1), in_axes=0)
    state = nesjax.TrainState.create(params=jnp.zeros(3), optimizer=optimizer, key=KEY)
    _, metrics = step(state, jnp.array([1.0, jnp.nan, 3.0, jnp.inf, -jnp.inf, 2.0]))
    assert metrics["nonfinite"] == 3
    assert [float(metrics[name]) for name in ("loss", "loss_min", "loss_max")] == [2, 1, 3]
    assert metrics["loss_std"] == pytest.approx(np.std([1, 2, 3]))


def test_steps_run_under_scan_and_vmap():
    """Law 8: a whole run in one program, and several runs at once."""
    optimizer = optax.sgd(0.1)
    step = nesjax.make_train_step(loss_fn, optimizer, nesjax.Population(16, std=0.1))
    x, y = (part[0] for part in batch(1))

    @jax.vmap
    def run(key):
        state = nesjax.TrainState.create(params=PARAMS, optimizer=optimizer, key=key)
        return jax.lax.scan(lambda state, _: step(state, x, y), state, length=3)

    states, _ = jax.jit(run)(jax.random.split(KEY, 2))
    state = nesjax.TrainState.create(params=PARAMS, optimizer=optimizer, key=jax.random.split(KEY, 2)[1])
    for _ in range(3):
        state, _ = step(state, x, y)
    close(jax.tree.map(lambda leaf: leaf[1], states.params)["w"], state.params["w"])


def test_a_rollout_is_a_loss():
    """Law 8: parameters used inside a scan over environment steps, with a key for each member."""

    def rollout(params, key):
        def advance(carry, key):
            state, total = carry
            action = jnp.tanh(state @ params["w"])[:1]
            state = 0.9 * state + action + 0.1 * jax.random.normal(key, (6,))
            return (state, total + jnp.sum(state**2)), None

        return jax.lax.scan(advance, (jnp.ones(6), 0.0), jax.random.split(key, 5))[0][1]

    population = nesjax.Population(8, std=0.1, antithetic=True)
    es_grad = jax.jit(nesjax.value_and_grad(rollout, population, in_axes=0, strict=True))
    loss, grads = es_grad(PARAMS, KEY, nesjax.member_keys(KEY, population))
    noise = nesjax.sample_noise(KEY, PARAMS, population)
    keys = nesjax.member_keys(KEY, population)
    losses = jax.jit(jax.vmap(lambda i: rollout(nesjax.materialise(PARAMS, noise, i), keys[i])))(jnp.arange(8))
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    close(grads["w"], nesjax.estimate_gradient(noise, losses)["w"], rtol=1e-3, atol=1e-3)
