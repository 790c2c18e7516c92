"""Eight CPU devices for the tests that spread a population over them, and quick compiling for the many small ones."""

import os

import jax
import pytest

from benchmarks import measure

if jax.__version_info__[:2] == (0, 10):  # where half of the time is a part of XLA that can be left out
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = ["typed_mistakes.py", "typed_user.py"]  # for pyright, not to be run
OPTIMISED = "optimised", "slow", "gpu_aot"  # the tests so marked have XLA optimise, as users do


@pytest.hookimpl(wrapper=True)  # around the fixtures, which compile too
def pytest_runtest_protocol(item):
    """Most tests do little but compile, in processes of their own too."""
    if any(map(item.get_closest_marker, OPTIMISED)):
        return (yield)
    with measure.quickly(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        return (yield)
