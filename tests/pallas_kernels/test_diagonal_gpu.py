"""GPU kernels of the diagonal recurrence: by the interpreter with its race detection, by the compiler for Hopper, on a GPU."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.ops.forms import choose
from pallas_kernels import aot
from pallas_kernels import gpu as hopper
from pallas_kernels.diagonal import gpu
from tests.pallas_kernels import interpreters
from tests.pallas_kernels.diagonal import arrays, assert_close, op, reference


def run(a, b, do, state, d_final, interpret):
    h = gpu.forward(a, b, state, interpret=interpret)
    return h, *gpu.backward(a, h, do, state, d_final, interpret=interpret)


# Tiles of a segment: more than are in flight, and half as many as on a chip, which the interpreter walks in half the time.
FEWEST = 4
# Sizes, and the multiprocessors of a chip that splits the time into so many segments.
CASES = [((1, 100, 130), 1, 1), ((2, 33, 64), 132, 1), ((1, 280, 128), 1, 2), ((1, 1, 64), 132, 1)]


@pytest.mark.parametrize(("sizes", "multiprocessors", "segments"), CASES, ids=str)
def test_values_gradients_and_no_races(sizes, multiprocessors, segments, monkeypatch):
    monkeypatch.setattr(hopper, "SMS", multiprocessors)
    monkeypatch.setattr(gpu, "FEWEST", FEWEST)
    found = []
    walk = gpu._walk
    monkeypatch.setattr(gpu, "_walk", lambda *args, **named: found.append(args[5][0].shape[1]) or walk(*args, **named))
    given = arrays(*sizes)
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(jax.jit(partial(run, interpret=interpreters.GPU))(*given))
    assert_close(got, reference(*given))
    assert set(found) == {segments}


def test_segments_of_different_lengths(monkeypatch):
    """14 tiles in 2 segments of 5 tiles and one of 4 of which some tokens are padding."""
    monkeypatch.setattr(hopper, "SMS", 2)
    monkeypatch.setattr(gpu, "FEWEST", FEWEST)
    given = arrays(1, 13 * gpu.TILE + 5, 64)
    assert_close(jax.jit(partial(run, interpret=True))(*given), reference(*given))


@interpreters.INTERPRETER_AND_GPU
def test_later_tokens_change_no_earlier_bit(interpret):
    a, b, _, state, _ = arrays(1, 80, 128)
    other = arrays(1, 80, 128, seed=1)
    forward = jax.jit(partial(gpu.forward, interpret=interpret))
    h = forward(a, b, state)
    for t in (3, 32, 50):
        changed = [jnp.concatenate([x[:, :t], y[:, t:]], axis=1) for x, y in zip((a, b), other[:2], strict=True)]
        np.testing.assert_array_equal(h[:, :t], forward(*changed, state)[:, :t])


@pytest.mark.parametrize(
    ("shared", "mesh", "interpret"),
    [
        (False, None, True),
        (True, None, True),
        pytest.param(False, {"data": 2, "tensor": 4}, True, marks=pytest.mark.slow),
        pytest.param(False, None, False, marks=pytest.mark.gpu),
    ],
    ids=["decays of tokens", "one decay for all", "split rows and channels", "device"],
)
def test_the_op_calls_the_kernel(shared, mesh, interpret, monkeypatch):
    if mesh:
        interpreters.let_gpus_differ(monkeypatch)
    calls = []
    forward = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda a, b, *rest, **named: calls.append(b.shape) or forward(a, b, *rest, **named))
    expected = op("recurrent", shared=shared)
    with interpreters.hopper(interpret, mesh):
        got = op("kernel", shared=shared)
    devices = 8 if mesh else 1 if interpret else jax.device_count()
    ((rows, tokens, channels),) = set(calls)
    assert (tokens, rows * channels * devices) == (48, 2 * 32)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.complex64}, "takes bfloat16 and float32, not complex64"),
        ({"read_out": True}, "many states a channel"),
        ({"chip": "NVIDIA A100"}, "made for Hopper"),
    ],
    ids=str,
)
def test_where_the_kernel_can_be_asked_for(change, reason):
    known = {"platform": "gpu", "chip": "NVIDIA H100 80GB HBM3", "dtype": jnp.float32} | change
    if reason is None:
        assert choose("diagonal_recurrence", "kernel", T=512, **known).form == "kernel"
        return
    with pytest.raises(ValueError, match=reason):
        choose("diagonal_recurrence", "kernel", T=512, **known)


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the wheels of jax-cuda13-plugin and jax-cuda13-pjrt"
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sizes", [{"B": 16, "D": 4096}, {"B": 1, "T": 32768, "D": 1024}], ids=str)
def test_compiles_for_hopper(direction, sizes):
    """The second one in segments of time."""
    report = aot.report("h100", "pallas_kernels.cases:diagonal", {"platform": "gpu", "direction": direction} | sizes)
    assert len(report["kernels"]) == (1 if sizes["B"] == 16 else 2)
    for kernel in report["kernels"]:
        assert kernel["spill_bytes"] == 0
        assert kernel["registers"] <= 64
        # Forward two of them fit a multiprocessor, backward one.
        assert kernel["smem_bytes"] <= (113 if direction == "forward" else 227) * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 20_000, 128), (3, 1000, 1030), (16, 2048, 1024), (1, 1, 128)], ids=str)
def test_on_the_device(sizes):
    given = arrays(*sizes)
    both = jax.jit(partial(run, interpret=False))
    got = both(*given)
    with jax.default_device(jax.devices("cpu")[0]):
        assert_close(got, reference(*jax.device_get(given)))
    for x, y in zip(got, both(*given), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_the_op_on_the_device():
    rng = np.random.default_rng(0)
    log_a = jnp.asarray(-rng.exponential(size=(2, 300, 4, 40)), jnp.float32)
    b = jnp.asarray(rng.normal(size=log_a.shape), jnp.float32)
    ids = jnp.asarray(np.sort(rng.integers(5, size=(2, 300)), axis=1))
    out = {form: diagonal_recurrence(log_a, b, segment_ids=ids, form=form)[0] for form in ("kernel", "recurrent")}
    np.testing.assert_allclose(out["kernel"], out["recurrent"], rtol=2e-5, atol=2e-5)
