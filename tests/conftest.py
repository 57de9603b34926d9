"""Every test runs on 8 virtual CPU devices, so sharding is tested by the same process as everything else."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Run one test in float64: the oracle's precision."""
    with jax.enable_x64(True):
        yield
