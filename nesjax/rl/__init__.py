"""Reinforcement learning: the return of a policy in an environment as a loss, for whole populations in one jit.

A JAX environment is played by `rollout`, under `lax.scan`; a Gymnasium vector environment, which JAX never sees, by
`vector_rollout`. Observations can be normalised by statistics that all members share (ARS, Mania et al., 2018,
arXiv:1803.07055, algorithm 2, V2). Letters: `N` members, `A` actions or their numbers.
"""

from .actions import MultiBinary, MultiDiscrete
from .environments import Environment, from_brax, from_gymnax, from_pgx, from_playground
from .obs_stats import ObsStats
from .rollout import Episodes, rollout
from .step import make_rl_step
from .vector import vector_rollout

__all__ = [
    "Environment", "Episodes", "MultiBinary", "MultiDiscrete", "ObsStats", "from_brax", "from_gymnax", "from_pgx",
    "from_playground", "make_rl_step", "rollout", "vector_rollout",
]  # fmt: skip
