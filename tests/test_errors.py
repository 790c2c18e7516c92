"""Bad input: an error at trace time that names the argument, what was expected and what came."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nesjax
from nesjax import Population

KEY = jax.random.key(0)
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
POPULATION = Population(8, std=0.1)
NOISE = nesjax.sample_noise(KEY, PARAMS, POPULATION)
MESH = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
TWO_AXES = jax.make_mesh((4, 2), ("devices", "model"))
MLP = eqx.nn.MLP(4, 3, 8, 1, key=KEY)
NORM = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
STATE = nesjax.TrainState.create(params=PARAMS, optimizer=optax.sgd(0.1), key=KEY)


def loss_fn(params, x=1.0):
    return jnp.sum(jnp.ones(4) @ params["w"]) * jnp.sum(x)


def sample(**options):
    return nesjax.sample_noise(KEY, PARAMS, Population(8, **{"std": 0.1, **options}))


def grad(loss_fn=loss_fn, *args, population=POPULATION, params=PARAMS, **options):
    return jax.eval_shape(nesjax.value_and_grad(loss_fn, population, **options), params, KEY, *args)


def spread(population=POPULATION, **options):
    return nesjax.make_train_step(loss_fn, optax.sgd(0.1), population, **options)


def mapped(*args, in_axes=0):
    return nesjax.population_apply(lambda p, *args: sum(map(jnp.sum, args)), PARAMS, NOISE, *args, in_axes=in_axes)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(x), None


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()(x, None)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan()(x, None)[0]


# What is done, the error, and what its message must hold.
CASES = {
    "axis of Permuted": (lambda: nesjax.Permuted("sideways"), ValueError, "axis", "'auto', 'in', 'out', 'both'", "'sideways'"),
    "axis of SignFlip": (lambda: nesjax.SignFlip("up"), ValueError, "axis", "'both'", "'up'"),
    "values of SignFlip": (lambda: nesjax.SignFlip(values="uniform"), ValueError, "values", "'normal'", "'uniform'"),
    "values of LowRank": (lambda: nesjax.LowRank(values="cauchy"), ValueError, "values", "'rademacher'", "'cauchy'"),
    "rank 0": (lambda: nesjax.LowRank(0), ValueError, "rank", ">= 1", "0"),
    "fused of numbers": (lambda: nesjax.Node(values="normal", fused=True), ValueError, "Node fused", "'rademacher'", "'normal'"),
    "fused of rank 2": (lambda: nesjax.LowRank(2, fused=True), ValueError, "LowRank fused", "rank=1", "rank=2"),
    "fused is a word": (lambda: nesjax.LowRank(fused="yes"), ValueError, "fused", "True", "'yes'"),
    "rank 1.5": (lambda: nesjax.LowRank(1.5), ValueError, "rank", "int", "1.5"),
    "k 0": (lambda: nesjax.Sparse(0), ValueError, "k", ">= 1", "0"),
    "k too large": (lambda: sample(noise=nesjax.Sparse(5)), ValueError, "parameter w", "k", "4 inputs", "5"),
    "sparsity 0": (lambda: nesjax.Permuted(in_sparsity=0), ValueError, "in_sparsity", "(0, 1]", "0"),
    "sparsity 0.0": (lambda: nesjax.Permuted(out_sparsity=0.0), ValueError, "out_sparsity", "(0, 1]", "0.0"),
    "sparsity 1.5": (lambda: nesjax.Permuted(in_sparsity=1.5), ValueError, "in_sparsity", "(0, 1]", "1.5"),
    "sparsity -1": (lambda: nesjax.Permuted(in_sparsity=-1), ValueError, "in_sparsity", "count >= 1", "-1"),
    "sparsity True": (lambda: nesjax.Permuted(in_sparsity=True), ValueError, "in_sparsity", "True"),
    "sparsity too large": (lambda: sample(noise=nesjax.Permuted(out_sparsity=9)), ValueError, "w", "out_sparsity", "3", "9"),
    "unknown family": (lambda: sample(noise="LowRank"), TypeError, "noise", "nesjax.LowRank()", "'LowRank'"),
    "a family's class": (lambda: sample(noise=nesjax.LowRank), TypeError, "noise", "LowRank"),
    "unknown family in a rule": (lambda: sample(noise={"w": "gauss"}), TypeError, "noise['w']", "'gauss'"),
    "family of Stacked": (lambda: nesjax.Stacked("w"), TypeError, "family", "'w'"),
    "axes of Stacked": (lambda: nesjax.Stacked(axes=0), ValueError, "axes", ">= 1", "0"),
    "too many stack axes": (lambda: sample(noise={"b": nesjax.Stacked(axes=2)}), ValueError, "b", "2 stack axes", "(3,)"),
    "regex": (lambda: sample(noise={"(": nesjax.LowRank()}), ValueError, "noise", "'('", "regular expression"),
    "rule without a match": (lambda: sample(noise={"bias": nesjax.Frozen()}), ValueError, "noise", "'bias'", "b, w"),
    "std rule without a match": (lambda: sample(std={"w": 0.1, "q": 1.0}), ValueError, "std", "'q'", "b, w"),
    "no std rule": (lambda: sample(std={"w": 0.1}), ValueError, "std", "parameter b"),
    "size 0": (lambda: Population(0, std=0.1), ValueError, "size", ">= 1", "0"),
    "size 2.0": (lambda: Population(2.0, std=0.1), ValueError, "size", "int", "2.0"),
    "odd pairs": (lambda: Population(7, std=0.1, antithetic=True), ValueError, "size", "even", "7"),
    "std 0": (lambda: Population(8, std=0.0), ValueError, "std", "> 0", "0.0"),
    "std negative": (lambda: Population(8, std=-0.1), ValueError, "std", "> 0", "-0.1"),
    "std nan": (lambda: Population(8, std=float("nan")), ValueError, "std", "finite", "nan"),
    "std inf": (lambda: Population(8, std=float("inf")), ValueError, "std", "finite", "inf"),
    "std in a rule": (lambda: Population(8, std={"w": 0.0}), ValueError, "std['w']", "0.0"),
    "std of no kind": (lambda: Population(8, std="small"), ValueError, "std", "'small'"),
    "schedule without a step": (lambda: sample(std=optax.constant_schedule(0.1)), ValueError, "std", "step"),
    "chunk_size 0": (lambda: Population(8, std=0.1, chunk_size=0), ValueError, "chunk_size", ">= 1", "0"),
    "group_size": (lambda: Population(8, std=0.1, group_size=3), ValueError, "group_size", "8", "3"),
    "odd groups": (lambda: Population(6, std=0.1, group_size=3, antithetic=True), ValueError, "group_size", "even", "3"),
    "key is a number": (lambda: nesjax.sample_noise(0, PARAMS, POPULATION), TypeError, "key", "jax.random.key", "0"),
    "key is many": (lambda: nesjax.sample_noise(jax.random.split(KEY), PARAMS, POPULATION), TypeError, "key", "[2]"),
    "key of a state": (lambda: nesjax.TrainState.create(params=PARAMS, optimizer=optax.sgd(1), key=1), TypeError, "key"),
    "key of member_keys": (lambda: nesjax.member_keys(1.0, POPULATION), TypeError, "key", "1.0"),
    "empty params": (lambda: nesjax.sample_noise(KEY, {}, POPULATION), ValueError, "params", "no leaves"),
    "integer params": (lambda: nesjax.sample_noise(KEY, {"n": jnp.ones(3, int)}, POPULATION), TypeError, "n", "int32", "Frozen"),
    "member beyond": (lambda: nesjax.member(NOISE, 8), IndexError, "i", "[0, 8)", "8"),
    "member 1.5": (lambda: nesjax.member(NOISE, 1.5), TypeError, "i", "integer", "1.5"),
    "no noise": (lambda: nesjax.weighted_sum(PARAMS, jnp.ones(8)), TypeError, "noise", "sample_noise", "dict"),
    "rules of numbers": (lambda: sample(noise={1: nesjax.LowRank()}), TypeError, "noise", "regular expressions", "1"),
    "another kind of legacy key": (lambda: nesjax.member_keys(jnp.ones(4, jnp.uint32), POPULATION), TypeError, "key", "uint32[4]"),
    "noise of a layer": (lambda: POPULATION.for_model(nesjax.Dense(3, noise="gauss"), jnp.ones((1, 4))), TypeError, "noise", "'gauss'"),
    "stack axis": (lambda: POPULATION.for_model(Stack(), jnp.ones((1, 4))), ValueError, "bias", "neighbours"),
    "loss with aux": (lambda: grad(lambda p: (p["b"].sum(), 1.0)), TypeError, "loss_fn", "has_aux", "tuple"),
    "credit": (lambda: grad(credit="outputs"), ValueError, "credit", "'inputs'", "'outputs'"),
    "samples 0": (lambda: grad(samples=0), ValueError, "samples", ">= 1", "0"),
    "samples of nothing": (lambda: grad(loss_fn, jnp.ones(2), samples=2), ValueError, "samples=2", "in_axes"),
    "samples of another number": (lambda: grad(loss_fn, jnp.ones((8, 3)), samples=2, in_axes=0), ValueError, "samples=2", "[N, 2, ...]", "(8, 3)"),
    "samples of no axis": (lambda: grad(loss_fn, jnp.ones(8), samples=2, in_axes=0), ValueError, "samples=2", "[N, 2, ...]", "(8,)"),
    "no population": (lambda: nesjax.sample_noise(KEY, PARAMS, 8), TypeError, "population", "nesjax.Population", "int"),
    "population first": (lambda: nesjax.describe(POPULATION, PARAMS), TypeError, "population", "dict"),
    "population of value_and_grad": (lambda: nesjax.value_and_grad(loss_fn, 64), TypeError, "population", "int"),
    "another structure": (lambda: nesjax.materialise({"w": PARAMS["w"]}, NOISE, 0), ValueError, "params", "structure"),
    "another shape": (lambda: nesjax.materialise({**PARAMS, "w": jnp.ones((3, 4))}, NOISE, 0), ValueError, "w", "[4, 3]", "[3, 4]"),
    "another dtype": (lambda: nesjax.population_apply(loss_fn, {**PARAMS, "b": jnp.ones(3, "bfloat16")}, NOISE), ValueError, "b", "float32", "bfloat16"),
    "not a member": (lambda: nesjax.perturbed(loss_fn)(PARAMS, NOISE), TypeError, "member", "nesjax.member", "Noise"),
    "losses too few": (lambda: nesjax.estimate_gradient(NOISE, jnp.ones(7)), ValueError, "losses", "(8,)", "(7,)"),
    "losses of samples": (lambda: nesjax.estimate_gradient(NOISE, jnp.ones((8, 2))), ValueError, "losses", "(8,)", "(8, 2)"),
    "losses complex": (lambda: nesjax.estimate_gradient(NOISE, jnp.ones(8, complex)), TypeError, "losses", "complex64"),
    "weights": (lambda: nesjax.weighted_sum(NOISE, jnp.ones(4)), ValueError, "weights", "(8,)", "(4,)"),
    "baseline": (lambda: nesjax.estimate_gradient(NOISE, jnp.ones(8), baseline="median"), ValueError, "baseline", "leave_one_out", "'median'"),
    "baseline needs the loss": (lambda: nesjax.estimate_gradient(NOISE, jnp.ones(8), baseline="unperturbed"), ValueError, "baseline", "value_and_grad"),
    "baseline of value_and_grad": (lambda: grad(baseline="median"), ValueError, "baseline", "'median'"),
    "shaping": (lambda: grad(shaping="ranks"), TypeError, "shaping", "'ranks'"),
    "shaping's shape": (lambda: grad(shaping=jnp.sum), ValueError, "shaping", "[8]", "()"),
    "pair_sign of odd groups": (lambda: grad(shaping=nesjax.pair_sign, population=Population(7, std=0.1)), ValueError, "even", "7"),
    "top_k 0": (lambda: nesjax.top_k(0), ValueError, "k", ">= 1", "0"),
    "top_k too large": (lambda: grad(shaping=nesjax.top_k(5)), ValueError, "k", "4 pairs", "5"),
    "loss_fn": (lambda: nesjax.value_and_grad(3, POPULATION), TypeError, "loss_fn", "3"),
    "loss of a batch": (lambda: grad(lambda p: p["b"]), ValueError, "loss_fn", "scalar", "(3,)"),
    "complex loss": (lambda: grad(lambda p: p["b"].sum() * 1j), TypeError, "loss_fn", "real", "complex64"),
    "aux missing": (lambda: grad(has_aux=True), TypeError, "loss_fn", "(loss, aux)", "has_aux"),
    "in_axes too many": (lambda: mapped(jnp.ones(8), in_axes=(0, 0)), ValueError, "in_axes", "1 args", "(0, 0)"),
    "in_axes of a wrong size": (lambda: mapped(jnp.ones((7, 2))), ValueError, "in_axes", "8 slices", "(7, 2)"),
    "in_axes beyond": (lambda: mapped(jnp.ones(8), in_axes=1), ValueError, "in_axes", "1", "(8,)"),
    "in_axes of a scalar": (lambda: mapped(2.0), ValueError, "in_axes", "0", "()"),
    "in_axes of another tree": (lambda: mapped({"u": jnp.ones(8)}, in_axes=({"v": 0},)), ValueError, "in_axes", "prefix"),
    "in_axes of value_and_grad": (lambda: grad(loss_fn, jnp.ones(3), in_axes=0), ValueError, "in_axes", "8 slices", "(3,)"),
    "no TrainState": (lambda: nesjax.make_train_step(loss_fn, optax.sgd(1), POPULATION)(PARAMS), TypeError, "state", "TrainState", "dict"),
    "for_model of a function": (lambda: POPULATION.for_model(loss_fn), TypeError, "model", "flax.linen.Module", "function"),
    "from_losses without noise": (lambda: nesjax.from_losses().update(PARAMS, (), PARAMS, losses=jnp.ones(8)), TypeError, "noise", "dict"),
    "from_losses without losses": (lambda: nesjax.from_losses().update(NOISE, (), PARAMS), ValueError, "losses"),
    "from_losses of others": (lambda: nesjax.from_losses().update(NOISE, (), {"w": 1.0}, losses=jnp.ones(8)), ValueError, "params", "structure"),
    "devices that don't divide": (lambda: spread(Population(6, std=0.1), mesh=MESH), ValueError, "population size 6", "4 devices", "'devices'"),
    "devices that split pairs": (lambda: spread(Population(12, std=0.1, antithetic=True), mesh=MESH), ValueError, "size 12", "4 devices", "times 2"),
    "devices that split groups": (lambda: grad(population=Population(8, std=0.1, group_size=4), mesh=MESH), ValueError, "size 8", "4 devices", "times 4"),
    "axis of a mesh": (lambda: spread(mesh=MESH, axis_name="model"), ValueError, "axis_name", "('devices',)", "'model'"),
    "axes of a mesh": (lambda: spread(mesh=TWO_AXES), ValueError, "axis_name", "('devices', 'model')"),
    "axes of a mesh, value_and_grad": (lambda: grad(mesh=TWO_AXES), ValueError, "axis_name", "('devices', 'model')"),
    "mesh of no kind": (lambda: spread(mesh=4), TypeError, "mesh", "jax.sharding.Mesh", "int"),
    "axis_name of no kind": (lambda: spread(axis_name=0), TypeError, "axis_name", "string", "0"),
    "in_axes of a mesh": (lambda: spread(mesh=MESH, in_axes=0)(STATE, jnp.ones(4)), ValueError, "in_axes", "8 slices", "(4,)"),
    "functions as params": (lambda: nesjax.sample_noise(KEY, MLP, POPULATION), TypeError, "activation", "eqx.partition", "eqx.combine"),
    "functions in a state": (lambda: nesjax.TrainState.create(params=MLP, optimizer=optax.sgd(1), key=KEY), TypeError, "activation", "eqx.partition"),
    "NumPy in the loss": (lambda: grad(lambda p: np.sort(p["b"])[0]), TypeError, "outside JAX", "population_apply", "estimate_gradient"),
    "NumPy array in the loss": (lambda: grad(lambda p: np.asarray(p["b"]).mean()), TypeError, "outside JAX", "population_apply"),
    "a float of a loss": (lambda: grad(lambda p: float(p["b"].sum())), TypeError, "outside JAX", "estimate_gradient"),
    "branch in the loss": (lambda: grad(lambda p: p["b"].sum() if p["b"][0] > 0 else 0.0), TypeError, "jnp.where", "jax.lax.cond"),
    "optimizer not called": (lambda: nesjax.make_train_step(loss_fn, optax.adam, POPULATION), TypeError, "optimizer", "optax.adam(", "not called"),
    "optimizer of a state": (lambda: nesjax.TrainState.create(params=PARAMS, optimizer=optax.adam, key=KEY), TypeError, "optimizer", "not called"),
    "optimizer of no kind": (lambda: nesjax.make_train_step(loss_fn, "adam", POPULATION), TypeError, "optimizer", "'adam'"),
    "top_k not called": (lambda: grad(shaping=nesjax.top_k), TypeError, "shaping", "nesjax.top_k(k)", "not called"),
    "in_axes by name": (lambda: grad(loss_fn, jnp.ones((3, 2)), in_axes=0), ValueError, "argument x,", "8 slices", "(3, 2)"),
    "in_axes by name, inside": (lambda: grad(lambda p, batch: 0.0, {"u": jnp.ones(3)}, in_axes=0), ValueError, "argument batch/u,", "(3,)"),
    "in_axes without a name": (lambda: mapped(jnp.ones(8), jnp.ones(7)), ValueError, "argument 1 after params", "(7,)"),
    "baseline that shaping ignores": (lambda: grad(shaping=nesjax.centered_rank, baseline="leave_one_out"), ValueError, "baseline", "shaping"),
    "all frozen": (lambda: sample(noise={"": nesjax.Frozen()}), ValueError, "noise", "every parameter"),
    "a rule in the shadow": (lambda: sample(noise={"b|w": nesjax.LowRank(), "w": nesjax.Frozen()}), ValueError, "noise", "'w'", "earlier rules"),
    "statistics of Linen": (lambda: nesjax.sample_noise(KEY, {"params": PARAMS, "batch_stats": PARAMS}, POPULATION), ValueError, "params", "batch_stats/b", 'variables["params"]'),
    "statistics of NNX": (lambda: nesjax.sample_noise(KEY, nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), POPULATION), ValueError, "params", "mean", "nnx.Param"),
    "random keys of NNX": (lambda: nesjax.sample_noise(KEY, nnx.state(nnx.Dropout(0.1, rngs=nnx.Rngs(0))), POPULATION), TypeError, "rngs", "nnx.split", "copy=True"),
    "an NNX model changed from within": (lambda: grad(lambda p: NORM(jnp.ones((2, 3)) * p["b"][0]).mean()), TypeError, "copy of its own", "nnx.merge", "BatchStat"),
    "no TrainState on a mesh": (lambda: spread(mesh=MESH)(PARAMS), TypeError, "state", "TrainState", "dict"),
}  # fmt: skip


@pytest.mark.parametrize("act, error, parts", [(case[0], case[1], case[2:]) for case in CASES.values()], ids=CASES)
def test_bad_input_is_named(act, error, parts):
    with pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)) as caught:
        act()
    assert len(str(caught.value).split("The error:")[0]) < 600


def test_a_devices_axis_that_does_not_divide_the_population():
    step = nesjax.make_train_step(loss_fn, optax.sgd(0.1), Population(6, std=0.1), axis_name="devices")
    with pytest.raises(ValueError, match="size 6 must be a multiple of the 4 devices of axis 'devices'"):
        jax.pmap(step, "devices", in_axes=(None, 0), out_axes=None)(STATE, jnp.ones(4))


def test_jaxs_own_error_is_the_cause():
    with pytest.raises(TypeError, match="JAX alone") as caught:
        grad(lambda p: np.sort(p["b"])[0])
    assert isinstance(caught.value.__cause__, jax.errors.TracerArrayConversionError)


def test_a_part_of_a_model_that_merge_lacks_is_named():
    graph, weights, _ = nnx.split(NORM, nnx.Param, ...)
    with pytest.raises(ValueError, match="number of leaves") as caught:
        nesjax.value_and_grad(lambda w: nnx.merge(graph, w)(jnp.ones((2, 3))).mean(), POPULATION)(weights, KEY)
    assert "nnx.merge(graph, weights, rest" in caught.value.__notes__[0]


def test_frozen_statistics_may_stay():
    model = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    noise = nesjax.sample_noise(KEY, model, Population(8, std=0.1, noise={"mean|var": nesjax.Frozen()}))
    assert [leaf.path for leaf in noise.leaves if leaf.family is not None] == ["bias/value", "scale/value"]


def test_none_is_a_group_of_all():
    assert Population(8, std=0.1, group_size=None) == Population(8, std=0.1, group_size=1) == Population(8, std=0.1)
