"""Models as people publish them: every member's output is right, and no parameter is formed but those that are named.

Small ones, written here after the public models or taken from the libraries, with what each is known for.
"""

import functools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import KEY, normal, rms_norm, weight
from flax import nnx

import nesjax
from benchmarks import architectures

N = 4


SMALL = {  # of those that are measured too
    architectures.vit: {"width": 16, "layers": 1, "size": 8}, architectures.resnet: {"width": 4, "size": 8},
    architectures.gpt2: {"width": 16, "layers": 2, "length": 5}, architectures.brax_ppo: {"width": 16},
    architectures.lstm: {"width": 12, "length": 4}, architectures.seq2seq: {"width": 12, "length": 3},
}  # fmt: skip


def linen(module, x):
    variables = jax.jit(module.init)(KEY, x)
    return variables, module.apply, x


# ---- transformers


def llama():
    """LLaMA: rotary positions, grouped queries, gated units, gains as 1 + g of Gemma."""
    params = {"q": weight(0, 16, 4, 4), "kv": weight(1, 16, 2, 2, 4), "o": weight(2, 4, 4, 16), "up": weight(4, 16, 32),
              "gate": weight(3, 16, 32), "down": weight(5, 32, 16), "gain": 0.1 * normal(6, 16)}  # fmt: skip

    def rotate(x):
        turn = jnp.arange(x.shape[0])[:, None, None] * jnp.array([1.0, 0.1])
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * jnp.cos(turn) - b * jnp.sin(turn), b * jnp.cos(turn) + a * jnp.sin(turn)], -1)

    def fn(p, x):
        y = rms_norm(x) * (1 + p["gain"])
        q = rotate(jnp.einsum("td,dhk->thk", y, p["q"]))
        k, v = jnp.moveaxis(jnp.einsum("td,dghk->tghk", y, p["kv"]), 1, 0)
        k, v = (jnp.repeat(part, 2, 1) for part in (rotate(k), v))
        read = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k)), v)
        x = x + jnp.einsum("thk,hkd->td", read, p["o"])
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    return params, fn, normal(9, 5, 16)


def t5():
    """T5: a bias looked up by relative position."""
    params = {"q": weight(0, 16, 16), "bias": normal(1, 9, 2)}

    def fn(p, x):
        apart = jnp.arange(5)[None] - jnp.arange(5)[:, None] + 4
        q = (x @ p["q"]).reshape(5, 2, 8)
        return jax.nn.softmax(jnp.einsum("thd,shd->hts", q, q) + p["bias"][apart].transpose(2, 0, 1))

    return params, fn, normal(2, 5, 16)


def lora():
    """LoRA: a frozen matrix and two small ones; and a residual adapter, `x @ (1 + A)`."""
    frozen = weight(9, 16, 16)
    params = {
        "a": weight(0, 16, 2),
        "b": weight(1, 2, 16),
        "adapter": 0.1 * weight(2, 16, 16),
        "delta": 0.1 * weight(3, 16, 16),
    }

    def fn(p, x):
        x = x @ frozen + x @ p["a"] @ p["b"]
        return jnp.tanh(x @ (jnp.eye(16) + p["adapter"])) @ (frozen + p["delta"])

    return params, fn, normal(4, 3, 16)


def experts():
    """MaxText's experts: routed tokens, matrices stacked along an axis of their own."""
    params = {"router": weight(0, 16, 3), "up": weight(1, 3, 16, 32), "down": weight(2, 3, 32, 16)}

    def fn(p, x):
        chosen = jax.nn.softmax(x @ p["router"])
        y = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("etf,efd,te->td", y, p["down"], chosen)

    return params, fn, normal(3, 5, 16)


