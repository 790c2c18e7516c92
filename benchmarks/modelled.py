"""What a perturbed layer costs on an H100 as XLA compiles it: kernels, memory, and a modelled time. Nothing runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import nesjax

from .h100 import compile_for_h100, kinds, modelled_us, temp_bytes

CASES = (  # every family, and the modes that compile to something else
    nesjax.LowRank(),
    nesjax.LowRank(4),
    nesjax.LowRank(values="normal"),
    nesjax.SignFlip(),
    nesjax.SignFlip("in"),
    nesjax.Permuted("in"),
    nesjax.Permuted("out"),
    nesjax.Permuted("both"),
    nesjax.Permuted(in_sparsity=0.1),
    nesjax.Sparse(),
    nesjax.Gaussian(),
)
LAYERS = ((256, 8192), (512, 8192), (1024, 8192), (4096, 8192), (8192, 1024))  # (width, members)


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def layer(
    family: nesjax.NoiseFamily | None, width: int, members: int, dtype: Any = jnp.bfloat16, drawn: bool = True
) -> tuple:
    """A dense layer with bias and ReLU on one sample a member, followed by the shapes of its arguments.

    Args:
      family: of the kernel and the bias; None for the plain layer.
      drawn: the noise is drawn inside the function, of a key; otherwise the members are an argument.
    """
    struct = jax.ShapeDtypeStruct
    params = {"bias": struct((width,), dtype), "kernel": struct((width, width), dtype)}
    x, key = struct((members, width), dtype), jax.eval_shape(lambda: jax.random.key(0))
    if family is None:
        return jax.vmap(dense, (None, 0)), params, x
    population = nesjax.Population(size=members, std=0.02, noise=family)

    def apply(params, key, x):
        return nesjax.population_apply(dense, params, nesjax.sample_noise(key, params, population), x, in_axes=0)

    if drawn:
        return apply, params, key, x

    def member(key, params, i):
        return nesjax.member(nesjax.sample_noise(key, params, population), i)

    one = jax.eval_shape(member, key, params, 0)
    axes = dataclasses.replace(one, shared=None, own=0, scale=0)
    all_members = jax.eval_shape(jax.vmap(member, (None, None, 0), axes), key, params, jnp.arange(members))
    return jax.vmap(nesjax.perturbed(dense), (None, axes, 0)), params, all_members, x


def run(quick: bool = False) -> dict:
    """Rows of modelled costs: width, members, dtype, family, drawn (the drawing included), kernels, MiB, multiples.

    A multiple is of the plain layer's modelled time. Gaussian noise stops at 1024 wide. `quick`: one width, bfloat16.
    """
    rows = []
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for width, members in [(1024, 8192)] if quick else LAYERS:
            plain = modelled_us(compile_for_h100(*layer(None, width, members, dtype)))
            for family in CASES:
                if isinstance(family, nesjax.Gaussian) and width > 1024:
                    continue
                for drawn in (True, False):
                    compiled = compile_for_h100(*layer(family, width, members, dtype, drawn))
                    rows.append(
                        {
                            "width": width,
                            "members": members,
                            "dtype": dtype,
                            "family": str(family),
                            "drawn": drawn,
                            "kernels": kinds(compiled),
                            "temp_mib": round(temp_bytes(compiled) / 2**20, 1),
                            "modelled_us": round(modelled_us(compiled), 1),
                            "modelled_multiple": round(modelled_us(compiled) / plain, 2),
                        }
                    )
    return {"device": "NVIDIA H100 80GB HBM3 (compiled for, not run: every time is modelled)", "rows": rows}
