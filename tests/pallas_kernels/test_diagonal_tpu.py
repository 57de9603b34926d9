"""TPU kernels of the diagonal recurrence: by the interpreter against the recurrent form, and by the compiler for every chip."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import kernels
from jaxlm.ops.forms import choose
from jaxlm.parallel.context import use_mesh
from jaxlm.parallel.mesh import make_mesh
from pallas_kernels import aot
from pallas_kernels.diagonal import tpu
from tests.pallas_kernels import interpreters
from tests.pallas_kernels.diagonal import arrays, assert_close, op, reference


def run(a, b, do, state, d_final, interpret):
    h = tpu.forward(a, b, state, interpret=interpret)
    return h, *tpu.backward(a, h, do, state, d_final, interpret=interpret)


@pytest.mark.parametrize("sizes", [(2, 37, 130), (1, 90, 128), (2, 8, 700), (3, 1, 64), (1, 64, 64)], ids=str)
def test_values_and_gradients(sizes, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 32)
    given = arrays(*sizes)
    assert_close(jax.jit(partial(run, interpret=True))(*given), reference(*given))


def test_no_races_and_nothing_uninitialised(monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 64)
    given = arrays(2, 150, 640)  # three chunks, as two in random order may be in order
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(*given, interpret=interpreters.TPU))
    assert_close(got, reference(*given))


def test_later_tokens_change_no_earlier_bit():
    a, b, _, state, _ = arrays(1, 40, 128)
    other = arrays(1, 40, 128, seed=1)
    h = tpu.forward(a, b, state, interpret=True)
    for t in (3, 16, 29):
        changed = [jnp.concatenate([x[:, :t], y[:, t:]], axis=1) for x, y in zip((a, b), other[:2], strict=True)]
        np.testing.assert_array_equal(h[:, :t], tpu.forward(*changed, state, interpret=True)[:, :t])


@pytest.mark.parametrize("shared", [False, True], ids=["decays of tokens", "one decay for all"])
@pytest.mark.parametrize(
    "mesh", [None, {"data": 2, "tensor": 4}, {"data": 2, "tensor": 2, "sequence": 2}],
    ids=["one device", "split rows and heads", "split tokens too"],
)  # fmt: skip
def test_the_op_calls_the_kernel(mesh, shared, monkeypatch):
    expected = op("recurrent", shared=shared)
    calls = []
    forward = tpu.forward
    monkeypatch.setattr(tpu, "forward", lambda a, b, *rest, **named: calls.append(b.shape) or forward(a, b, *rest, **named))
    with kernels.interpreted("tpu", "TPU v5 lite"):
        got = op("auto", shared=shared)
        if mesh:
            alone = got
            calls.clear()
            with use_mesh(make_mesh(mesh)):
                got = op("auto", shared=shared)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, alone)
    ways = mesh or {}
    assert set(calls) == {(2 // ways.get("data", 1), 48 // ways.get("sequence", 1), 32 // ways.get("tensor", 1))}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.complex64}, "takes bfloat16 and float32, not complex64"),
        ({"read_out": True}, "many states a channel"),
        ({"platform": "gpu", "chip": "NVIDIA H100"}, None),
        ({"chip": "TPU v3"}, "not on TPU v3"),
    ],
    ids=str,
)
def test_where_the_kernel_joins(change, reason):
    known = {"platform": "tpu", "chip": "TPU v5 lite", "dtype": jnp.float32}
    choice = choose("diagonal_recurrence", "auto", T=512, **known | change)
    assert choice.form == ("kernel" if reason is None else "chunked")
    if reason is not None:
        assert reason in choice.reason
        with pytest.raises(ValueError, match=re.escape(f'form="kernel" of diagonal_recurrence cannot run: {choice.reason}')):
            choose("diagonal_recurrence", "kernel", T=512, **known | change)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for(chip, direction):
    """Static cycles a token and channel: memory alone takes 0.022 and 0.037 on v5e. v4 has no rotation of rows."""
    report = aot.report(chip, "pallas_kernels.cases:diagonal", {"platform": "tpu", "direction": direction})
    [kernel] = report["kernels"]
    assert kernel["spills"] <= (20 if chip == "v4" else 0)
    assert kernel["static_cycles"] / (2 * 4096 * 1024) < (0.03 if chip == "v4" else 0.011)
    # h counts twice in the backward, which reads one tile of each chunk again.
    least = 12 if direction == "forward" else 24
    assert least <= report["hbm_bytes"] / (2 * 4096 * 1024) < 1.001 * least
