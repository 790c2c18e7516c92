"""States with every kind of leaf; their checkpoints by several versions of JAX lie in `checkpoints`.

`python tests/kinds.py` adds one by the JAX that runs it, for all others to read.
"""

import itertools
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nesjax

FOLDER = pathlib.Path(__file__).parent / "checkpoints"


def first() -> tuple[nesjax.TrainState, nesjax.Population]:
    """Before small arrays lay in one: bfloat16, a typed key, a schedule, a mask, observation statistics."""
    params = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(7)}
    mask = {"w": True, "b": False, "n": False}
    optimizer = optax.masked(optax.adam(optax.linear_schedule(0.1, 0.0, 10), mu_dtype=jnp.bfloat16), mask)
    stats = nesjax.rl.ObsStats.create((3,))
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=jax.random.key(3), obs_stats=stats)
    noise = {"w": nesjax.Permuted(in_sparsity=0.5), "": nesjax.Frozen()}
    return state, nesjax.Population(16, std=optax.exponential_decay(0.1, 10, 0.5), noise=noise)


def every() -> tuple[nesjax.TrainState, nesjax.Population]:
    """Also large arrays, NNX, Equinox, a legacy key, keys of another kind; a number of its own in every leaf."""
    key = jax.random.key(0)
    params = {
        "large": jnp.zeros((150, 150)),
        "dtypes": [jnp.zeros(3, dtype) for dtype in ("bfloat16", "float16", "int8", "uint32", "bool")],
        "nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
        "equinox": eqx.partition(eqx.nn.MLP(2, 3, 4, 1, key=key), eqx.is_inexact_array)[0],
    }
    mask = {name: name != "dtypes" for name in params}
    optimizer = optax.masked(optax.adam(optax.linear_schedule(0.1, 0.0, 10), mu_dtype=jnp.bfloat16), mask)
    stats = nesjax.rl.ObsStats.create({"joints": (3,), "camera": jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8)})
    state = nesjax.TrainState.create(params=params, optimizer=optimizer, key=key, obs_stats=stats)
    count = itertools.count(1)
    state = jax.tree.map(lambda leaf: numbered(leaf, next(count)), state)
    keys = {"legacy": jax.random.PRNGKey(1), "others": jax.random.split(jax.random.key(2, impl="rbg"), 2)}
    state = state.replace(key=jax.random.key(3), opt_state=(state.opt_state, keys))
    std = (("nnx", optax.exponential_decay(0.1, 10, 0.5)), ("", 0.1))
    return state, nesjax.Population(
        16, std=std, noise={"large": nesjax.Permuted(in_sparsity=0.5), "dtypes": nesjax.Frozen()}
    )


def numbered(leaf: Any, number: int) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else (jnp.arange(leaf.size).reshape(leaf.shape) + number).astype(leaf.dtype)


if __name__ == "__main__":
    nesjax.checkpoint.save(FOLDER / f"every-jax-{jax.__version__}", *every())
