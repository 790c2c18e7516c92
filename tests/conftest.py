"""Eight CPU devices for the tests that spread a population over them, and quick compiling for the many small ones."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = ["typed_mistakes.py", "typed_user.py"]  # for pyright, not to be run
OPTIMISED = "optimised", "slow", "gpu_aot"  # the tests so marked have XLA optimise, as users do


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item):
    """Most tests do little but compile, in processes of their own too, and want products in full float32 precision."""
    quick = not any(map(item.get_closest_marker, OPTIMISED))
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.config.update("jax_default_matmul_precision", "highest" if quick else None)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
