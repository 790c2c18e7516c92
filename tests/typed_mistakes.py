"""Mistakes that an editor shows: each line is an error to pyright, or its `type: ignore` is one."""

import jax
import optax

import nesjax

population = nesjax.Population(64, 0.1, True)  # type: ignore
nesjax.Population(64, std=0.1, sise=3)  # type: ignore
nesjax.Population("64", std=0.1)  # type: ignore
nesjax.LowRank(values="gaussian")  # type: ignore
nesjax.SignFlip("rows")  # type: ignore
nesjax.Permuted(axis="columns")  # type: ignore
print(nesjax.estimate_gradients)  # type: ignore
print(nesjax.checkpoint.Runs)  # type: ignore


def mistakes(noise: nesjax.Noise, state: nesjax.TrainState, losses: jax.Array, population: nesjax.Population):
    nesjax.estimate_gradient(noise, losses, nesjax.centered_rank)  # type: ignore
    nesjax.estimate_gradient(noise, losses, baseline="median")  # type: ignore
    nesjax.estimate_gradient(losses, losses)  # type: ignore
    nesjax.value_and_grad(jax.numpy.sum, population, baseline="man")  # type: ignore
    nesjax.make_train_step(jax.numpy.sum, optax.sgd, population)  # type: ignore
    nesjax.checkpoint.save("run", state)  # type: ignore
    state.replaced(step=1)  # type: ignore
