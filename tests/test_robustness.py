"""What goes wrong in a run: members that fail, numbers too large or too small, rounding. The state stays sound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soak

import nesjax
from benchmarks.measure import in_own_process

KEY = jax.random.key(0)
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
SIZE = 16
SHAPINGS = [None, nesjax.centered_rank, nesjax.standardize, nesjax.pair_sign, nesjax.top_k(4)]
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "plateau": optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau()
    ),  # wants the loss; its state begins with infinity
}


def loss_fn(params, bad):
    """A member's loss; the mapped `bad` is what a failed one has in its place."""
    return jnp.where(bad == 0, jnp.sum((jnp.eye(4) @ params["w"] + params["b"]) ** 2), bad)


def make(shaping=nesjax.centered_rank, optimizer=OPTIMIZERS["adam"], loss_fn=loss_fn, **options):
    credit = options.pop("credit", None)
    population = nesjax.Population(**{"size": SIZE, "std": 0.1, "antithetic": True, **options})
    return nesjax.make_train_step(loss_fn, optimizer, population, shaping=shaping, in_axes=0, credit=credit)


def new_state(params=PARAMS, optimizer=OPTIMIZERS["adam"]):
    return nesjax.TrainState.create(params=params, optimizer=optimizer, key=KEY)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda shaping: getattr(shaping, "__name__", "None"))
def test_any_share_of_bad_members_leaves_the_state_finite(shaping):
    step = make(shaping)
    for bad in (jnp.nan, jnp.inf, -jnp.inf, 1e30, 3e38, -3e38):
        state = new_state()
        for count in (0, 1, 4, 8, 15, 16, 0):
            state, metrics = step(state, jnp.where(jnp.arange(SIZE) < count, bad, 0))
            assert finite(state.params) and finite(state.opt_state), (bad, count)
            assert metrics["nonfinite"] == (0 if np.isfinite(bad) else count)
            assert state.skipped == metrics["skipped"]
            skipped, applied = metrics["skipped"], metrics["update_applied"]
            assert 0 < applied <= 1.001 if skipped == 0 else applied == 0, (bad, count)
            if count in (0, 1, 4, 8):
                assert skipped == 0 or np.isfinite(bad)
        assert state.step == 7 and skipped == 0


@pytest.mark.parametrize("optimizer", [pytest.param(*item[1:], id=item[0]) for item in OPTIMIZERS.items()])
def test_a_generation_without_a_finite_loss_is_skipped_and_says_so(optimizer):
    step = make(optimizer=optimizer)
    state, _ = step(new_state(optimizer=optimizer), jnp.zeros(SIZE))
    for skipped in (1, 2):
        after, metrics = step(state, jnp.full(SIZE, jnp.nan))
        assert equal((after.params, after.opt_state), (state.params, state.opt_state))
        assert (metrics["skipped"], metrics["nonfinite"], metrics["update_applied"]) == (skipped, SIZE, 0)
        assert after.step == state.step + 1  # the next one has noise of its own
        state = after
    state, metrics = step(state, jnp.zeros(SIZE))
    assert metrics["skipped"] == 0 and not equal(state.params, after.params)


def test_an_update_that_overflows_is_skipped():
    def huge(params, bad):
        return loss_fn(params, bad) * jnp.float32(3e36)

    state = new_state(optimizer=optax.sgd(1e10))
    after, metrics = make(None, optax.sgd(1e10), huge)(state, jnp.zeros(SIZE))
    assert metrics["skipped"] == 1 and metrics["nonfinite"] == 0 and equal(after.params, state.params)
    assert metrics["update_applied"] == 0
    with pytest.raises(FloatingPointError, match=r"1 generations in a row .* \(limit 1\): the gradient or the"):
        nesjax.raise_if_skipped(metrics, 1)


def test_a_guard_ends_a_run_that_goes_nowhere(tmp_path):
    step, state = make(), new_state()
    population = nesjax.Population(SIZE, std=0.1, antithetic=True)
    with nesjax.checkpoint.Run(tmp_path, population, max_skipped=3) as run:
        for _ in range(2):
            state, metrics = step(state, jnp.full(SIZE, jnp.nan))
            run.update(state, metrics)
        state, metrics = step(state, jnp.full(SIZE, jnp.nan))
        with pytest.raises(FloatingPointError, match=r"3 generations in a row .* \(limit 3\): all 16 losses of"):
            run.update(state, metrics)
    with pytest.raises(ValueError, match="limit must be an int >= 1, got 0"):
        nesjax.raise_if_skipped(metrics, 0)


def test_skipping_is_the_same_on_many_devices():
    mesh = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
    population = nesjax.Population(SIZE, std=0.1, antithetic=True)
    step = nesjax.make_train_step(loss_fn, OPTIMIZERS["adam"], population, in_axes=0, mesh=mesh)
    after, metrics = step(new_state(), jnp.full(SIZE, jnp.nan))
    assert metrics["skipped"] == 1 and equal(after.params, PARAMS)


def test_overflow_in_bfloat16_and_float16():
    """Parameters at the end of the range; then a forward pass that overflows in every member."""
    for dtype, large in ((jnp.bfloat16, 1e38), (jnp.float16, 4e4)):
        params = {"w": jnp.full((2, 2), large, dtype)}

        def loss(params, x):
            return jnp.sum(params["w"] @ x)

        step = make(None, optax.sgd(1.0), loss, std=large / 10)
        state, metrics = step(new_state(params, optax.sgd(1.0)), jnp.ones((SIZE, 2), dtype))
        assert finite(state.params)
        state, metrics = step(state, jnp.full((SIZE, 2), 100, dtype))
        assert finite(state.params) and metrics["nonfinite"] == SIZE and metrics["skipped"] >= 1


