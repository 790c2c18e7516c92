"""Train any JAX network without backpropagation, by Natural Evolution Strategies."""

import importlib as _importlib
import typing as _typing
from importlib.metadata import version as _version

from . import outside, rl
from .credit import CreditWarning
from .describe import describe
from .formed import MaterialiseWarning
from .forward import materialise, perturbed, population_apply
from .gradient import estimate_gradient, from_losses, weighted_sum
from .layers import Conv, Dense, Embed, Scale
from .members import Member, Noise, member, member_keys, sample_noise
from .model import PerturbedModel
from .noise import FAMILIES, Gaussian, LowRank, Node, NoiseFamily, Permuted, SignFlip, Sparse
from .population import Frozen, Population, Stacked
from .shaping import centered_rank, pair_sign, standardize, top_k
from .train import TrainState, make_train_step, raise_if_skipped
from .value_and_grad import value_and_grad

if _typing.TYPE_CHECKING:
    from . import checkpoint  # for editors; otherwise imported when it is used, as nothing else needs orbax

__version__ = _version("nesjax")

__all__ = [
    "FAMILIES",
    "Conv",
    "CreditWarning",
    "Dense",
    "Embed",
    "Frozen",
    "Gaussian",
    "LowRank",
    "MaterialiseWarning",
    "Member",
    "Node",
    "Noise",
    "NoiseFamily",
    "Permuted",
    "PerturbedModel",
    "Population",
    "Scale",
    "SignFlip",
    "Sparse",
    "Stacked",
    "TrainState",
    "centered_rank",
    "checkpoint",
    "describe",
    "estimate_gradient",
    "from_losses",
    "make_train_step",
    "materialise",
    "member",
    "member_keys",
    "outside",
    "pair_sign",
    "perturbed",
    "population_apply",
    "raise_if_skipped",
    "rl",
    "sample_noise",
    "standardize",
    "top_k",
    "value_and_grad",
    "weighted_sum",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if not _typing.TYPE_CHECKING:  # it would hide misspelt names from editors

    def __getattr__(name: str):
        if name != "checkpoint":
            raise AttributeError(f"module 'nesjax' has no attribute {name!r}")
        return _importlib.import_module(".checkpoint", __name__)
