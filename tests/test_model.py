"""PerturbedModel: the plain module without a key, population_apply and estimate_gradient with one, bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nesjax

KEY, NOISE_KEY = jax.random.key(0), jax.random.key(1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nesjax.Dense(8, noise=nesjax.Permuted("in"))(x))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x))


@pytest.mark.parametrize("in_axes, group", [(None, None), (0, None), (0, 4)], ids=["shared", "own", "groups"])
def test_equal_to_population_apply_bit_for_bit(in_axes, group):
    net, x = Net(), jax.random.normal(KEY, (5, 6))
    population = nesjax.Population(8, std=optax.linear_schedule(0.1, 0.2, 10), group_size=group)
    model = nesjax.PerturbedModel(net, population)
    variables = net.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, model.init(KEY, x), variables)
    np.testing.assert_array_equal(model.apply(variables, x), net.apply(variables, x))

    inputs = x if in_axes is None else jax.random.normal(KEY, (8 // (group or 1), 5, 6))
    params, stats = {"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}
    drawn = lambda key: nesjax.sample_noise(key, params, population.for_model(net, x), step=3)
    whole = lambda params, x: net.apply({**params, **stats}, x)
    applied = lambda key: nesjax.population_apply(whole, params, drawn(key), inputs, in_axes=in_axes)
    by_hand = jax.jit(applied)(NOISE_KEY)  # drawn in the same program: in another, products round otherwise
    other = nesjax.PerturbedModel(net, population)  # has seen no inputs but these
    out = jax.jit(lambda key: other.apply(variables, inputs, key=key, in_axes=in_axes, step=3))(NOISE_KEY)
    np.testing.assert_array_equal(out, by_hand)
    assert out.shape == (8, 5, 3) and (out[0] != out[1]).any()

    losses = (out**2).mean((1, 2))
    for options in ({}, {"shaping": nesjax.centered_rank}, {"baseline": "leave_one_out"}):
        grads = jax.jit(lambda key: other.estimate_gradient(variables, key, losses, step=3, **options))(NOISE_KEY)  # noqa: B023
        expected = jax.jit(lambda key: nesjax.estimate_gradient(drawn(key), losses, **options))(NOISE_KEY)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, grads, expected)


def test_it_trains_in_one_jit():
    model = nesjax.PerturbedModel(nn.Dense(1), nesjax.Population(64, std=0.1))
    x = jax.random.normal(KEY, (16, 4))
    variables, optimizer = model.init(KEY, x), optax.adam(0.1)

    @jax.jit
    def step(carry, key):
        variables, state = carry
        losses = ((model.apply(variables, x, key=key) - x[:, :1]) ** 2).mean((1, 2))
        updates, state = optimizer.update(model.estimate_gradient(variables, key, losses), state)
        return (optax.apply_updates(variables, updates), state), losses.mean()

    _, losses = jax.lax.scan(step, (variables, optimizer.init(variables)), jax.random.split(KEY, 60))
    assert losses[-1] < 0.1 * losses[0]


def test_what_it_refuses():
    model, x = nesjax.PerturbedModel(Net(), nesjax.Population(8, std=0.1)), jnp.ones((5, 6))
    variables = Net().init(KEY, x)
    with pytest.raises(ValueError, match=r"population must know .* call init or apply first"):
        model.estimate_gradient(variables, NOISE_KEY, jnp.ones(8))
    with pytest.raises(ValueError, match=r"mutable must be False with a key, got \['batch_stats'\]"):
        model.apply(variables, x, key=NOISE_KEY, mutable=["batch_stats"])
    with pytest.raises(ValueError, match='variables must have the collection "params", got'):
        model.apply({"batch_stats": {}}, x, key=NOISE_KEY)
