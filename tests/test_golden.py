"""Parity with NESgpu: noise, outputs and gradients of its layers, on numbers that the original's own layers computed.

Every file of `golden/` is one layer of the original: its options (`meta`), a batch, the noise it drew. That noise takes
the place of what this library would draw; all else is the library's own code. `D` directions, `R` repeats of each: row
`r * D + d` of the batch went through the weights `W + s_r E_d` and the bias `b + s_r e_d`, where `s_r` is a sign. Here
a direction is a member, or an antithetic pair if some signs are negative, and its repeats are that member's own batch.
The original's `E_d: [out, in, *window]`, made of its noise `N` (whose std is `noise_scale`, times a rescaling):

    Perturbed, PerturbedAffine  N[d]                                               here Gaussian
    SparsePerturbed             columns N[d, :, k] added to columns sel_d[k]       Sparse
    Permuted, inputs            columns N[:, k] added to columns pi_d[k]           Permuted, its random sign 1
    Permuted, outputs           row j is row rho_d[j] of N (or of the line above), 0 if that is not among the kept
    Synthetic                   N times signs of its rows, its columns or both     SignFlip, its window not flipped

With weights `w` of the batch's rows the gradient is `sum_rd s_r w[r, d] E_d`, and `l1 sign(W) + l2 W`, which is an
optimizer's business here. `expected_*` are float64 and mathematically right, also where the original was not.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nesjax

FILES = sorted(pathlib.Path(__file__).with_name("golden").glob("*.npz"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded(nesjax.Noise):
    """Noise whose directions are not drawn: `own` holds the parts of each, with a leading axis D."""

    own: tuple[Any, ...]

    def direction(self, j):
        return jax.tree.map(lambda part: part[j], self.own)


class Case:
    """One file, its arrays laid out as this library has them."""

    def __init__(self, path: pathlib.Path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.kind = self.meta["cls"].removesuffix("Linear").removesuffix("Conv2d")
        self.directions, self.std = self.meta["directions"], self.meta["noise_scale"]
        self.signs = len(np.unique(self.arrays["repeat_signs"]))  # members a direction
        self.params = self.tree("weight", "bias")

    def kernel(self, name: str, lead: int = 0) -> np.ndarray:
        """A weight's array, behind `lead` other axes: `[out, in, *window]` as `[*window, in, out]`."""
        array = self.arrays[name]
        if self.kind == "PerturbedAffine":
            return array.reshape(*array.shape[:lead], -1)
        return np.moveaxis(array, (lead, lead + 1), (-1, -2))

    def tree(self, weight: str, bias: str, lead: int = 0) -> dict[str, np.ndarray]:
        """Two arrays as a tree like the layer's parameters; without the second if the layer has no bias."""
        tree = {"scale" if self.kind == "PerturbedAffine" else "kernel": self.kernel(weight, lead)}
        if bias in self.arrays:
            tree["bias"] = self.arrays[bias].reshape(*self.arrays[bias].shape[:lead], -1)
        return tree

    def by_member(self, rows: np.ndarray) -> np.ndarray:
        """Batch rows `[R * D, C, *space]` as `[members, repeats, *space, C]`; positive repeats come first."""
        rows = np.moveaxis(rows, 1, -1)
        rows = rows.reshape(self.signs, -1, self.directions, *rows.shape[1:])
        return np.moveaxis(rows, 2, 0).reshape(self.signs * self.directions, -1, *rows.shape[3:])

    def layer(self, params: Any, x: jax.Array) -> jax.Array:
        """The plain layer, of one member's batch."""
        features, conv = self.meta["out_degree"], self.meta.get("conv")
        if self.kind == "PerturbedAffine":
            return nesjax.Scale().apply({"params": params}, x)
        if conv is None:
            return nesjax.Dense(features, "bias" in params).apply({"params": params}, x)
        pads = [(size, size) for size in conv["padding"]]
        mode = {"zeros": None, "reflect": "reflect", "replicate": "edge"}[conv["padding_mode"]]
        if mode:
            x, pads = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode), "VALID"
        module = nesjax.Conv(
            features, conv["kernel_size"], conv["stride"], pads, kernel_dilation=conv["dilation"],
            feature_group_count=conv["groups"], use_bias="bias" in params,
        )  # fmt: skip
        return module.apply({"params": params}, x)

    def family(self) -> nesjax.NoiseFamily:
        """The weight's family, from the original's options, of which 0 means none."""
        options = self.meta["kwargs"]
        if self.kind == "Permuted":
            return nesjax.Permuted(
                options.get("permutation", "auto"), options.get("in_sparsity") or None,
                options.get("out_sparsity") or None, options.get("options", {}).get("allow_repeats", False),
            )  # fmt: skip
        if self.kind == "Synthetic":
            return nesjax.SignFlip(options.get("flip", "auto"), "normal")
        if self.kind == "SparsePerturbed":  # the original's "auto" has no name here
            return nesjax.Sparse(self.arrays["selections"].shape[1])
        return nesjax.Gaussian()

    def parts(self) -> tuple[Any, Any]:
        """The weight's recorded noise as its family's two parts: what members share, and what each has of its own."""
        if self.kind == "Permuted":
            sides = {side: self.arrays.get(f"{side}put_permutations") for side in ("in", "out")}
            return self.kernel("weight_noise") / self.std, {**sides, "sign": np.ones(self.directions)}
        if self.kind == "Synthetic":
            sides = [self.arrays.get(f"{side}put_flips") for side in ("in", "out")]
            both = all(side is not None for side in sides)
            window = [np.ones((self.directions, size)) if both else None for size in self.kernel("weight").shape[:-2]]
            return self.kernel("weight_noise") / self.std, tuple(map(packed, window + sides))
        noise = self.kernel("weight_noise", 1) / self.std
        return (), {"rows": self.arrays["selections"], "values": noise} if self.kind == "SparsePerturbed" else noise

    def noise(self) -> Recorded:
        """The recorded noise, which must have the very structure and shapes of what the library would draw."""
        population = nesjax.Population(
            size=self.directions * self.signs, std=self.std, antithetic=self.signs == 2,
            noise={name: nesjax.Gaussian() if name == "bias" else self.family() for name in self.params},
        )  # fmt: skip

        def draw(key):
            noise = nesjax.sample_noise(key, self.params, population)
            return noise, jax.vmap(noise.direction)(jnp.arange(self.directions))

        noise, own = jax.eval_shape(draw, jax.random.key(0))
        shared, mine = ((part,) for part in self.parts())
        if "bias" in self.params:  # the first leaf: names are sorted
            shared, mine = ((), *shared), (self.tree("E", "bias_noise", 1)["bias"] / self.std, *mine)
        drawn, recorded = (noise.shared, own), (shared, mine)
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, recorded)
        shared, own = jax.tree.map(lambda like, part: jnp.asarray(part, like.dtype), drawn, recorded)
        std = tuple(jnp.full(leaf.shape, self.std) for leaf in noise.std)
        return Recorded(jax.random.key(0), shared, std, population, noise.leaves, noise.treedef, own)


