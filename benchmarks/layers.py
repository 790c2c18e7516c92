"""One layer of a population against the plain layer on the same samples: NESgpu's tables.

For each noise family: the forward pass with its noise drawn beforehand (as NESgpu's tables have it) and drawn in it,
and the gradient. `N` members, one sample per member.
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nesjax
from nesjax.gradient import sum_drawn

from .families import FAMILIES, names
from .measure import compiled, interleave, summary
from .tables import figure, pivot

ONE_BY_ONE = "one by one"
STD, INPUTS, LARGEST = 0.02, 2, 6e9  # LARGEST: bytes of noise drawn beforehand
CHECKED = (0, 1, 2, -1)  # members compared with their materialised parameters
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}  # of the noise's own share of the output


def dense(width: int, members: int = 1024, dtype: str = "float32") -> dict:
    return {"layer": "dense", "shape": [width, width], "members": members, "dtype": dtype}


def cases(quick: bool) -> list[dict]:
    def conv(n_in, n_out, window, size, members=1024):
        return {"layer": "conv", "shape": [n_in, n_out, window, size], "members": members, "dtype": "float32"}

    if quick:
        chosen = [(shape, (ONE_BY_ONE, *names("sizes")[:2])) for shape in (dense(32, 64), conv(4, 8, 3, 6, 64))]
    else:
        convs = (16, 16, 3, 64), (32, 32, 3, 64), (64, 64, 3, 32), (32, 32, 1, 32), (1024, 1024, 1, 1)
        chosen = [(dense(width), (ONE_BY_ONE, *names("layers"))) for width in (256, 512, 1024)]
        chosen += [(conv(*sizes), (ONE_BY_ONE, *names("convolutions"))) for sizes in convs]
    return [{**shape, "family": family} for shape, families in chosen for family in families]


def measure(layer: str, shape: list[int], members: int, dtype: str, family: str) -> Iterator[dict]:
    """One row: the family's programs, or members run one by one, against the plain layer in turns."""
    if layer == "dense":
        model, sample = nn.Dense(shape[1], dtype=dtype, param_dtype=dtype), (1, shape[0])
    else:
        n_in, n_out, window, size = shape
        model, sample = nn.Conv(n_out, (window, window), dtype=dtype, param_dtype=dtype), (1, size, size, n_in)
    key = jax.random.key(0)
    params = model.init(key, jnp.zeros(sample, dtype))
    draw = lambda at: np.random.default_rng(at).standard_normal((members, *sample), np.float32)
    inputs = [(jnp.asarray(draw(at), dtype),) for at in range(INPUTS)]
    plain, temp = compiled(lambda x, params: model.apply(params, x.reshape(members, *sample[1:])), *inputs[0], params)
    functions, bytes_of = {"plain": lambda x: plain(x, params)}, {"plain": temp}
    if family == ONE_BY_ONE:
        functions["forward"] = one_by_one(model, params, members)
    else:
        population = nesjax.Population(members, STD, noise=FAMILIES[family])
        programs = family_programs(model, params, population, *inputs[0])
        if isinstance(programs, str):
            yield {"skipped": programs}
            return
        check(family, programs, model, params, population, *inputs[0])
        for part, (program, temp, arguments) in programs.items():
            functions[part] = lambda x, program=program, arguments=arguments: program(x, *arguments)
            bytes_of[part] = temp
    times = interleave(functions, inputs, rounds=11, seconds=6)
    row = {part: summary(times[part], times["plain"]) for part in functions if part != "plain"}
    yield {"plain": summary(times["plain"]), **row, "temp_bytes": bytes_of}


