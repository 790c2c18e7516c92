"""The same three lines train a Flax Linen, a Flax NNX and an Equinox model, none of which knows of nesjax.

    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)                         # before

    population = nesjax.Population(size=1024, std=0.05)                             # after
    es_grad = nesjax.value_and_grad(loss_fn, population, shaping=nesjax.centered_rank)
    loss, grads = es_grad(params, key, x, y)

Expected: each model passes 90 % held out on scikit-learn's digits within a minute on two CPU cores.

    python examples/any_model.py --seed 0
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import run
from digits import load
from flax import nnx

import nesjax


def linen_model(key):
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    return model.init(key, jnp.ones((1, 64))), model.apply


def nnx_model(key):
    rngs = nnx.Rngs(key)
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs))
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox_model(key):
    params, static = eqx.partition(eqx.nn.MLP(64, 10, 64, 1, key=key), eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def train(params, predict, args) -> float:
    """Trains on minibatches of 128 and returns the held-out accuracy. Nothing here depends on the library."""
    (images, labels), (test_images, test_labels) = load(args.seed)
    optimizer = optax.adam(0.02)

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    population = nesjax.Population(size=1024, std=0.05)
    es_grad = nesjax.value_and_grad(loss_fn, population, shaping=nesjax.centered_rank)

    @jax.jit
    def step(state):
        key = jax.random.fold_in(state.key, state.step)
        rows = jax.random.randint(jax.random.fold_in(key, 0), (128,), 0, len(images))
        loss, grads = es_grad(state.params, key, images[rows], labels[rows])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), {"loss": loss}

    @jax.jit
    def accuracy(state):
        return {"held-out accuracy": (predict(state.params, test_images).argmax(-1) == test_labels).mean()}

    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=jax.random.key(args.seed))
    return run.train(args, state, step, population, evaluate=accuracy, title=args.out.name)[1]["held-out accuracy"]


def main():
    args = run.parse(run.options(__doc__, steps=150, minutes=5))
    folder = args.out
    for name, build in {"Flax Linen": linen_model, "Flax NNX": nnx_model, "Equinox": equinox_model}.items():
        args.out = folder / name
        print(f"{name}: held-out accuracy {train(*build(jax.random.key(args.seed)), args):.4f}")


if __name__ == "__main__":
    main()