def packed(signs: np.ndarray | None) -> np.ndarray | None:
    """Signs `[D, n]` as words `[D, ceil(n / 32)]`, lowest bit first, a bit set where the sign is -1."""
    if signs is None:
        return None
    bits = np.pad(signs < 0, [(0, 0), (0, -signs.shape[1] % 32)])
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")


def test_all_cases_are_here():
    assert len(FILES) == 105


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_is_the_originals(path):
    case = Case(path)
    weights = case.by_member(case.arrays["c_member"].reshape(-1, 1)).sum((1, 2))

    @jax.jit
    def results(params, noise, x, weights):
        zeros = jax.tree.map(jnp.zeros_like, params)
        members = case.signs * jnp.arange(case.directions)  # of each direction the one whose sign is 1
        return {
            "E": jax.vmap(lambda i: nesjax.materialise(zeros, noise, i))(members),
            "output": nesjax.population_apply(case.layer, params, noise, x, in_axes=0, strict=True),
            "gradient": nesjax.weighted_sum(noise, weights),
        }

    weight = case.kernel("weight")
    gradient = case.tree("expected_weight_grad", "expected_bias_grad")
    name = max(gradient)
    gradient[name] = gradient[name] - case.meta["l1"] * np.sign(weight) - case.meta["l2"] * weight
    expected = {
        "E": case.tree("E", "bias_noise", 1),
        "output": case.by_member(case.arrays["expected_output"]),
        "gradient": gradient,
    }
    actual = results(case.params, case.noise(), case.by_member(case.arrays["x"]), weights)
    for (name, value), right in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(name))
