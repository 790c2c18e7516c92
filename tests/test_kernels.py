"""The kernel for products with sign noise, interpreted on a CPU, and where it is reached: the same as by XLA."""

import types

import flax.linen as nn
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import KEY, normal
from jax.sharding import AxisType, PartitionSpec

import nesjax
from nesjax import LowRank
from nesjax.kernels import signed_product

STD = 0.5
W, X = (4, 64, 64), (5, 128, 64)  # seeds and shapes
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this jax interprets no kernel"
)


def bf16(seed, *shape):
    return normal(seed, *shape).astype(jnp.bfloat16)


@pytest.fixture
def interpreted(monkeypatch):
    """Lowers for this CPU what is for a GPU, and lists the kernel's shapes (rows, inputs, outputs) and what follows."""
    shapes, kernel = [], signed_product.kernel

    def noted(y, x, shared, own, then):
        follows = {"bias": shared[1:], "then": then}
        shapes.append((*x.shape, shared[0].shape[1], *(name for name, what in follows.items() if what)))
        return kernel(y, x, shared, own, then)

    monkeypatch.setattr(signed_product, "kernel", noted)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield shapes


def outputs(fn, params, fused, x, in_axes=0, rule=lambda family: family, **options):
    """Of a population, and the program's text."""
    population = nesjax.Population(**{"size": 128, "std": STD, **options, "noise": rule(LowRank(fused=fused))})

    def run(params, x):
        noise = nesjax.sample_noise(KEY, params, population)
        return nesjax.population_apply(fn, params, noise, x, in_axes=in_axes, strict=True)

    return jax.jit(run)(params, x), str(jax.make_jaxpr(run)(params, x))


def check_layer(fn, params, x, **options):
    """No farther from what float32 gives than what XLA makes of bfloat16, which rounds more often."""
    by_xla, found = (outputs(fn, params, fused, x, **options)[0].astype(jnp.float32) for fused in (False, True))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), (params, x))
    with jax.default_matmul_precision("highest"):
        exact = outputs(fn, wide[0], False, wide[1], **options)[0]
    error = lambda y: float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    assert error(found) < 0.003 and error(found) < error(by_xla)


def check_alike(one, other):
    """Equal but for a few roundings to bfloat16."""
    one, other = (np.asarray(y, np.float32) for y in (one, other))
    assert (one != other).mean() < 0.01
    np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-6)


@needs_interpreter
@pytest.mark.parametrize("inputs, width, both", [(64, 64, True), (128, 192, True), (64, 128, False)])
def test_the_kernel_is_what_it_says(monkeypatch, inputs, width, both):
    """The product with each row's `w + scale * E`, or signs of the outputs alone; `E` as the family forms it."""
    monkeypatch.setattr(signed_product, "CORES", 2)  # which have one tile or two
    rows, shape = 128, (inputs, width)[not both :]
    members = jax.vmap(lambda key: LowRank().sample_member(key, 0, shape, "float32"))(jax.random.split(KEY, rows))
    e = jax.vmap(lambda member: LowRank().materialise((), member, shape))(members)
    x, w, scale = bf16(0, rows, inputs), bf16(1, inputs, width), 0.1 * normal(2, rows)
    y = jax.ShapeDtypeStruct((rows, width), x.dtype)
    with jax.default_matmul_precision("highest"):
        noise = jnp.einsum("mi,mio->mo", x.astype(jnp.float32), e) if both else e
        expected = x.astype(jnp.float32) @ w.astype(jnp.float32) + scale[:, None] * noise
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        t, s = (*(member[:, 0].T for member in reversed(members)), None)[:2]
        found = signed_product.kernel(y, x, (w,), (scale, t, s))
    check_alike(found, expected.astype(x.dtype))


@needs_interpreter
def test_members_are_rows(interpreted):
    """Pairs and samples, in chunks: of an ordinary model whose first layer fits, and whose second doesn't."""
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    x = bf16(3, 128, 2, 64)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.init(KEY, x[0]))
    options = {"antithetic": True, "chunk_size": 64}
    assert "custom_vmap" not in outputs(model.apply, params, False, x, **options)[1]
    assert interpreted == []
    check_layer(model.apply, params, x, **options)
    assert set(interpreted) == {(128, 64, 64, "bias", "then")}


@needs_interpreter
def test_layers_in_a_scan(interpreted):
    """Each step has its own noise, of the bias too; without one, the activation alone follows, of many operations."""

    def fn(layers, x):
        layer = lambda y, p: (nn.elu(nn.gelu(y @ p["w"] + p["b"]) @ p["w"]), None)
        return jax.lax.scan(layer, x, layers)[0]

    layers = {"w": bf16(4, 2, 64, 64) / 16, "b": bf16(6, 2, 64)}
    check_layer(fn, layers, bf16(5, 128, 64), std=0.02, rule=lambda family: {"": nesjax.Stacked(family)})
    assert set(interpreted) == {(128, 64, 64, "bias", "then"), (128, 64, 64, "then")}


