"""The population: rules, stacks, groups, chunks, pairs; laws 3 to 6; layers that are Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import normal
from families import each_family

import nesjax

KEY = jax.random.key(0)
PARAMS = {"a": jnp.zeros((16, 12)), "b": jnp.zeros((16, 12)), "c": jnp.zeros(40), "stack": jnp.zeros((3, 16, 12))}


def population(size=8, **options) -> nesjax.Population:
    return nesjax.Population(size, **{"std": 1.0, **options})


def members(noise, params=PARAMS, order=None):
    return of_members(noise, params, jnp.arange(noise.population.size) if order is None else jnp.asarray(order))


@jax.jit  # one program for all noise that differs in its key
def of_members(noise, params, order):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.vmap(lambda i: nesjax.materialise(zeros, noise, i))(order)


def with_stack(family):
    return {"stack": nesjax.Stacked(family), "": family}


# ---- who shares noise with whom


@each_family
def test_parameters_stacked_layers_members_and_keys_share_no_noise(family):
    """Law 3."""
    drawn = [
        members(nesjax.sample_noise(key, PARAMS, population(noise=with_stack(family))))
        for key in (KEY, jax.random.key(1))
    ]
    seen = [np.asarray(tree[name])[i] for tree in drawn for name in ("a", "b") for i in range(8)]
    seen += [np.asarray(tree["stack"])[i, layer] for tree in drawn for i in range(8) for layer in range(3)]
    seen = np.stack(seen).reshape(len(seen), -1)
    assert len(np.unique(seen, axis=0)) == len(seen)
    flat = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    assert np.abs(flat @ flat.T - np.eye(len(seen))).max() < 0.999  # not opposites either


@each_family
def test_antithetic_partners_are_exact_opposites(family):
    """Law 4."""
    drawn = members(nesjax.sample_noise(KEY, PARAMS, population(antithetic=True, noise=with_stack(family))))
    for leaf in jax.tree.leaves(drawn):
        np.testing.assert_array_equal(leaf[0::2], -leaf[1::2])
        assert (np.asarray(leaf[0]) != np.asarray(leaf[2])).any()


@each_family
def test_a_members_noise_depends_on_key_and_index_alone(family):
    """Law 5: not on the population's size, its chunks, or the order and company in which members are drawn."""

    def noise(size, **options):
        return nesjax.sample_noise(KEY, PARAMS, population(size, noise=with_stack(family), **options))

    expected = members(noise(8))
    jax.tree.map(np.testing.assert_array_equal, members(noise(512), order=range(8)), expected)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for chunk_size in (1, 3):
        chunked = jax.jit(lambda noise: nesjax.population_apply(lambda params: params, zeros, noise))
        jax.tree.map(np.testing.assert_array_equal, chunked(noise(8, chunk_size=chunk_size)), expected)
    backwards = members(noise(8), order=range(8)[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::-1], b), backwards, expected)
    alone = jax.jit(lambda: nesjax.materialise(PARAMS, noise(8), 5))()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[5]), alone, expected)


@pytest.mark.parametrize(
    "options", [{}, {"antithetic": True}, {"group_size": 4}, {"group_size": 4, "antithetic": True}], ids=str
)
def test_chunks_change_nothing(options):
    """Chunks that don't divide the population, too; mapped arguments and groups included."""
    params, x = {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}, normal(0, 16 // options.get("group_size", 1), 2, 8)

    @jax.jit
    def run(key):
        outputs = []
        for chunk_size in (None, 1, 3, 5, 16):
            noise = nesjax.sample_noise(key, params, population(16, chunk_size=chunk_size, **options))
            y = nesjax.population_apply(lambda p, x: (x @ p["w"] + p["b"]).sum(), params, noise, x, in_axes=0)
            outputs.append((y, nesjax.weighted_sum(noise, jnp.arange(16.0)), nesjax.estimate_gradient(noise, y)))
        return outputs

    whole, *chunked = run(KEY)
    for each in chunked:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), whole, each)


def test_an_argument_that_is_none_shifts_no_axis():
    noise = nesjax.sample_noise(KEY, jnp.ones(3), population(4))
    fn = lambda w, nothing, x, y: (w * x).sum() + y
    run = lambda *args, in_axes: nesjax.population_apply(fn, jnp.ones(3), noise, *args, in_axes=in_axes)
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones(())
    expected = run(0, x, y, in_axes=(None, 0, None))
    np.testing.assert_array_equal(run(None, x, y, in_axes=(None, 0, None)), expected)
    np.testing.assert_array_equal(run(None, x, y, in_axes=(0, 0, None)), expected)


