"""What the device gives at best: a large matrix product at each precision, and a copy."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from .measure import interleave, summary
from .tables import figure, markdown

KINDS = (("bfloat16", "default"), ("float32", "default"), ("float32", "highest"))  # float32's default on a GPU: TF32


def cases(quick: bool) -> list[dict]:
    size = 8192 if jax.default_backend() != "cpu" and not quick else 1024
    products = [{"what": "product", "size": size, "dtype": dtype, "precision": which} for dtype, which in KINDS]
    return [*products, {"what": "copy", "size": size, "dtype": "float32", "precision": "default"}]


def measure(what: str, size: int, dtype: str, precision: str) -> Iterator[dict]:
    """Operations per second of a product of `[size, size]` arrays, or bytes per second, read and written, of a copy."""
    arrays = [jax.random.normal(jax.random.key(at), (size, size), dtype) for at in range(3)]
    if what == "product":
        inputs, work = [(arrays[0], arrays[1]), (arrays[1], arrays[2])], 2 * size**3
        run = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    else:
        inputs, work = [(a,) for a in arrays], 2 * arrays[0].nbytes
        run = jax.jit(lambda a: a + 1)
    found = summary(interleave({what: run}, inputs, rounds=9, seconds=10)[what])
    yield {**found, "per_second": float(f"{work / found['seconds'][0]:.4g}")}


def table(results: dict) -> str:
    """Tera-operations (a multiplication and an addition are two) or terabytes per second."""

    def line(row):
        rate = f"{figure(row['per_second'] / 1e12)} {'TFLOP/s' if row['what'] == 'product' else 'TB/s'}"
        return [row["what"], f"{row['size']:,}", row["dtype"], row["precision"], rate]

    return markdown(["what", "size", "dtype", "precision", "rate"], map(line, results["rows"]))
