"""What each primitive does with a perturbed parameter: the only place where operations meet noise.

Products with a `Perturbed` add the noise's own product to the weight's, so the sum is never formed; operations that
only rearrange it give another `Perturbed`, and those that combine it linearly with others an expression of it. Anything
else materialises it for that one operation, and says so.
"""

from . import arithmetic, products, reductions, rows, structure  # noqa: F401  (they register their rules)
from .functions import evaluate, evaluate_and_reap
from .lazy import transposed

__all__ = ["evaluate", "evaluate_and_reap", "transposed"]
