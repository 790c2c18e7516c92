"""What XLA makes of nesjax for an H100: kernels and memory, compiled without the GPU (see benchmarks/h100.py)."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import nesjax
from benchmarks.h100 import CUBLAS, OWN, available, compile_for_h100, h100_mesh, kernels, kinds, modelled_us, temp_bytes
from benchmarks.modelled import dense, layer, step
from nesjax import Gaussian, LowRank, Node, Permuted, SignFlip, Sparse

NEEDS = "needs the CUDA plugin's wheels (benchmarks/h100.py), and JAX_PLATFORMS=cpu where there is no GPU"
pytestmark = [pytest.mark.gpu_aot, pytest.mark.skipif(not available(), reason=NEEDS)]

N, WIDTH = 8192, 1024
struct = jax.ShapeDtypeStruct
X = struct((N, WIDTH), jnp.bfloat16)
LAYER = {"bias": struct((WIDTH,), jnp.bfloat16), "kernel": struct((WIDTH, WIDTH), jnp.bfloat16)}
KEY = jax.eval_shape(lambda: jax.random.key(0))
POPULATION = nesjax.Population(size=N, std=0.02)

# (products, kernels, MiB beside arguments and results, modelled microseconds) of a layer's forward pass and of its
# gradient, all but the products at most. What the pass makes is of the size of its activations, [N, WIDTH] in float32
# or bfloat16 (32 or 16 MiB); all the members' kernels would be 16 GiB.
COSTS = {
    LowRank(): ((1, 6, 35, 65), (1, 12, 57, 93)),
    LowRank(fused=True): ((1, 6, 6, 32), (1, 12, 57, 93)),
    LowRank(4): ((1, 7, 38, 109), (2, 13, 209, 334)),
    LowRank(values="normal"): ((1, 10, 33, 363), (1, 14, 73, 387)),
    SignFlip(): ((2, 10, 84, 119), (1, 13, 57, 93)),
    SignFlip("in"): ((2, 9, 52, 96), (0, 9, 2, 21)),
    Permuted("in"): ((2, 17, 65, 364), (1, 19, 101, 317)),
    Permuted("out"): ((1, 15, 97, 364), (1, 19, 101, 317)),
    Permuted("both"): ((2, 20, 129, 546), (0, 30, 133, 60490)),
    Permuted(in_sparsity=0.1): ((2, 16, 65, 247), (1, 18, 97, 203)),
    Sparse(): ((1, 12, 33, 252), (0, 15, 17, 227)),
    Gaussian(): ((1, 11, 69, 114000), (1, 14, 16393, 119400)),
}


def check(compiled, products, count, mib, us):
    found = kernels(compiled)
    assert kinds(compiled).get("gemm", 0) == products, found
    assert len(found) <= count, found
    assert temp_bytes(compiled) <= mib * 2**20
    assert modelled_us(compiled) <= us, found
    text = compiled.as_text()
    assert "f64[" not in text and "callback" not in text and "infeed" not in text


def loss_fn(params, x, y):
    for one in params[:-1]:
        x = dense(one, x)
    return jnp.mean((x @ params[-1]["kernel"] + params[-1]["bias"] - y) ** 2)


def test_every_family_is_here():
    assert {type(family) for family in COSTS} == set(nesjax.FAMILIES)


def test_kernels_are_read():
    """The plain layer is one product; loops count by their trips, and what they hold is found."""
    plain = compile_for_h100(*layer(None, WIDTH, N))
    assert kinds(plain) == {"gemm": 1}
    assert 17 < modelled_us(plain) < 35  # 17: at the peak of the tensor cores

    wide = [struct((8192, 8192), dtype) for dtype in (jnp.int8, jnp.bfloat16, jnp.float32)]
    product = lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32)
    found = [kernels(compile_for_h100(product, a, options=CUBLAS)) for a in wide]
    times = [sum(kernel.us for kernel in each if kernel.kind == "gemm") for each in found]
    assert [round(time / times[0], 1) for time in times] == [1, 2, 4]

    def loop(w, x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sort(jnp.tanh(x @ w), 0), x)

    found = kernels(compile_for_h100(loop, LAYER["kernel"], struct((16, WIDTH), jnp.bfloat16)))
    assert {kernel.runs for kernel in found if kernel.kind in ("gemm", "sort")} == {7}
    assert {"gemm", "sort"} <= {kernel.kind for kernel in found}


@pytest.mark.parametrize("family", COSTS, ids=str)
def test_forward(family):
    check(compile_for_h100(*layer(family, WIDTH, N)), *COSTS[family][0])


@pytest.mark.parametrize("family", COSTS, ids=str)
def test_gradient(family):
    population = nesjax.Population(size=N, std=0.02, noise=family)

    def gradient(params, key, weights):
        return nesjax.weighted_sum(nesjax.sample_noise(key, params, population), weights)

    check(compile_for_h100(gradient, LAYER, KEY, struct((N,), jnp.float32)), *COSTS[family][1])


def test_the_gradient_multiplies_bfloat16():
    """Signs, and weights in two parts, of which XLA doesn't round the second away."""
    weights = struct((N,), jnp.float32)
    sums = lambda key, weights: nesjax.weighted_sum(nesjax.sample_noise(key, LAYER, POPULATION), weights)
    text = compile_for_h100(sums, KEY, weights, options=CUBLAS).as_text()
    (operands,) = re.findall(r"custom-call\(%([^,]+), %([^)]+)\), custom_call_target=\"__cublas", text)
    assert all(f"%{name} = bf16[" in text for name in operands), operands
    assert re.search(r"reduce-precision\(.*exponent_bits=8, mantissa_bits=7", text)


