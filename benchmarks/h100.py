"""What XLA makes of a function for an H100, on a machine without one: its kernels, its memory and a modelled time.

Nothing runs. It needs the CUDA plugin's wheels of jaxlib's version (no GPU, driver, cuBLAS or cuDNN), and where there
is no GPU `JAX_PLATFORMS=cpu` in the environment before jax is imported:

    pip install --no-deps jax-cuda12-pjrt==V jax-cuda12-plugin==V nvidia-cuda-nvcc-cu12

Times are modelled: XLA's own estimate of each kernel, except for matrix products, for which XLA needs measurements, and
nesjax's own kernels, which are products too. Their estimate is the roofline at `EFFICIENCY`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of the tensor cores; float32 products as TF32, JAX's default.
FLOPS = {"s8": 1979e12, "bf16": 989e12, "f16": 989e12, "f32": 495e12}
BANDWIDTH = 3.35e12
EFFICIENCY = 0.7  # what large products reach of either, about what XLA's model grants other kernels of the bandwidth

_RATES = "rate_infos {{ key: {} value {{ clock_rate_ghz: {} units_per_core: {} ops_per_clock: {} }} }}".format
TARGET = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0" cub_version: "3.1.2"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  pcie_bandwidth: 34359738368 ecc_enabled: true device_address_bits: 64
  scalar_unit_description {{ {_RATES(10, 1.98, 128, 2)} {_RATES(11, 1.98, 128, 1)} {_RATES(16, 1.98, 128, 2)} }}
  matrix_unit_description {{ {_RATES(10, 1.83, 4, 512)} {_RATES(11, 1.83, 4, 256)} {_RATES(16, 1.83, 4, 512)} }}
}}
"""  # units' rates by XLA's type numbers: 10 float16, 11 float32, 16 bfloat16
OPTIONS = {"xla_gpu_collect_cost_model_stats": True, "xla_gpu_experimental_cost_model_gemm_tiling_default": True}
OWN = "mosaic_gpu"  # in the call of a kernel of nesjax.kernels, which are products all
CUBLAS = {"xla_gpu_enable_triton_gemm": False}  # products as cublasLt calls, which may add to what is there already


def available() -> bool:
    """Whether it works here: the wheels are of jaxlib's version, and the plugin is registered."""
    try:
        wheels = {importlib.metadata.version(name) for name in ("jaxlib", "jax-cuda12-pjrt", "jax-cuda12-plugin")}
        importlib.metadata.version("nvidia-cuda-nvcc-cu12")
        return len(wheels) == 1 and h100_mesh().size == 1
    except (importlib.metadata.PackageNotFoundError, NotImplementedError):  # no such wheel; no such topology
        return False


def h100_mesh(devices: int = 1) -> Mesh:
    """A mesh with one axis, `"d"`, of H100s that aren't there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{devices}")
    return topologies.make_mesh(topology, (devices,), ("d",))


def compile_for_h100(
    fn: Callable, *args: Any, mesh: Mesh | None = None, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """`jax.jit(fn)` compiled for an H100, or for all those of `mesh`.

    Args:
      args: trees of arrays or `jax.ShapeDtypeStruct`, replicated over the mesh unless they have a sharding on it.
      mesh: of `h100_mesh`; one H100 by default.
      options: compiler options beside `OPTIONS`, `CUBLAS` say.
    """
    replicated = NamedSharding(mesh or h100_mesh(), PartitionSpec())

    def abstract(leaf):
        placed = isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None
        return leaf if placed else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    lowered = jax.jit(fn).lower(*jax.tree.map(abstract, args))
    return lowered.compile(compiler_options=OPTIONS | (options or {}))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel (or library call) of a program.

    Attributes:
      name: the instruction's.
      kind: gemm, convolution, sort, collective, call, scatter, rng, gather, reduce, transpose or elementwise: the first
        that applies to what is fused in it.
      shape: of what it writes, as HLO text.
      us: its modelled time in microseconds, all its runs together.
      runs: how often it runs, more than once in a loop; a loop of unknown length counts once.
    """

    name: str
    kind: str
    shape: str
    us: float
    runs: int = 1

    @property
    def largest(self) -> int:
        """Numbers in the largest array written."""
        return max(math.prod(sizes) for _, sizes in _arrays(self.shape))


