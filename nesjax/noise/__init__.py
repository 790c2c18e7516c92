"""Noise families, one file each. `FAMILIES` is the only list of them: tests, benchmarks and examples read it."""

from .base import ConvGeometry, NoiseFamily
from .gaussian import Gaussian
from .low_rank import LowRank
from .permuted import Permuted
from .sign_flip import SignFlip
from .sparse import Sparse

FAMILIES = (LowRank, SignFlip, Permuted, Sparse, Gaussian)

__all__ = ["FAMILIES", "ConvGeometry", "NoiseFamily", *(family.__name__ for family in FAMILIES)]
