"""Eight CPU devices for the tests that spread a population over them, and quicker compiling for the many small ones."""

import jax
import pytest

from benchmarks import measure

jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = ["typed_mistakes.py", "typed_user.py"]  # for pyright, not to be run


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests that do little but compile."""
    with measure.quickly():
        yield