def family_programs(model, params, population, x) -> dict | str:
    """Of each part: the compiled program of `x` and further arguments, its temporary bytes, those arguments."""
    key = jax.random.key(1)
    everyone = lambda noise: jax.vmap(noise.direction)(jnp.arange(population.size))
    sample = lambda key: (lambda noise: (noise, everyone(noise)))(nesjax.sample_noise(key, params, population))
    try:
        noise, own = jax.eval_shape(sample, key)
    except ValueError as error:
        return str(error)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own))
    if needed > LARGEST:
        return f"its noise, drawn beforehand, takes {needed / 1e9:.0f} GB"
    noise, own = jax.jit(sample)(key)

    def forward(x, params, noise, own):
        member = nesjax.member(noise, 0)  # any of them, with another's own part in place of its own
        run = lambda own, x: nesjax.perturbed(model.apply)(params, dataclasses.replace(member, own=own), x)
        return jax.vmap(run)(own, x)

    def drawn(x, params, key):
        noise = nesjax.sample_noise(key, params, population)
        return nesjax.population_apply(model.apply, params, noise, x, in_axes=0)

    def gradient(x, noise, own, weights):
        return sum_drawn(noise, own, weights, [1.0] * len(noise.leaves))

    weights = jnp.zeros(population.size).at[jnp.array(CHECKED)].set(jnp.array([1.0, -2.0, 0.5, 1.5]))
    arguments = {"forward": (params, noise, own), "drawn": (params, key), "gradient": (noise, own, weights)}
    functions = {"forward": forward, "drawn": drawn, "gradient": gradient}
    return {part: (*compiled(functions[part], x, *arguments[part]), arguments[part]) for part in functions}


def check(name: str, *args) -> None:
    """Raises unless a family's programs agree with a few materialised members; `args` are those of `errors`."""
    for part, wrong in errors(*args).items():
        if not wrong < TOLERANCE[str(args[-1].dtype)]:
            raise ValueError(f"{name}: {part} is {float(wrong):.3g} away from its materialised members.")


def errors(programs: dict, model, params, population, x) -> dict[str, jax.Array]:
    """What each part is away from a few members materialised in float32, over the noise's share of the output."""
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    noise, own, weights = programs["gradient"][2]
    plain = model.clone(dtype="float32", param_dtype="float32").apply
    at = jnp.array(CHECKED) % population.size

    def exact(params, own, x):
        """The members' outputs, the plain layer's, and the weighted sum of the members' noise."""
        form = lambda leaf, shared, own: jax.vmap(lambda own: leaf.family.materialise(shared, own, leaf.noise_shape))(
            own
        )
        formed = list(map(form, noise.leaves, noise.shared, own))
        e = noise.treedef.unflatten(wide(formed))
        moved = jax.tree.map(lambda param, e: param + STD * e, params, e)
        total = [jnp.tensordot(weights[at], leaf, 1) for leaf in jax.tree.leaves(e)]
        return jax.vmap(plain)(moved, x), jax.vmap(plain, (None, 0))(params, x), total

    with jax.default_matmul_precision("highest"):
        few = jax.tree.map(lambda leaf: leaf[at], own)
        right, without, total = jax.jit(exact)(wide(params), few, wide(x[at]))
    got = {part: program(x, *arguments) for part, (program, _, arguments) in programs.items()}
    size = lambda tree: jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree)))
    wrong = {part: size(got[part][at] - right) / size(right - without) for part in ("forward", "drawn")}
    return wrong | {"gradient": size(jax.tree.map(jnp.subtract, got["gradient"], total)) / size(total)}


def one_by_one(model, params, members: int):
    """Members whose parameters are formed already, each a call of the plain layer: what needs no library."""
    formed = [jax.tree.map(lambda leaf, at=at: leaf + STD * at, params) for at in range(16)]
    layer = jax.jit(model.apply)
    split = jax.jit(lambda x: [x[at] for at in range(len(formed))])

    def run(x):
        parts = split(x)
        for at in range(members):
            out = layer(formed[at % len(formed)], parts[at % len(formed)])
        return out

    return run


def table(results: dict) -> str:
    """Multiples of the plain layer, by family and shape: the forward pass, with its noise drawn, the gradient."""

    def column(row):
        size = " x ".join(map(str, row["shape"])) if row["layer"] == "conv" else f"{row['shape'][0]}"
        other = [f"N {row['members']}"] * (row["members"] != 1024) + [row["dtype"]] * (row["dtype"] != "float32")
        return ", ".join([size, *other])

    def value(row):
        parts = [row[part]["multiple"][0] for part in ("forward", "drawn", "gradient") if part in row]
        return " / ".join(map(figure, parts)) or "-"

    kinds = ([row for row in results["rows"] if row["layer"] == kind] for kind in ("dense", "conv"))
    return "\n\n".join(pivot(rows, "family", column, value) for rows in kinds if rows)
