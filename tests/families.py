"""The noise families that the tests run over, each with its variants: the only such list of the tests.

A family added to `nesjax.FAMILIES` is tested with its defaults from then on; variants worth a test are added here.
"""

import dataclasses

import jax
import pytest

import nesjax
from nesjax import LowRank, Permuted, SignFlip, Sparse


@dataclasses.dataclass(frozen=True)
class Uniform(nesjax.NoiseFamily):
    """A family that defines no more than it must: what the base makes of that obeys the laws too."""

    def sample_shared(self, key, shape, dtype):
        return ()

    def sample_member(self, key, index, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)

    def materialise(self, shared, member, shape):
        return member


@dataclasses.dataclass(frozen=True)
class Unable(Uniform):
    """A family whose fast methods all say that they cannot: callers then materialise."""

    def contract(self, shared, member, shape, x, axes, *, precision=None):
        return NotImplemented

    def conv(self, shared, member, shape, x, geometry):
        return NotImplemented

    def take(self, shared, member, shape, indices):
        return NotImplemented

    def weighted_sum(self, shared, members, shape, weights):
        return NotImplemented


FAMILIES = tuple(family() for family in (*nesjax.FAMILIES, Uniform))
OFTEN = (
    *FAMILIES, LowRank(2, "normal"), SignFlip("in"), Permuted(in_sparsity=0.5, with_replacement=True),
)  # fmt: skip
SELDOM = (  # which differ from those in little, and are slow tests where each takes long
    LowRank(3), SignFlip("out", "normal"), Permuted("in"), Permuted("out"), Permuted("both"),
    Permuted("both", 2, 0.7), Permuted("in", out_sparsity=3), Sparse(3),
)  # fmt: skip
VARIANTS = OFTEN + SELDOM

each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
each_variant = pytest.mark.parametrize(
    "family", [*OFTEN, *(pytest.param(family, marks=pytest.mark.slow) for family in SELDOM)], ids=str
)
