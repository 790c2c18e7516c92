"""What a perturbed layer, and a training step, cost on an H100 as XLA compiles them: kernels, memory, a modelled time.

Nothing runs. The step is that of `step`, in bfloat16, with all members at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nesjax

from . import measure as measuring
from .families import FAMILIES, names
from .h100 import available, compile_for_h100, kinds, modelled_us, temp_bytes
from .step import by_family, training
from .tables import figure, pivot

LAYERS = ((256, 8192), (512, 8192), (1024, 8192), (4096, 8192), (8192, 1024))  # (width, members)


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


def layer(
    family: nesjax.NoiseFamily | None, width: int, members: int, dtype: Any = jnp.bfloat16, drawn: bool = True
) -> tuple:
    """A dense layer with bias and ReLU on one sample per member, followed by the shapes of its arguments.

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


def device() -> dict[str, str]:
    """In place of the machine that compiles: the one that is compiled for."""
    return {**measuring.device(), "platform": "modelled", "device": "NVIDIA H100 80GB HBM3"}


def cases(quick: bool) -> list[dict]:
    if not available():
        raise SystemExit("modelled needs JAX_PLATFORMS=cpu and the wheels that benchmarks/h100.py names.")
    layers = [(1024, 64)] if quick else LAYERS
    chosen = [
        {"width": width, "members": members, "dtype": dtype, "family": family}
        for dtype in ("bfloat16", "float32")[: 1 if quick else 2]
        for width, members in layers
        for family in names("modelled")[: 1 if quick else None]
    ]
    layers = [case for case in chosen if case["family"] != "Gaussian" or case["width"] <= 1024]
    members, width = (64, 128) if quick else (4096, 1024)
    return layers + [
        {"width": width, "members": members, "dtype": "bfloat16", "family": family, "samples": samples, "pairs": pairs}
        for samples in (1, 8, 64)[: 1 if quick else None]
        for family in ("LowRank", "LowRank fused", "Node")[: 1 if quick else None]
        for pairs in (False, True)
    ]


def step(width: int, members: int, dtype: str, family: str, samples: int, pairs: bool) -> tuple[tuple, tuple]:
    """Inference on as many samples, and the training step, each followed by the shapes of its arguments."""
    made = training(members, width, samples, family, None, pairs, dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(made.create, key)
    x = jax.ShapeDtypeStruct((members * samples, width), dtype)
    return (made.infer, state.params, x), (made.step, state, *jax.eval_shape(made.draw, key))


def measure(width: int, members: int, dtype: str, family: str, **of_step) -> Iterator[dict]:
    """Kernels, temporary bytes and the modelled multiple: a layer's, drawing excluded and included, or a step's."""
    if of_step:
        plain, whole = step(width, members, dtype, family, **of_step)
        programs = {"step": whole}
    else:
        plain, parts = layer(None, width, members, dtype), {"forward": False, "drawn": True}
        programs = {part: layer(FAMILIES[family], width, members, dtype, drawn) for part, drawn in parts.items()}
    plain, row = modelled_us(compile_for_h100(*plain)), {}
    for part, program in programs.items():
        compiled = compile_for_h100(*program)
        us = modelled_us(compiled)
        row[part] = {
            "modelled_us": round(us, 1),
            "modelled_multiple": us / plain,
            "kernels": kinds(compiled),
            "temp_bytes": temp_bytes(compiled),
        }
    yield {"plain_us": round(plain, 1), **row}


def table(results: dict) -> str:
    """Modelled multiples of the plain layer, drawing excluded / included; then the step's of inference."""
    column = lambda row: f"{row['width']}, N {row['members']}, {row['dtype']}"
    value = lambda row: " / ".join(figure(row[part]["modelled_multiple"]) for part in ("forward", "drawn"))
    layers, steps = ([row for row in results["rows"] if ("step" in row) == whole] for whole in (False, True))
    tables = [pivot(layers, "family", column, value)] if layers else []
    if steps:
        tables.append(by_family(steps, lambda row: row["step"]["modelled_multiple"]))
    return "\n\n".join(tables)
