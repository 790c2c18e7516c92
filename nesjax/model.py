"""A population as a Flax module with an explicit key and a population axis, as NESgpu's PerturbedModel has them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .forward import mapped_axes, population_apply
from .gradient import estimate_gradient
from .members import Noise, sample_noise
from .population import Population
from .shaping import Baseline, Shaping


class PerturbedModel(nn.Module):
    """A Linen module that a key turns into a population: NESgpu's PerturbedModel. Its variables are the module's own.

    Only the collection "params" is perturbed. Others ("batch_stats") are shared by all members and do not change.

    Attributes:
      model: any Linen module; the noise families that its layers name are found when `init` or `apply` sees inputs.
      population: size, std and noise.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, nesjax
      >>> model = nesjax.PerturbedModel(nn.Dense(3), nesjax.Population(size=64, std=0.1))
      >>> x = jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> model.apply(variables, x).shape  # the plain network
      (2, 3)
      >>> out = model.apply(variables, x, key=jax.random.key(1))  # a generation
      >>> out.shape
      (64, 2, 3)
      >>> losses = (out**2).mean((1, 2))
      >>> grads = model.estimate_gradient(variables, jax.random.key(1), losses)  # of the same key: the same noise
      >>> grads["params"]["kernel"].shape
      (4, 3)
    """

    model: nn.Module
    population: Population

    _informed = None  # the population with the layers' families, once inputs were seen

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes the module's variables, as its own `init` does.

        Args:
          rngs: a key, or a dict of keys.
          *args, **kwargs: the module's inputs.

        Returns:
          The variables, by collection.
        """
        self._inform(args, kwargs)
        return self.model.init(rngs, *args, **kwargs)

    def apply(
        self, variables: Any, *args: Any, key: jax.Array | None = None, in_axes: Any = None, step: Any = None,
        strict: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Applies the plain module, or the population if a key is given.

        Args:
          variables: those that `init` made.
          *args: the module's inputs.
          key: the key of the generation's noise; None for the plain module.
          in_axes: as in `jax.vmap`, over `args`: None for inputs that all members share, 0 for one slice per member (or
            per group).
          step: the step at which schedules in `population.std` are evaluated.
          strict: see `perturbed`.
          **kwargs: further arguments of the module's `apply`.

        Returns:
          The module's output; with a key, its leaves have a leading axis N.

        Raises:
          ValueError: `mutable` is given with a key; members would write different values.
        """
        if key is None:
            return self.model.apply(variables, *args, **kwargs)
        if kwargs.get("mutable", False) is not False:
            raise ValueError(f"mutable must be False with a key, got {kwargs['mutable']!r}: update it without one.")
        axes = iter(mapped_axes(args, in_axes, self.population.size // self.population.group_size))

        def of_member(x):
            axis, shape = next(axes), jnp.shape(x)
            return x if axis is None else jax.ShapeDtypeStruct((*shape[:axis], *shape[axis + 1 :]), jnp.result_type(x))

        flags = {
            name: value for name, value in kwargs.items() if name not in ("rngs", "mutable", "capture_intermediates")
        }
        self._inform(jax.tree.map(of_member, args), flags)
        params, others = _split(variables)

        def network(params, *args):
            return self.model.apply({**others, **params}, *args, **kwargs)

        noise = self._noise(params, key, step)
        return population_apply(network, params, noise, *args, in_axes=in_axes, strict=strict)

    def estimate_gradient(
        self, variables: Any, noise_key: jax.Array, losses: jax.Array, *, shaping: Shaping | None = None,
        baseline: Baseline = "mean", step: Any = None,
    ) -> Any:  # fmt: skip
        """Estimates a generation's gradient, ready for descent.

        Args:
          variables: what `apply` was called with.
          noise_key: the `key` that `apply` was called with.
          losses: the population's losses, `[N]`.
          shaping, baseline: as in `nesjax.estimate_gradient`.
          step: the `step` that `apply` was called with.

        Returns:
          `{"params": ...}`, like the collection "params" of `variables`.

        Raises:
          ValueError: this object has seen no inputs, so it doesn't know the layers' families.
        """
        noise = self._noise(_split(variables)[0], noise_key, step)
        return estimate_gradient(noise, losses, shaping=shaping, baseline=baseline)

    def _inform(self, args: Any, kwargs: Any) -> None:
        if self._informed is None:
            known = self.population
            known = known if known.layers else known.for_model(self.model, *args, **kwargs)
            object.__setattr__(self, "_informed", known)  # the dataclass is frozen

    def _noise(self, params: Any, key: jax.Array, step: Any) -> Noise:
        population = self._informed or self.population
        if self._informed is None and not population.layers:
            raise ValueError("population must know the model's layers: call init or apply first, or use for_model.")
        return sample_noise(key, params, population, step=step)


def _split(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits variables into the collection "params" and all others."""
    if "params" not in variables:
        raise ValueError(f'variables must have the collection "params", got {sorted(variables)}.')
    return {"params": variables["params"]}, {name: value for name, value in variables.items() if name != "params"}