def test_std_that_decayed_to_zero_changes_nothing():
    """Without noise there is no information: the gradient is zero, not NaN."""
    schedule = optax.linear_schedule(0.1, 0.0, 2)
    for shaping in (None, nesjax.centered_rank):
        step = make(shaping, optax.sgd(0.1), std=schedule)
        state = new_state(optimizer=optax.sgd(0.1))
        for _ in range(2):
            state, metrics = step(state, jnp.zeros(SIZE))
            assert metrics["update_norm"] > 0
        after, metrics = step(state, jnp.zeros(SIZE))
        assert metrics["std"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
        assert equal(after.params, state.params)


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda shaping: getattr(shaping, "__name__", "None"))
def test_equal_losses_change_nothing(shaping):
    def same(params, bad):
        return loss_fn(params, bad) * 0 + 7

    step = make(shaping, optax.sgd(0.1), same)
    after, metrics = step(new_state(optimizer=optax.sgd(0.1)), jnp.zeros(SIZE))
    assert equal(after.params, PARAMS) and metrics["skipped"] == 0 and metrics["loss_std"] == 0


def test_an_infinite_parameter_that_is_frozen_hides_nothing():
    """A mask, say: the metrics are of what does change."""
    params = PARAMS | {"mask": jnp.array([0, -jnp.inf])}
    step = make(optimizer=optax.sgd(0.1), noise={"mask": nesjax.Frozen()})
    after, metrics = step(new_state(params, optax.sgd(0.1)), jnp.zeros(SIZE))
    assert equal(after.params["mask"], params["mask"]) and not equal(after.params["w"], PARAMS["w"])
    assert metrics["update_applied"] == pytest.approx(1, abs=1e-3) and metrics["skipped"] == 0


def test_bfloat16_alone_stalls_and_a_float32_master_does_not():
    """Rounding takes small updates away; parameters in float32, cast in the loss, keep them."""
    target = jnp.full((8, 8), 1.5)
    x = jnp.eye(8)

    def loss(params, _):
        params = optax.tree.cast(params, jnp.bfloat16)  # as optax users do it; of no effect on bfloat16 parameters
        return jnp.mean((jnp.dot(x.astype(jnp.bfloat16), params, preferred_element_type=jnp.float32) - target) ** 2)

    optimizer, reached, applied = optax.sgd(0.02), {}, {}
    population = nesjax.Population(256, std=0.01, antithetic=True)
    for dtype in (jnp.bfloat16, jnp.float32):
        step = nesjax.make_train_step(loss, optimizer, population, strict=True)
        state = new_state(jnp.ones((8, 8), dtype), optimizer)
        shares = []
        for _ in range(300):
            state, metrics = step(state, 0.0)
            shares.append(float(metrics["update_applied"]))
        reached[dtype], applied[dtype] = float(jnp.mean(state.params)), np.mean(shares)
    assert reached[jnp.bfloat16] < 1.02 and applied[jnp.bfloat16] < 0.2
    assert reached[jnp.float32] > 1.06 and applied[jnp.float32] == pytest.approx(1, abs=1e-3)


FLAGS = {
    "jax_enable_x64": True,
    "jax_debug_nans": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
}


@pytest.mark.parametrize("credit", [None, "inputs"])
@pytest.mark.parametrize("flag", FLAGS)
def test_jax_flags(flag, credit):
    """A step under each of JAX's stricter modes gives what it gives without, but for x64's wider numbers."""
    params = {"w": jnp.ones((4, 3)) / 2, "b": jnp.zeros(3)}

    def take_step():
        def loss(params, x):
            return jnp.sum(((x @ params["w"])[0] + params["b"]) ** 2)

        step = make(None, optax.sgd(0.1), loss, credit=credit)
        return step(new_state(params, optax.sgd(0.1)), jnp.ones((SIZE, 1, 4), jnp.float32))

    expected, _ = take_step()
    before = getattr(jax.config, flag)
    jax.config.update(flag, FLAGS[flag])
    try:
        state, metrics = take_step()
    finally:
        jax.config.update(flag, before)
    assert metrics["skipped"] == 0 and state.params["w"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("credit", [None, "inputs"])
def test_generations_in_a_scan_and_runs_under_vmap(credit):
    """Three generations in one `lax.scan`, of three runs at once under `vmap` over their keys: as one by one."""
    optimizer = optax.adam(0.1)

    def loss(params, x):
        return jnp.sum((x @ params["w"] + params["b"]) ** 2)

    step = make(None, optimizer, loss, credit=credit)
    x = jax.random.normal(KEY, (SIZE, 1, 4))

    def run(key):
        state = nesjax.TrainState.create(params=PARAMS, optimizer=optimizer, key=key)
        return jax.lax.scan(lambda state, _: step(state, x), state, length=3)

    keys = jax.random.split(KEY, 3)
    states, metrics = jax.jit(jax.vmap(run))(keys)
    for at, key in enumerate(keys):
        state = nesjax.TrainState.create(params=PARAMS, optimizer=optimizer, key=key)
        for generation in range(3):
            state, one = step(state, x)
            np.testing.assert_allclose(metrics["loss"][at, generation], one["loss"], rtol=1e-4)
        np.testing.assert_allclose(states.params["w"][at], state.params["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nothing_grows_in_a_minute_of_saves_and_resumes():
    soak.check(in_own_process(soak.train, 1))
