"""The noise families that the benchmarks compare, each with its variants: the only such list of the benchmarks.

A family added to `nesjax.FAMILIES` is measured with its defaults by every benchmark from then on; add it here to
choose which benchmarks take it, or to measure variants of it.
"""

import nesjax
from nesjax import LowRank, Permuted, SignFlip, Sparse

BENCHMARKS = ("layers", "convolutions", "sizes", "step", "quality", "networks", "accuracy", "modelled")
# Each variant's name in tables, the family, and the benchmarks that take it: "networks" is `quality` beyond its linear
# problem, "convolutions" are those of `layers`.
CHOSEN: dict[str, tuple[nesjax.NoiseFamily, tuple[str, ...]]] = {
    "LowRank": (LowRank(), BENCHMARKS),
    "LowRank fused": (LowRank(fused=True), ("modelled",)),
    "LowRank rank 4": (LowRank(4), ("layers", "sizes", "quality", "networks", "modelled")),
    "LowRank normal": (LowRank(values="normal"), ("quality", "modelled")),
    "SignFlip": (SignFlip(), BENCHMARKS),
    "SignFlip in": (SignFlip("in"), ("layers", "quality", "networks", "accuracy", "modelled")),
    "SignFlip normal": (SignFlip(values="normal"), ("quality",)),
    "Permuted in": (Permuted("in"), ("layers", "convolutions", "quality", "networks", "accuracy", "modelled")),
    "Permuted in 50 %": (Permuted(in_sparsity=0.5), ("layers", "quality")),
    "Permuted in 10 %": (
        Permuted(in_sparsity=0.1), ("layers", "sizes", "step", "quality", "networks", "accuracy", "modelled")
    ),
    "Permuted out": (Permuted("out"), ("layers", "convolutions", "quality", "modelled")),
    "Permuted out 50 %": (Permuted(out_sparsity=0.5), ("layers", "convolutions", "quality")),
    "Permuted out 10 %": (Permuted(out_sparsity=0.1), ("layers", "convolutions", "quality")),
    "Permuted both": (Permuted("both"), ("layers", "quality", "networks", "accuracy", "modelled")),
    "Permuted both 10 %": (Permuted("both", in_sparsity=0.1, out_sparsity=0.1), ("quality", "networks")),
    "Sparse k=1": (Sparse(1), ("layers", "sizes", "step", "quality", "networks", "accuracy", "modelled")),
    "Sparse k=2": (Sparse(2), ("layers", "quality")),
    "Node": (nesjax.Node(), ("step",)),
    "Gaussian": (nesjax.Gaussian(), ("layers", "convolutions", "quality", "networks", "accuracy", "modelled")),
}  # fmt: skip
NEW = [family for family in nesjax.FAMILIES if family not in {type(variant) for variant, _ in CHOSEN.values()}]
CHOSEN |= {family.__name__: (family(), BENCHMARKS) for family in NEW}
FAMILIES = {name: family for name, (family, _) in CHOSEN.items()}


def names(benchmark: str) -> list[str]:
    """The variants that one of `BENCHMARKS` takes."""
    return [name for name, (_, benchmarks) in CHOSEN.items() if benchmark in benchmarks]