def kernels(compiled: jax.stages.Compiled) -> list[Kernel]:
    """The kernels of a compiled program, those in loops and branches too."""
    blocks = re.findall(r"^(ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", compiled.as_text(), re.M | re.S)
    computations = {name: _instructions(body) for _, name, body in blocks}

    def visit(here: dict[str, _Instruction], runs: int):
        for item in here.values():
            called = [computations[name] for name in re.findall(r"%([^\s,(){}]+)", item.rest) if name in computations]
            started = item.op.endswith("-start") and not item.op.startswith(_COLLECTIVES)
            if item.op in ("while", "call", "conditional") or (started and called):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', item.rest)
                for computation in called:
                    yield from visit(computation, runs * int(trips[1]) if trips else runs)
            elif item.op not in _FREE and not item.op.endswith("-done"):
                kind, us = _cost(item, here, called[0] if item.op == "fusion" else {item.name: item})
                yield Kernel(item.name, kind, item.shape, us * runs, runs)

    return list(visit(next(computations[name] for entry, name, _ in blocks if entry), 1))


def kinds(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many kernels there are of each kind."""
    return dict(Counter(kernel.kind for kernel in kernels(compiled)))


def modelled_us(compiled: jax.stages.Compiled) -> float:
    """The modelled time of one run in microseconds; without the gaps between kernels."""
    return sum(kernel.us for kernel in kernels(compiled))


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


# ---- the optimised HLO, as text


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str


_LINE = re.compile(r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)", re.M)
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def _instructions(text: str) -> dict[str, _Instruction]:
    """A computation's instructions by name."""
    found = (_Instruction(*m[:3], re.findall(r"%([^\s,]+)", m[3]), m[4]) for m in _LINE.findall(text))
    return {item.name: item for item in found}


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    """(type, sizes) of each array in a shape's text."""
    return [(kind, [int(n) for n in sizes.split(",") if n]) for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)]


def _bytes(shape: str) -> int:
    bits = {kind: int((re.search(r"\d+", kind) or "8")[0]) for kind, _ in _arrays(shape)}
    return sum(math.prod(sizes) * bits[kind] // 8 for kind, sizes in _arrays(shape))


def _cost(item: _Instruction, here: dict[str, _Instruction], inside: dict[str, _Instruction]) -> tuple[str, float]:
    """The kind and modelled microseconds of an instruction `here`, with what is fused `inside` it."""
    if "__cublas" in item.rest:
        return "gemm", _roofline(item, item, here, here)
    dot = next((other for other in inside.values() if other.op == "dot" or OWN in other.rest), None)
    if dot:
        return "gemm", _roofline(dot, item, inside if item.op == "fusion" else here, here)
    xla = re.search(r'"reification_cost":\[\{[^}]*"exec_time_us":([\d.e+-]+)', item.rest)
    return _kind(item, Counter(other.op for other in inside.values())), float(xla[1]) if xla else 0.0


def _roofline(dot: _Instruction, kernel: _Instruction, inside: dict, here: dict) -> float:
    shapes = [*(inside[name].shape for name in dot.operands[:2]), dot.shape]
    (kind, lhs), (_, rhs), (_, out) = (_arrays(shape)[0] for shape in shapes)
    batched = re.search(r'lhs_batch_dim\w+(?:=\{|":\[)([^]}]*)', dot.rest)
    batch = math.prod(lhs[int(at)] for at in re.findall(r"\d+", batched[1] if batched else ""))
    flops = 2 * math.sqrt(math.prod(lhs) * math.prod(rhs) * math.prod(out) / batch)
    moved = sum(_bytes(here[name].shape) for name in kernel.operands) + _bytes(kernel.shape)
    return 1e6 / EFFICIENCY * max(flops / FLOPS.get(kind, FLOPS["f32"]), moved / BANDWIDTH)


def _kind(item: _Instruction, ops: Counter) -> str:
    if item.op.startswith(_COLLECTIVES):
        return "collective"
    for kind, sign in (("sort", "__cub$"), ("convolution", "__cudnn$conv"), ("call", "")):
        if item.op == "custom-call" and sign in item.rest:
            return kind
    applies = {
        "sort": ops["sort"],
        "convolution": ops["convolution"],
        "scatter": ops["scatter"],
        "rng": ops["xor"] >= 20,  # threefry's rounds
        "gather": ops["gather"],
        "reduce": ops["reduce"],
        "transpose": ops["transpose"] + ops["copy"],
    }
    return next((kind for kind, applies in applies.items() if applies), "elementwise")
