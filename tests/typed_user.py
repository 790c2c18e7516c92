"""A user's script as an editor sees it: pyright finds nothing wrong here. `typed_mistakes.py` is its opposite."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import nesjax

model, optimizer = nn.Dense(3), optax.adam(1e-2)
population = nesjax.Population(64, std=0.1, antithetic=True, group_size=None, chunk_size=8).for_model(
    model, jnp.ones(4)
)
family: nesjax.NoiseFamily = nesjax.LowRank(rank=2, values="normal")
families = [family, nesjax.Permuted("in", in_sparsity=0.5), nesjax.SignFlip("both", values="normal"), nesjax.Sparse(2)]
rules = nesjax.Population(64, std={"": 0.1}, noise={"kernel": nesjax.Stacked(family, axes=1), "bias": nesjax.Frozen()})


def loss_fn(params, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.asarray(model.apply(params, x))))


def train(folder: str, x: jax.Array) -> nesjax.TrainState:
    state = nesjax.TrainState.create(
        params=model.init(jax.random.key(0), x), optimizer=optimizer, key=jax.random.key(1)
    )
    step = nesjax.make_train_step(loss_fn, optimizer, population, baseline="unperturbed", in_axes=0)
    with nesjax.checkpoint.Run(folder, population, every=10) as run:
        state = run.restore(state)
        state, metrics = step(state, x)
        run.update(state, metrics)
    loss: jax.Array = metrics["loss"]
    print(loss.item(), run.steps[-1:])
    return state.replace(step=state.step + 1)


def by_hand(x: jax.Array) -> None:
    perturbed = nesjax.PerturbedModel(model, population)
    variables = perturbed.init(jax.random.key(0), x)
    losses = jnp.square(perturbed.apply(variables, x, key=jax.random.key(1))).mean((1, 2))
    perturbed.estimate_gradient(variables, jax.random.key(1), losses, shaping=nesjax.top_k(2), baseline=None)
    noise = nesjax.sample_noise(jax.random.key(1), variables, population)
    nesjax.estimate_gradient(noise, losses, shaping=nesjax.centered_rank)
    stats = nesjax.rl.ObsStats.create((4,))
    print(stats.replace(count=stats.count + 1).mean, len(families), rules.size)