@needs_interpreter
def test_noise_on_outputs(interpreted):
    """The same signs perturb the outputs and are credited, in each step of a loop."""

    def gradient(fused):
        def loss_fn(p, x):
            layer = lambda y, _: (jnp.tanh(y @ p["w"] + p["b"]), None)
            return jax.lax.scan(layer, x, None, length=2)[0].astype(jnp.float32).sum()

        population = nesjax.Population(size=64, std=STD, noise=nesjax.Node(fused=fused))
        params = {"w": bf16(*W) / 8, "b": bf16(6, 64)}
        return jax.jit(nesjax.value_and_grad(loss_fn, population, in_axes=0))(params, KEY, bf16(5, 64, 2, 64))

    (loss, grads), (expected, by_xla) = gradient(True), gradient(False)
    assert abs(loss - expected) < 0.02
    for found, grad in zip(jax.tree.leaves(grads), jax.tree.leaves(by_xla)):
        assert jnp.linalg.norm(found - grad) < 0.02 * jnp.linalg.norm(grad)
    assert set(interpreted) == {(128, 64, 64, "bias", "then")}


@needs_interpreter
@pytest.mark.parametrize("check_vma", [False, True])
def test_in_shard_map(interpreted, check_vma):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    spec = PartitionSpec("d")

    def loss_of(fused):
        population = nesjax.Population(size=128, std=STD, noise=LowRank(fused=fused))
        loss_fn = lambda p, x: jnp.sum(nn.relu(x @ p["w"] + p["b"]))
        es_grad = nesjax.value_and_grad(loss_fn, population, in_axes=0, axis_name="d")
        spread = lambda p, key, x: es_grad(p, key, x)[0][None]
        run = jax.shard_map(
            spread, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(), spec), out_specs=spec, check_vma=check_vma
        )
        return jax.jit(run)({"w": bf16(4, 64, 64), "b": bf16(6, 64)}, KEY, bf16(5, 128, 64))

    np.testing.assert_allclose(loss_of(True), loss_of(False), rtol=1e-2)
    assert set(interpreted) == {(128, 64, 64, "bias", "then")}


@pytest.mark.parametrize(
    "fn, w, x, options",
    [
        (lambda w, x: x @ w, bf16(*W), bf16(*X)[0], {"in_axes": None}),  # all members see the same: one product
        (lambda w, x: x @ w, bf16(*W), bf16(5, 32, 64), {"group_size": 4}),
        (lambda w, x: x @ w, normal(*W), normal(*X), {}),
        (lambda w, x: x @ w, bf16(*W), normal(*X), {}),
        (lambda w, x: x @ w, bf16(4, 60, 64), bf16(5, 128, 60), {}),
        (lambda w, x: x @ w, bf16(4, 64, 60), bf16(*X), {}),
        (lambda w, x: x @ w, bf16(*W), bf16(5, 126, 64), {"size": 126}),
        (lambda w, x: w @ x, bf16(*W), bf16(*X), {}),
        (lambda w, x: jnp.einsum("i,ihd->hd", x, w), bf16(4, 64, 2, 32), bf16(*X), {}),
    ],
    ids=["shared", "groups", "float32", "mixed", "odd inputs", "odd outputs", "odd rows", "from the left", "heads"],
)
def test_elsewhere_it_is_by_xla(monkeypatch, fn, w, x, options):
    monkeypatch.setattr(signed_product, "kernel", None)
    by_xla, fused = (outputs(fn, w, fused, x, **options)[0] for fused in (False, True))
    np.testing.assert_array_equal(np.asarray(by_xla, np.float32), np.asarray(fused, np.float32))


@needs_interpreter
def test_a_transposed_weight_has_its_signs_the_other_way_round(interpreted):
    w, x = bf16(4, 128, 64), bf16(5, 128, 64)
    by_xla, fused = (outputs(lambda w, x: x @ w.T, w, fused, x)[0] for fused in (False, True))
    check_alike(fused, by_xla)
    assert set(interpreted) == {(128, 64, 128)}


@needs_interpreter
@pytest.mark.parametrize("capability, available", [("9.0", True), ("8.0", False), ("10.0", False)])
def test_other_gpus_have_xla(monkeypatch, capability, available):
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda kind: [gpu])
    population = nesjax.Population(size=128, std=STD, noise=LowRank(fused=True))
    noise = nesjax.sample_noise(KEY, bf16(*W), population)
    run = lambda x: nesjax.population_apply(lambda w, x: x @ w, bf16(*W), noise, x, in_axes=0)
    assert ("platform_index" in str(jax.make_jaxpr(run)(bf16(*X)))) == available


def test_credit_is_by_xla():
    population = nesjax.Population(size=128, std=STD, noise=LowRank(fused=True))
    es_grad = nesjax.value_and_grad(lambda w, x: jnp.sum(x @ w), population, credit="inputs", in_axes=0)
    assert "custom_vmap" not in str(jax.make_jaxpr(es_grad)(bf16(*W), KEY, bf16(*X)))
