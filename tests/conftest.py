"""Every test runs on 8 virtual CPU devices, so sharding is tested by the same process as everything else."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimisations they take a fraction of the time. Runs that tests
# start as processes of their own inherit this, so that their numbers can be compared.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# What one test has compiled the others find, in other workers and in the runs they start, and only of the same session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxlm-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Where no bytecode may be left beside the sources, what one process of a session has parsed the others find here.
if sys.dont_write_bytecode:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # unset with `python -B`
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="jaxlm-bytecode-")
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
# The threads of an interpreted block wait on one another, and each holds a thread of XLA's on every device: of as many as there
# are devices or cores, the default, none would be left.
os.environ.setdefault("NPROC", "32")
# Test processes share a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Traces make many objects that live on, which the collector would look through again and again.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU, and JAX_PLATFORMS=cuda,cpu")


@pytest.fixture
def x64():
    """Run one test in float64: the oracle's precision."""
    with jax.enable_x64(True):
        yield
