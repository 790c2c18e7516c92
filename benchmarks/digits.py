"""A network and data that several benchmarks share."""

import flax.linen as nn
import jax
import numpy as np


class MLP(nn.Module):
    """Dense layers of these widths with ReLUs between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images `[1797, 64]` between 0 and 1, and labels `[1797]`."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images / 16, labels
