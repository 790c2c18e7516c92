"""Eight CPU devices for the tests that spread a population over them, and quicker compiling for the many small ones."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests that do little but compile: leave XLA's optimisations out. Products in full float32 precision."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)