def test_a_step_writes_no_signs_of_vectors():
    """Of all members, to sum them up: three layers' biases would be three times as large as an activation."""
    _, whole = step(WIDTH, N // 2, "bfloat16", "LowRank", samples=1, pairs=False)
    found = kernels(compile_for_h100(*whole))
    assert max(kernel.largest for kernel in found) == N // 2 * WIDTH, found


@pytest.mark.parametrize("family", [LowRank(fused=True), Node(fused=True)], ids=str)
@pytest.mark.parametrize(
    "outputs, inputs, activation",  # each size of the kernel's tiles
    [(64, 64, nn.relu), (384, 128, lambda x: nn.silu(nn.elu(x))), (256, 1024, lambda x: nn.softplus(nn.gelu(x)))],
)
def test_the_kernel_is_built(family, inputs, outputs, activation):
    """Of a whole population's pairs and samples, for a model that knows nothing of it."""
    population = dataclasses.replace(POPULATION, antithetic=True, noise=family)
    params = {"bias": struct((outputs,), jnp.bfloat16), "kernel": struct((inputs, outputs), jnp.bfloat16)}

    def run(params, key, x):
        fn = lambda p, x: activation(x @ p["kernel"] + p["bias"])
        return nesjax.population_apply(fn, params, nesjax.sample_noise(key, params, population), x, in_axes=0)

    compiled = compile_for_h100(run, params, KEY, struct((N, 2, inputs), jnp.bfloat16))
    text = compiled.as_text()
    (call,) = re.findall(rf"bf16\[(\S+)\]\S* custom-call\(.*{OWN}", text)
    assert call == f"{2 * N},{outputs}"
    assert " dot(" not in text
    assert [
        kernel.kind for kernel in kernels(compiled) if "bf16" in kernel.shape and kernel.largest >= N * outputs
    ] == ["gemm"]


def test_train_step():
    """Three layers: a product each forward, a product each for the gradient; a kernel or two beside each.

    Five of the kernels, under 2 % of the modelled time, skip a generation that overflowed and say what was applied.
    """
    optimizer = optax.sgd(0.1)
    step = nesjax.make_train_step(loss_fn, optimizer, POPULATION, in_axes=0)

    def create(params, key):
        return nesjax.TrainState.create(params=params, optimizer=optimizer, key=key)

    state = jax.eval_shape(create, [LAYER] * 3, KEY)
    check(compile_for_h100(step, state, X, X), 6, 67, 123, 505)


def test_four_gpus():
    """The devices exchange N losses, and the gradient once: nothing else."""
    mesh = h100_mesh(4)
    replicated, split = PartitionSpec(), PartitionSpec("d")
    es_grad = nesjax.value_and_grad(loss_fn, POPULATION, in_axes=0, axis_name="d")
    spread = jax.shard_map(
        es_grad, mesh=mesh, in_specs=(replicated, replicated, split, split), out_specs=replicated, check_vma=False
    )
    x = struct(X.shape, X.dtype, sharding=NamedSharding(mesh, split))
    compiled = compile_for_h100(spread, [LAYER] * 3, KEY, x, x, mesh=mesh)
    check(compiled, 6, 65, 61, 180)
    exchanged = [kernel for kernel in kernels(compiled) if kernel.kind == "collective"]
    gathered = [kernel.largest for kernel in exchanged if kernel.name.startswith("all-gather")]
    reduced = [kernel.largest for kernel in exchanged if kernel.name.startswith("all-reduce")]
    assert gathered == [N]
    assert sum(reduced) == 3 * (WIDTH**2 + WIDTH)
    assert len(gathered) + len(reduced) == len(exchanged)
