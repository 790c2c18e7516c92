"""One generation: losses and their gradient, of which `value_and_grad` and `make_train_step` are made."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .checks import check_options, instance_of, one_of, positive_int
from .credit import CreditedSum, CreditWarning, Uses, credited_rows, credited_sum, mean_of_partners
from .devices import NO_AXIS, Axis
from .forward import argument_names, mapped_axes, over_members, perturbed, perturbed_and_reaped
from .gradient import as_params, directions, gradient_of
from .members import Noise, for_call, sample_noise, with_sign
from .population import Population
from .shaping import Baseline, Shaping, member_weights


class Estimate(NamedTuple):
    """What one generation gave.

    Attributes:
      losses: `[N]`, or `[N, K]` where K samples are credited one by one, or `[N, T]` or `[N, K, T]` of T tokens.
      aux: of the members of this device.
      grads: a tree like params.
      norm, snr: of the gradient, see `nesjax.gradient.Gradient`.
      noise: the generation's.
    """

    losses: jax.Array
    aux: Any
    grads: Any
    norm: jax.Array
    snr: jax.Array
    noise: Noise


class Calls(NamedTuple):
    """What members' calls of the loss gave, each with leading axes `[n]` or `[n, K]` (losses of tokens `[n, T]` too).

    Attributes:
      losses: as `loss_fn` returns them.
      compared: the losses, minus the unperturbed network's where that is the baseline.
      aux: what else `loss_fn` returns.
      rows: what each credited parameter multiplied, by path.
    """

    losses: jax.Array
    compared: jax.Array
    aux: Any
    rows: dict[str, Uses]


def mean_loss(losses: jax.Array) -> jax.Array:
    """The mean of the finite losses; NaN if there are none."""
    finite = jnp.isfinite(losses)
    return jnp.where(finite, losses, 0).sum() / finite.sum()


@dataclasses.dataclass(frozen=True)
class Estimator:
    """`(params, key, args, step, std) -> Estimate`: what `value_and_grad` and `make_train_step` are made of.

    It runs on each device of `axis`, with that device's slices of the mapped arguments.
    """

    loss_fn: Callable
    population: Population
    shaping: Shaping | None = None
    baseline: Baseline = "mean"
    in_axes: Any = None
    has_aux: bool = False
    strict: bool = False
    credit: str | None = None
    samples: int | None = None
    discount: float = 1.0
    axis: Axis = NO_AXIS

    def __post_init__(self):
        check_options(self.shaping, self.baseline)
        instance_of(Population, "population", self.population)
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be a function of (params, *args), got {self.loss_fn!r}.")
        one_of("credit", self.credit, (None, "inputs", "tokens"))
        is_number = isinstance(self.discount, numbers.Real)
        if not is_number or not 0 <= self.discount <= 1 or (self.discount != 1 and self.credit != "tokens"):
            raise ValueError(f'discount must be a number in [0, 1], with credit="tokens" alone, got {self.discount!r}.')
        if self.samples is not None:
            positive_int("samples", self.samples)

    def __call__(self, params: Any, key: jax.Array, args: tuple, step: Any = None, std: Any = None) -> Estimate:
        noise = sample_noise(key, params, self.population, step=step, std=std)
        params, shard = self.axis.varying(params), self.axis.shard(self.population)
        names = argument_names(self.loss_fn)
        over = functools.partial(over_members, noise, args=args, in_axes=self.in_axes, shard=shard, names=names)
        member = functools.partial(self._member, params, noise, args)
        chunk = self.population.chunk_size
        marked = self.credit == "inputs" or noise.on_outputs
        in_chunks = marked and chunk is not None and chunk < self.population.size // shard[1]
        if not in_chunks:
            calls = over(member(marked=marked))
            losses, weights = self._weights(calls)
            credited = self._credited(noise, calls.rows, self._mine(weights))
        elif self._local:
            calls, credited = over(member(marked=True), reduce=functools.partial(self._reduce, noise, None))
            losses, weights = self._weights(calls)
        else:  # weights need all losses: a second pass, in which XLA leaves out what only the losses need
            calls = over(member(marked=False))
            losses, weights = self._weights(calls)
            mine = self._mine(weights)
            _, credited = over(member(marked=True), reduce=functools.partial(self._reduce, noise, mine))
        grads = gradient_of(noise, weights, self.shaping is not None, self.axis, credited)
        return Estimate(losses, calls.aux, as_params(noise, grads.parts), grads.norm(), grads.snr(), noise)

    def _loss(self, params: Any, *args: Any) -> tuple[jax.Array, Any]:
        """`(loss, aux)` of one call, checked."""
        out: Any = self.loss_fn(params, *args)
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"loss_fn must return (loss, aux) with has_aux=True, got {type(out).__name__}.")
        loss, aux = out if self.has_aux else (out, None)
        if not hasattr(loss, "dtype") and not isinstance(loss, numbers.Number):
            raise TypeError(f"loss_fn must return a scalar ((loss, aux) with has_aux=True), got {type(loss).__name__}.")
        shape = getattr(loss, "shape", ())
        if self.credit == "tokens" and (len(shape) != 1 or not shape[0]):
            raise ValueError(f'loss_fn must return losses [T], one a token, with credit="tokens", got shape {shape}.')
        if self.credit != "tokens" and shape != ():
            raise ValueError(
                f'loss_fn must return a scalar for each member (or losses [T] with credit="tokens"), got shape {shape}.'
            )
        if jnp.issubdtype(jnp.result_type(loss), jnp.complexfloating):
            raise TypeError(f"loss_fn must return a real loss, got {jnp.result_type(loss)}.")
        return jnp.asarray(loss, jnp.promote_types(jnp.result_type(loss), jnp.float32)), aux

    def _member(self, params: Any, noise: Noise, args: tuple, *, marked: bool) -> Callable:
        """`(own, sign, args) -> Calls` of one member: one call of the loss, or K."""
        if marked:
            run = perturbed_and_reaped(self._loss, strict=self.strict, inputs=self.credit == "inputs")
        else:
            run = perturbed(self._loss, strict=self.strict)

        def one(own, sign, args):
            def call(k, *args):
                out = run(params, with_sign(noise, own if k is None else for_call(noise, own, k), sign), *args)
                (loss, aux), reaped = out if marked else (out, None)
                plain = self._loss(params, *args)[0] if self.baseline == "unperturbed" else 0
                return Calls(loss, loss - plain, aux, self._rows(reaped, noise) if marked else {})

            if self.samples is None:
                return call(None, *args)
            return jax.vmap(call, (0, *samples_axes))(jnp.arange(self.samples), *args)

        samples_axes = () if self.samples is None else self._samples_axes(args)
        return one

    def _samples_axes(self, args: tuple) -> tuple:
        """Which of `args` hold K samples for each member (or group): those that `in_axes` maps."""
        count = self.population.size // self.axis.shard(self.population)[1] // self.population.group_size
        axes = mapped_axes(args, self.in_axes, count, argument_names(self.loss_fn))
        leaves, treedef = jax.tree.flatten(args)
        if all(axis is None for axis in axes):
            raise ValueError(f"samples={self.samples} needs arguments mapped by in_axes, [N, {self.samples}, ...].")
        for leaf, axis in zip(leaves, axes):
            shape = None if axis is None else jnp.shape(leaf)[:axis] + jnp.shape(leaf)[axis + 1 :]
            if shape is not None and shape[:1] != (self.samples,):
                raise ValueError(
                    f"samples={self.samples} needs mapped arguments [N, {self.samples}, ...] (N / g in groups of g), "
                    f"got shape {jnp.shape(leaf)} mapped along axis {axis}."
                )
        return treedef.unflatten([None if axis is None else 0 for axis in axes])

    def _rows(self, reaped: Any, noise: Noise) -> dict[str, Uses]:
        """What is credited by its inputs; warns of matrices that are not."""
        rows, reasons = credited_rows(reaped, noise.leaves)
        wide = {leaf.path for leaf in noise.leaves if len(leaf.noise_shape) > 1}
        plain = [f"{path} ({why})" for path, why in reasons.items() if path in wide]
        if plain and self.credit == "inputs":
            warnings.warn(
                f'credit="inputs" falls back to the plain estimate for {", ".join(plain)}.', CreditWarning, stacklevel=2
            )
        return rows

    @property
    def _local(self) -> bool:
        """Whether a member's weight needs no losses but those of its group or pair."""
        if self.population.group_size > 1:
            return True
        pairs = self.population.antithetic and self.baseline == "mean"  # the mean cancels in a pair's difference
        return self.shaping is None and (self.baseline in (None, "unperturbed") or pairs)

    def _weights(self, calls: Calls) -> tuple[jax.Array, jax.Array]:
        """The losses of all devices, and their weights."""
        losses = self.axis.gather(calls.losses)
        compared = self.axis.gather(calls.compared) if self.baseline == "unperturbed" else losses
        return self._averaged(losses), self._of_losses(compared, self.baseline)

    def _averaged(self, losses: jax.Array) -> jax.Array:
        """A member's mean over its samples, where they are not credited one by one."""
        return losses.mean(-1) if self.samples is not None and self.credit is None else losses

    def _of_losses(self, compared: jax.Array, baseline: Baseline) -> jax.Array:
        weigh = functools.partial(
            member_weights, shaping=self.shaping, baseline=baseline, group_size=self.population.group_size,
            antithetic=self.population.antithetic,
        )  # fmt: skip
        compared = self._averaged(compared)
        for _ in compared.shape[1:]:
            weigh = jax.vmap(weigh, -1, -1)
        return weigh(compared)

    def _mine(self, weights: jax.Array) -> jax.Array:
        """The weights of this device's members."""
        index, count = self.axis.shard(self.population)
        return jax.lax.dynamic_slice_in_dim(weights, index * (len(weights) // count), len(weights) // count)

    def _reduce(self, noise: Noise, weights: jax.Array | None, calls: Calls, first: Any, fresh: jax.Array) -> tuple:
        """What is kept of a chunk of members, and its credited sums."""
        if weights is None:
            alone = self.population.group_size == 1  # then a chunk's mean isn't the population's, and cancels in pairs
            weights = self._of_losses(calls.compared, None if alone else self.baseline)
        else:
            weights = jax.lax.dynamic_slice_in_dim(weights, first, len(fresh))
        weights = jnp.where(fresh.reshape(-1, *(1,) * (weights.ndim - 1)), weights, 0)
        return calls._replace(rows={}), self._credited(noise, calls.rows, weights)

    def _credited(self, noise: Noise, rows: dict[str, Uses], weights: jax.Array) -> dict[str, CreditedSum]:
        """The credited sums over members with these weights, of which a pair has its partners' difference.

        Partners with the same samples count as one call; else each has half of the weight, with inputs of its own.
        """
        leaves = {leaf.path: leaf for leaf in noise.leaves}
        weights = directions(self.population, weights) / (weights.size // len(weights))
        if self.credit is None and self.samples is not None:  # a call's share of their mean is in the mean already
            weights = jnp.repeat(weights[:, None], self.samples, 1)
        per_call = lambda z: z if self.samples is None else z.reshape(-1, *z.shape[2:])

        def of_parameter(path, uses):
            apart = self.population.signs
            if apart == 2 and self._alike and all(jnp.issubdtype(use.x.dtype, jnp.floating) for use in uses):
                uses, apart = mean_of_partners(uses), 1
            own = jnp.repeat(weights / apart, apart, axis=0)
            return credited_sum(leaves[path], jax.tree.map(per_call, uses), per_call(own), self.discount, apart)

        return {path: of_parameter(path, uses) for path, uses in rows.items()}

    @property
    def _alike(self) -> bool:
        """Whether antithetic partners are sure to have the same samples."""
        return self.population.group_size > 1 or not jax.tree.leaves(self.in_axes)