def test_groups_share_a_slice():
    params = jnp.ones((4, 3))
    x = jax.random.normal(KEY, (3, 5, 4))
    noise = nesjax.sample_noise(KEY, params, population(12, group_size=4, antithetic=True, std=0.1))

    def fn(w, x):
        return x @ w

    got = jax.jit(lambda: nesjax.population_apply(fn, params, noise, x, in_axes=0))()
    expected = jax.jit(jax.vmap(lambda i: fn(nesjax.materialise(params, noise, i), x[i // 4])))(jnp.arange(12))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_in_axes_follow_vmap():
    params, x, y = jnp.ones((4, 3)), jax.random.normal(KEY, (5, 4, 6)), {"u": jnp.arange(6.0), "v": jnp.ones(2)}
    noise = nesjax.sample_noise(KEY, params, population(6))

    def fn(w, x, y):
        return {"out": (x @ w) * y["u"], "v": y["v"]}

    got = jax.jit(lambda: nesjax.population_apply(fn, params, noise, x, y, in_axes=(-1, {"u": 0, "v": None})))()
    plain = lambda i, x, y: fn(nesjax.materialise(params, noise, i), x, y)
    expected = jax.jit(jax.vmap(plain, (0, -1, {"u": 0, "v": None})))(jnp.arange(6), x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_member_keys():
    """Distinct but within a pair, or a group, and a prefix of a larger population's."""

    def data(**options):
        return np.asarray(jax.random.key_data(nesjax.member_keys(KEY, population(**options)))).tolist()

    assert len({*map(tuple, data(size=8))}) == 8
    assert data(size=16)[:8] == data(size=8)
    pairs = data(size=8, antithetic=True)
    assert pairs[0::2] == pairs[1::2] and len({*map(tuple, pairs)}) == 4
    assert len({*map(tuple, data(size=8, group_size=4))}) == len(data(size=8, group_size=4)) == 2


def test_legacy_and_other_keys_work():
    for key in (jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        noise = nesjax.sample_noise(key, PARAMS, population())
        assert np.ptp(members(noise)["a"]) > 0
    same = (nesjax.sample_noise(key, PARAMS, population()) for key in (jax.random.PRNGKey(3), jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, *map(members, same))


# ---- rules


def family_of(population, params) -> dict:
    return {leaf.path: leaf.family for leaf in population.leaves(params)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.elu(nesjax.Dense(6, noise=nesjax.Sparse(2))(x))
        return nesjax.Scale()(nesjax.Dense(3)(x))


def test_a_rule_beats_a_layers_family_beats_the_default():
    x = jnp.ones((1, 4))
    params = Net().init(KEY, x)
    default = {path: type(f) for path, f in family_of(population().for_model(Net(), x), params).items()}
    assert default["params/Dense_0/kernel"] is nesjax.Sparse
    assert default["params/Dense_1/kernel"] is nesjax.LowRank
    rules = {"Dense_1/kernel": nesjax.SignFlip(), r"bias$": nesjax.Frozen(), r"Dense_\d/kernel": nesjax.Gaussian()}
    ruled = family_of(population(noise=rules).for_model(Net(), x), params)
    assert ruled["params/Dense_1/kernel"] == nesjax.SignFlip()  # the first that matches
    assert ruled["params/Dense_0/kernel"] == nesjax.Gaussian()
    assert ruled["params/Dense_0/bias"] is ruled["params/Scale_0/bias"] is None
    assert ruled["params/Scale_0/scale"] == nesjax.LowRank()
    assert hash(population(noise=rules)) == hash(population(noise=dict(rules)))


def test_for_model_takes_flags_and_leaves_other_noise_fields_alone():
    class Noisy(nn.Module):
        noise: float = 0.1  # of its own, no family

        @nn.compact
        def __call__(self, x, train):
            return nesjax.Dense(3, noise=nesjax.Sparse())(x if train else 2 * x)

    (layer, _) = sorted(
        population().for_model(Noisy(), jnp.ones((1, 4)), True).layers, key=lambda layer: -len(layer.path)
    )
    assert (layer.path, layer.family, layer.axes) == ("Dense_0/kernel", nesjax.Sparse(), 0)
    assert population().for_model(nn.Sequential([nn.relu]), jnp.ones(4)).layers == ()


def test_frozen_parameters_stay_and_have_no_gradient():
    params = {"w": jnp.ones((4, 3)), "fixed": jnp.ones(3), "count": jnp.array(3)}
    frozen = population(noise={"fixed|count": nesjax.Frozen()})
    noise = nesjax.sample_noise(KEY, params, frozen)
    drawn = jax.jit(lambda: nesjax.materialise(params, noise, 2))()
    np.testing.assert_array_equal(drawn["fixed"], params["fixed"])
    assert drawn["count"] == 3 and (drawn["w"] != 1).all()
    grads = nesjax.estimate_gradient(noise, jnp.arange(8.0))
    assert not grads["fixed"].any() and grads["w"].any()
    assert grads["count"].dtype == params["count"].dtype and grads["count"] == 0


def test_std_by_rule_and_schedule():
    params = {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}
    rules = {"a": optax.linear_schedule(1.0, 0.0, 10), "b": 3.0}
    noise = nesjax.sample_noise(KEY, params, population(std=rules), step=jnp.array(5))
    drawn = members(noise, params)
    assert np.std(drawn["a"]) == pytest.approx(0.5, rel=0.01)
    assert np.std(drawn["b"]) == pytest.approx(3, rel=0.01)
    ended = nesjax.sample_noise(KEY, params, population(std=rules), step=10)
    grads = nesjax.estimate_gradient(ended, jnp.arange(8.0))
    assert not grads["a"].any() and grads["b"].any() and np.isfinite(grads["b"]).all()  # std 0: a zero gradient


def test_stacked_parameters_are_independent_layers():
    """A stacked parameter is used as its layers are, under scan and by index, and each has noise of its own."""
    params = {"w": jax.random.normal(KEY, (3, 5, 5))}
    noise = nesjax.sample_noise(KEY, params, population(noise={"w": nesjax.Stacked(nesjax.LowRank())}, std=0.3))

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["w"][1]

    x = jnp.ones((2, 5))
    got = jax.jit(lambda: nesjax.population_apply(scanned, params, noise, x, strict=True))()
    expected = jax.jit(jax.vmap(lambda i: scanned(nesjax.materialise(params, noise, i), x)))(jnp.arange(8))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_describe_counts_what_is_stored():
    table = nesjax.describe(
        PARAMS, population(noise={"^a": nesjax.Permuted("in"), "b": nesjax.Frozen(), "stack": nesjax.Stacked()})
    )
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "768" in rows["a"] and "frozen" in rows["b"] and "x (3,)" in rows["stack"]
    assert rows["path"].endswith("max_cosine")
    assert rows["a"].endswith(f"{nesjax.Permuted('in').max_cosine((16, 12)):.2f}") and rows["b"].endswith(" -")
    noise = nesjax.sample_noise(KEY, PARAMS, population(noise={"^a": nesjax.Permuted("in"), "": nesjax.LowRank()}))
    assert noise.shared[0].nbytes == 768
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(noise.direction(0)[2])) == 8  # 40 signs in two words


# ---- layers


@pytest.mark.parametrize(
    "ours, flax, x",
    [
        (nesjax.Dense, lambda **k: nn.Dense(5, **k), jnp.ones((2, 3))),
        (nesjax.Conv, lambda **k: nn.Conv(5, (3, 2), strides=2, **k), jnp.ones((2, 7, 6, 3))),
        (nesjax.Embed, lambda **k: nn.Embed(5, 4, **k), jnp.array([[0, 4]])),
    ],
    ids=["Dense", "Conv", "Embed"],
)
@pytest.mark.parametrize("options", [{}, {"param_dtype": jnp.bfloat16}], ids=["float32", "bfloat16"])
def test_layers_are_flaxs_own(ours, flax, x, options):
    """Law 6: the same parameters, initial values and outputs, whatever the noise field says."""
    plain = flax(**options)
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__ if name not in ("parent", "name")}
    for noise in (None, nesjax.Gaussian()):
        layer = ours(**fields, noise=noise)
        params, expected = layer.init(KEY, x), plain.init(KEY, x)
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        np.testing.assert_array_equal(layer.apply(params, x), plain.apply(params, x))


def test_scale_is_the_end_of_a_normalisation():
    x = jax.random.normal(KEY, (4, 6))
    bare, whole = nn.LayerNorm(use_scale=False, use_bias=False), nn.LayerNorm()
    params = {"params": {"scale": jnp.arange(6.0), "bias": -jnp.arange(6.0)}}
    got = nesjax.Scale().apply(params, bare.apply({}, x))
    np.testing.assert_allclose(got, whole.apply(params, x), rtol=1e-5, atol=1e-5)