def t5x():
    """T5X and MaxText: layers stacked along the second axis by `nn.scan`."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16)(nn.relu(nn.Dense(24)(x))), None

    layers = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()
    x = normal(1, 4, 16)
    return layers.init(KEY, x, None), lambda p, x: layers.apply(p, x, None)[0], x


# ---- recurrent and state-space models


def nnx_lstm():
    cell = nnx.OptimizedLSTMCell(8, 12, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(nnx.RNN(cell, rngs=nnx.Rngs(1)), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), normal(0, 2, 4, 8)


def mamba():
    """Mamba: decays `exp(-exp(A_log) dt)`, scanned; the table under `exp` is formed."""
    params = {
        "in": weight(0, 8, 16),
        "A_log": normal(1, 16, 4),
        "bc": weight(2, 16, 8),
        "dt": weight(3, 16, 16),
        "out": weight(4, 16, 8),
    }

    def fn(p, x):
        def step(h, u):
            b, c = jnp.split(u @ p["bc"], 2)
            dt = jax.nn.softplus(u @ p["dt"])[:, None]
            h = jnp.exp(-jnp.exp(p["A_log"]) * dt) * h + dt * u[:, None] * b
            return h, h @ c

        return jax.lax.scan(step, jnp.zeros((16, 4)), x @ p["in"])[1] @ p["out"]

    return params, fn, normal(5, 6, 8)


def s5():
    """S5: complex input and output matrices, kept as pairs of real ones."""
    params = {
        "lam": normal(0, 6),
        "b_re": weight(1, 6, 8),
        "b_im": weight(2, 6, 8),
        "c_re": weight(3, 8, 6),
        "c_im": weight(4, 8, 6),
    }

    def fn(p, x):
        decay = jnp.exp(-jnp.exp(p["lam"]) + 1j)
        u = x.astype(jnp.complex64) @ (p["b_re"] + 1j * p["b_im"]).T
        both = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        _, h = jax.lax.associative_scan(both, (jnp.broadcast_to(decay, u.shape), u))
        return (h @ (p["c_re"] + 1j * p["c_im"]).T).real

    return params, fn, normal(5, 6, 8)


def fourier():
    """A Fourier neural operator: weights between Fourier modes, the real and imaginary parts along a last axis."""
    params = {"modes": 0.3 * normal(0, 4, 8, 8, 2), "local": weight(1, 8, 8)}

    def fn(p, x):
        spectrum = jnp.fft.rfft(x, axis=0)[:4]
        mixed = jnp.einsum("mi,mio->mo", spectrum, p["modes"][..., 0] + 1j * p["modes"][..., 1])
        return jnp.fft.irfft(mixed, n=8, axis=0) + x @ p["local"]

    return params, fn, normal(2, 8, 8)


# ---- convolutions and normalisations


def weight_norm():
    return linen(nn.WeightNorm(nn.Dense(12)), normal(0, 3, 8))


def transposed_convolution():
    return linen(nn.ConvTranspose(5, (3, 3), (2, 2)), normal(0, 1, 4, 4, 3))


def standardised():
    """BiT: a convolution whose kernel is standardised by its own mean and deviation; its variance forms it."""
    params = {"kernel": 0.2 * normal(0, 3, 3, 3, 8)}

    def fn(p, x):
        kernel = (p["kernel"] - p["kernel"].mean((0, 1, 2))) / jnp.sqrt(p["kernel"].var((0, 1, 2)) + 1e-5)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return params, fn, normal(1, 1, 5, 5, 3)


def equinox_unet():
    layers = eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 8, 3, padding=1, key=KEY), eqx.nn.Lambda(jax.nn.relu), eqx.nn.GroupNorm(2, 8),
        eqx.nn.ConvTranspose2d(8, 4, 2, 2, key=KEY),
    ])  # fmt: skip
    arrays, static = eqx.partition(layers, eqx.is_array)
    return arrays, lambda arrays, x: eqx.combine(arrays, static)(x), normal(0, 3, 4, 4)


# ---- graphs, flows, penalties


def graph():
    """A graph network: messages along edges, summed at their receivers."""
    params = {"edge": weight(0, 16, 12), "node": weight(1, 20, 8)}
    senders, receivers = jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2])

    def fn(p, x):
        messages = jax.nn.relu(jnp.concatenate([x[senders], x[receivers]], 1) @ p["edge"])
        return jnp.concatenate([x, jax.ops.segment_sum(messages, receivers, 4)], 1) @ p["node"]

    return params, fn, normal(2, 4, 8)


def flow():
    """A coupling flow, with a learned scale under `exp`; a mask on the matrix, as MADE has it, forms that."""
    params = {"s": weight(0, 4, 4), "t": weight(1, 4, 4), "made": weight(2, 8, 8)}
    mask = jnp.tri(8)

    def fn(p, x):
        a, b = jnp.split(x, 2, -1)
        y = jnp.concatenate([a, b * jnp.exp(jnp.tanh(a @ p["s"])) + a @ p["t"]], -1)
        return y @ (p["made"] * mask)

    return params, fn, normal(3, 5, 8)


def penalised():
    """A loss with an L2 penalty on all matrices."""
    params = {"a": weight(0, 8, 16), "b": weight(1, 16, 3)}

    def fn(p, x):
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2) + 0.1 * penalty

    return params, fn, normal(2, 5, 8)


FORMED = {  # and the parameters that may be formed, each by an elementwise function of it
    **dict.fromkeys(SMALL, ()), llama: (), t5: (), lora: (), experts: (), t5x: (), nnx_lstm: (), mamba: ("A_log",),
    s5: (), fourier: (), weight_norm: (), transposed_convolution: (), standardised: ("kernel",), equinox_unet: (),
    graph: (), flow: ("made",), penalised: (),
}  # fmt: skip


@pytest.mark.parametrize("model", FORMED, ids=lambda model: model.__name__)
def test_every_member_is_right_and_little_is_formed(model):
    params, fn, x = model(2, **SMALL[model]) if model in SMALL else model()
    rules = {"": nesjax.Stacked(first=1)} if model is t5x else nesjax.LowRank()
    noise = nesjax.sample_noise(KEY, params, nesjax.Population(size=N, std=0.1, noise=rules))
    with jax.default_matmul_precision("highest"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nesjax.MaterialiseWarning)
        outputs = jax.jit(lambda noise: nesjax.population_apply(fn, params, noise, x))(noise)
        each = jax.jit(lambda i: fn(nesjax.materialise(params, noise, i), x))
        expected = jax.tree.map(lambda *members: np.stack(members), *map(each, range(N)))
    said = [line.strip() for warning in caught for line in str(warning.message).splitlines()[1:]]
    assert {line.partition(": ")[0] for line in said} == set(FORMED[model]), said
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), outputs, expected)
    assert np.ptp(jax.tree.leaves(outputs)[0], axis=0).max() > 1e-3
