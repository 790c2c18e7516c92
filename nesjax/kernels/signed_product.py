"""Products with sign noise, `x @ w + scale * z t^T`, in one kernel: for the tensor cores of NVIDIA's H100 and H200.

Letters: `M` rows (all members' samples), `I`/`O` in/out features. Each row has signs `t` of its outputs, a scale, and
`z = x . s` with signs `s` of its inputs, or `z = 1`. Signs come in words of 32, `1` for minus, as the families pack
them, but with rows last: the words of a tile's rows then lie side by side.

A block of two warpgroups, of `ROWS` rows each, forms one tile of the output at a time, while a third loads. As a step's
product runs, its tile of `x` is read again from shared memory, signed and added up to `z`. The noise is added to the
float32 accumulator, with it a bias that has sign noise of its own, and an activation follows: all is rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AxisType

plgpu: Any = mosaic_gpu  # whose classes a type checker takes for abstract ones

ROWS = 64  # of one warpgroup, two of which form a tile
INPUTS = 64  # of one step: the two words of their signs, and 128 bytes of bfloat16
OUTPUTS = 256, 128, 64  # of a tile: the first that divides `O`
STEPS = 3  # in flight, in 144 KiB of shared memory at most
SNAKE = 8  # tiles of rows that read the same weights before the next are read
CORES = 132
SLOTS = 2  # stores of 64 columns in flight
OLDEST = 0, 11, 2  # jax that the kernel was compiled with


def signed_product(
    by_xla: Callable, x: jax.Array, w: jax.Array, scale: jax.Array, t: jax.Array, s: jax.Array | None = None,
    *bias: jax.Array, then: Callable | None = None,
) -> jax.Array:  # fmt: skip
    """`then(x @ w + scale * z t^T, bias)` of one member; members that `jax.vmap` maps over are rows of one kernel.

    The kernel is for bfloat16, the result's too; for `I` and `O` that are multiples of 64, and 128 rows or a multiple
    of that in all; for jax >= 0.11.2; on several devices, where `jax.shard_map` spreads the program over every axis of
    the mesh. Elsewhere XLA's form is used, as it is for weights that differ between members, and for an `x` that they
    share: the product with `w` is then formed only once.

    Args:
      by_xla: the definition, a function of the other arguments but `then`.
      x: `[..., I]`.
      w: `[I, O]`.
      scale: a float32 number.
      t: `uint32[ceil(O / 32)]`; or `[..., ceil(O / 32)]`, signs of each row's own.
      s: `uint32[ceil(I / 32)]`, or None for `z = 1`.
      *bias: nothing, or a bias `[O]`, a float32 number and `uint32[ceil(O / 32)]`, the scale and signs of its noise.
      then: what follows number by number, a function of float32 arrays: the sum and, if there is one, the bias with its
        noise. The definition does the same. None if nothing does.

    Returns:
      An array `[..., O]`.
    """
    # What all members share, and what each has of its own.
    each = jax.vmap(lambda x, shared, own: by_xla(x, shared[0], *own[:3], *shared[1:], *own[3:]), (0, None, 0))

    @jax.custom_batching.custom_vmap
    def of_members(*args):
        x, shared, _ = args
        if not (_available() and _fits(x, shared[0])):
            return each(*args)
        as_rows = lambda z: z.reshape(math.prod(x.shape[:-1]), z.shape[-1])
        (y,) = jax.make_jaxpr(lambda *args: as_rows(each(*args)))(*args).out_avals

        def in_kernel(x, shared, own):
            return kernel(y, as_rows(x), shared, _of_rows(own, x), then).reshape(*x.shape[:-1], -1)

        return lax.platform_dependent(*args, cuda=in_kernel, default=each)

    @of_members.def_vmap
    def _(size, batched, x, shared, own):
        if any(jax.tree.leaves(batched[1])) or not batched[0]:
            axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(batched))
            return jax.vmap(each, axes, axis_size=size)(x, shared, own), True

        def merged(z, mapped=True):
            z = z if mapped else jnp.broadcast_to(z, (size, *z.shape))
            return z.reshape(-1, *z.shape[2:])

        y = of_members(merged(x), shared, jax.tree.map(merged, own, batched[2]))
        return y.reshape(size, -1, *y.shape[1:]), True

    own = jax.tree.map(lambda z: z[None], (scale, t, s, *bias[1:]))
    return of_members(x[None], (w, *bias[:1]), own)[0]


def _available() -> bool:
    """Whether the kernel may be used in this program, as far as is known before it is lowered."""
    try:
        gpus: list[Any] = jax.devices("cuda")
    except RuntimeError:  # there are none, but what is lowered for some elsewhere is lowered with the kernel
        gpus = []
    split = {*jax.sharding.get_abstract_mesh().axis_types} - {AxisType.Manual}
    return jax.__version_info__ >= OLDEST and not split and all(gpu.compute_capability == "9.0" for gpu in gpus)


def _fits(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel takes the rows of `x: [..., I]` and `w: [I, O]`."""
    rows = math.prod(x.shape[:-1])
    whole = rows % (2 * ROWS) == w.shape[0] % INPUTS == w.shape[1] % OUTPUTS[-1] == 0
    return whole and 0 not in (rows, *w.shape) and x.dtype == w.dtype == jnp.bfloat16


def _of_rows(own: Sequence, x: jax.Array) -> tuple:
    """What is each member's own, repeated for its rows, which come last: scales `[M]` and words `[words, M]`."""

    def rows(z):
        if z.ndim == 1:
            return rows(z[:, None])[0]
        z = z.reshape(len(z), *(1,) * (x.ndim - z.ndim), *z.shape[1:])
        return jnp.broadcast_to(z, (*x.shape[:-1], z.shape[-1])).reshape(-1, z.shape[-1]).T

    return jax.tree.map(rows, tuple(own))


