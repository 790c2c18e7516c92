"""Noise families, one file each. `FAMILIES` is the only list of those that perturb weights; `Node` perturbs outputs."""

from .base import ConvGeometry, NoiseFamily
from .gaussian import Gaussian
from .low_rank import LowRank
from .node import Node
from .permuted import Permuted
from .sign_flip import SignFlip
from .sparse import Sparse

FAMILIES = (LowRank, SignFlip, Permuted, Sparse, Gaussian)

__all__ = ["FAMILIES", "ConvGeometry", "Gaussian", "LowRank", "Node", "NoiseFamily", "Permuted", "SignFlip", "Sparse"]