def kernel(y: Any, x: jax.Array, shared: Sequence, own: Sequence, then: Callable | None = None) -> jax.Array:
    """`then(x @ w + scale * z t^T, bias)` of rows that fit.

    Args:
      y: the type of the result, `[M, O]`.
      x: `[M, I]`.
      shared: `w: [I, O]`, and `b: [O]` if there is a bias.
      own: of each row a scale `float32[M]`, `t: uint32[O / 32, M]`, and `s: uint32[I / 32, M]` or None for `z = 1`; of
        its bias a scale and signs like `t`.
      then: as in `signed_product`.
    """
    w, *_ = shared
    outputs = next(size for size in OUTPUTS if w.shape[1] % size == 0)
    tiles = x.shape[0] // (2 * ROWS), w.shape[1] // outputs
    as_int = lambda z: z if z.dtype == jnp.float32 else lax.bitcast_convert_type(z, jnp.int32)
    return plgpu.kernel(
        functools.partial(_block, tiles, outputs, then), out_type=y, grid=(min(CORES, tiles[0] * tiles[1]),),
        grid_names=("core",), num_threads=3, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, tuple(shared), jax.tree.map(as_int, tuple(own)))  # fmt: skip


def _block(tiles: tuple[int, int], outputs: int, then, x, shared, own, y) -> None:
    """What one core does: its share of the tiles, one after the other. All of these are in global memory."""
    w, s = shared[0], [words for words in own[2:3] if words is not None]
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
    specs = [
        spec((2 * ROWS, INPUTS), lambda k: (0, k), transforms=swizzled),
        spec((INPUTS, outputs), lambda k: (k, 0), transforms=swizzled),
        *(spec((INPUTS // 32, 2 * ROWS), lambda k: (k, 0)) for _ in s),
    ]
    pipeline = functools.partial(
        plgpu.emit_pipeline_warp_specialized, grid=(x.shape[1] // INPUTS,), in_specs=specs, max_concurrent_steps=STEPS,
        memory_registers=40, wg_axis="warpgroup", num_compute_wgs=2,
    )  # fmt: skip
    ignore: Any = lambda *_, **__: None

    def work(buffers, stores):
        half = pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
        step = functools.partial(_step, half)

        @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="core")
        def _(loop):
            row, column = plgpu.planar_snake(loop.index[0], tiles, 1, SNAKE)
            rows, columns = pl.ds(row * 2 * ROWS, 2 * ROWS), pl.ds(column * outputs, outputs)
            mine = pl.ds(row * 2 * ROWS + half.start, ROWS)
            store = functools.partial(_store, then, shared[1:], own, mine, y, column * outputs, stores)

            def compute(run):
                def accumulate(total):
                    _, z = run((total, jnp.full(ROWS, 0.0 if s else 1.0, jnp.float32)))
                    store(total[...], z)

                pl.run_scoped(accumulate, plgpu.ACC((ROWS, outputs), jnp.float32))

            inputs = x.at[rows], w.at[:, columns], *(words.at[:, rows] for words in s)
            pipeline(step, compute_context=compute)(*inputs, allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    buffers = pipeline(ignore, compute_context=ignore).get_allocations(x, w, *s)
    stores = plgpu.SMEM((2, SLOTS, ROWS, 64), y.dtype, transforms=swizzled)
    pl.run_scoped(work, buffers, stores, collective_axes="warpgroup")


def _step(own, _, x, w, *words_and_carry):
    """Adds a step's product to `total`, and to `z` the signed sum of its inputs, meanwhile."""
    *words, (total, z) = words_and_carry
    plgpu.wgmma(total, x.at[own], w)
    for s in words:
        z = z + _signed(x[own].astype(jnp.float32), s[0, own], s[1, own]).sum(1)
    plgpu.wgmma_wait(0)
    return total, z


def _store(then, b, own, rows, y, first, stores, total, z) -> None:
    """Adds the noise to a warpgroup's `rows`, does what follows and stores them, 64 columns at a time."""
    scale, t, _, *of_bias = own

    def noise(z, t, column):
        words = (_load(t.at[column // 32 + k, rows]) for k in (0, 1))
        return _signed(lax.broadcast_in_dim(z, (ROWS, 64), (0,)), *words)

    z = z * _load(scale.at[rows])
    stores = stores.at[lax.axis_index("warpgroup")]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for at in range(0, total.shape[1], 64):
        column, slot = first + at, at // 64 % SLOTS
        part, bias = total[:, at : at + 64] + noise(z, t, column), []
        for weight in b:
            weight = lax.broadcast_in_dim(_load(weight.at[pl.ds(column, 64)]).astype(jnp.float32), (ROWS, 64), (1,))
            bias = [weight + noise(_load(of_bias[0].at[rows]), of_bias[1], column)]
        part = then(part, *bias) if then else part
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        stores[slot] = part.astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stores.at[slot], y.at[rows, pl.ds(column, 64)])


def _load(ref) -> jax.Array:
    """A number of each row, from global memory: they come in no tiles."""
    return plgpu.load(ref, optimized=False)


def _signed(x, low, high) -> jax.Array:
    """`x: [ROWS, 64]` with the signs of two words a row."""
    place = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    low, high = (lax.broadcast_in_dim(word, x.shape, (0,)) for word in (low, high))
    return jnp.where((jnp.where(place < 32, low, high) >> (place & 31)) & 1 == 1, -x, x)
