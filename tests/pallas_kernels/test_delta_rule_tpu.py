"""TPU kernels of the delta rule: by the interpreter against the recurrent form, and by the compiler for every chip."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import kernels
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.forms import choose
from jaxlm.parallel.context import use_mesh
from jaxlm.parallel.mesh import make_mesh
from pallas_kernels import aot
from pallas_kernels.delta_rule import tpu
from pallas_kernels.tpu import Masks
from tests.pallas_kernels import interpreters
from tests.pallas_kernels.delta_rule import KINDS, NAMES, TOLERANCES, arrays, assert_close, reference
from tests.pallas_kernels.linear_attention import assert_all_close, of_both_dtypes, steep
from tests.pallas_kernels.recorded import assert_as_recorded


def run(inputs, reset, state, do, d_final, **settings):
    """Outputs and gradients of the kernels."""
    scale = inputs[0].shape[-1] ** -0.5

    @jax.jit
    def both(inputs, state, do, d_final):
        o, final, saved = tpu.forward(scale, *inputs, reset, state, save=True, **settings)
        return o, final, *tpu.backward(scale, *inputs, reset, saved, do, d_final, **settings)

    return both(inputs, state, do, d_final)


CASES = [
    # kind, T, H, K, V, resets, largest beta
    ("none", 37, 2, 64, 128, True, 1.0),
    ("none", 7, 1, 128, 64, False, 2.0),
    ("scalar", 37, 9, 64, 128, True, 2.0),
    ("scalar", 7, 1, 128, 64, False, 1.0),
    ("vector", 37, 9, 64, 128, True, 2.0),
    ("vector", 7, 1, 128, 64, False, 1.0),
]


@pytest.mark.parametrize(("dtype", "case"), of_both_dtypes(CASES, TOLERANCES))
def test_values_and_gradients(case, dtype):
    *sizes, resets, most = case
    inputs, reset, *rest = arrays(*sizes, dtype=dtype, most=most)
    reset = reset if resets else None
    got = run(inputs, reset, *rest, chunk=16, interpret=True)
    assert got[0].dtype == inputs[2].dtype
    assert [x.dtype for x in got[2:6]] == [x.dtype for x in inputs[:4]]
    assert_close(got, reference(inputs, reset, *rest), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("K", "V", "most"), [(256, 128, 1.0), (128, 512, 1.0), (128, 128, 1.0), (128, 128, 2.0), (64, 64, 2.0)]
)
def test_whole_chunks_and_wide_heads(kind, K, V, most):
    inputs, *rest = arrays(kind, 200, 2, K, V, B=1, dtype="bfloat16", most=most)
    assert_close(run(inputs, *rest, interpret=True), reference(inputs, *rest), "bfloat16")


@pytest.mark.slow
def test_the_inverse_of_whole_chunks_in_float32():
    """Reflections of similar keys: entries of powers of A would grow beyond float32's digits."""
    inputs, _, *rest = arrays("none", 200, 2, 64, 64, B=1, most=2.0)
    assert_close(run(inputs, None, *rest, interpret=True), reference(inputs, None, *rest), "float32")


@pytest.mark.parametrize("kind", ["scalar", pytest.param("vector", marks=pytest.mark.slow)])
def test_whole_chunks_of_steep_decays_in_float32(kind):
    inputs, _, *rest = arrays(kind, 128, 2, 64, 64, B=1)
    inputs = steep(inputs)
    assert_close(run(inputs, None, *rest, interpret=True), reference(inputs, None, *rest), "float32")


@pytest.mark.parametrize("kind", ["scalar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "vector"))])
def test_no_races_and_nothing_uninitialised(kind):
    """The grid's parallel axes in random order on two cores, on memory filled with NaN."""
    # Three chunks, as two in random order may be in order; with more than one level beyond a register's rows.
    T, chunk = (72, 32) if kind == "vector" else (40, 16)
    inputs, *rest = arrays(kind, T, 2, 64, 64)
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, *rest, chunk=chunk, interpret=interpreters.TPU))
    assert_close(got, reference(inputs, *rest), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_races_in_whole_chunks(kind):
    """Of bfloat16, with heads in several steps of the grid."""
    inputs, *rest = arrays(kind, 300, 8, 64, 64, B=1, dtype="bfloat16")
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, *rest, interpret=interpreters.TPU))
    assert_close(got, reference(inputs, *rest), "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_no_earlier_bit(kind):
    T, chunk = 40, 32 if kind == "vector" else 16
    inputs, reset, state, *rest = arrays(kind, T, 2, 64, 64, B=1, dtype="bfloat16")
    other = arrays(kind, T, 2, 64, 64, B=1, dtype="bfloat16", seed=1)[0]
    forward = jax.jit(partial(tpu.forward, 64**-0.5, save=False, chunk=chunk, interpret=True))
    o, final, _ = forward(*inputs, reset, state)
    assert_all_close((o, final), reference(inputs, reset, state, *rest)[:2], NAMES[:2], TOLERANCES["bfloat16"])
    for t in (3, 16, 29):
        changed = jax.tree.map(lambda x, y, t=t: jnp.concatenate([x[:, :t], y[:, t:]], axis=1), inputs, other)
        np.testing.assert_array_equal(o[:, :t], forward(*changed, reset, state)[0][:, :t])


def op(form, decay, T=48):
    """Outputs and gradients of the op in a form."""
    q, k, v, beta, g = arrays(decay, T, 4, 64, 64)[0]
    g = g[..., 0] if decay == "scalar" else g
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(5, size=(2, T)), axis=1))

    def loss(q, k, v, beta, g):
        o, state = delta_rule(q, k, v, beta, g, segment_ids=ids, form=form)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state)), o

    return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(q, k, v, beta[..., 0], g)


@pytest.mark.parametrize(
    ("decay", "mesh"),
    [
        ("scalar", None),
        ("scalar", {"data": 2, "tensor": 4}),
        ("scalar", {"data": 2, "tensor": 2, "sequence": 2}),
        pytest.param("vector", {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=["one device", "split rows and heads", "split tokens too", "split decays of channels"],
)
def test_the_op_calls_the_kernel(decay, mesh, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16)
    expected = op("recurrent", decay)
    calls = []
    forward = tpu.forward
    monkeypatch.setattr(tpu, "forward", lambda *args, **rest: calls.append(args[1].shape) or forward(*args, **rest))
    with kernels.interpreted("tpu", "TPU v5 lite"):
        got = op("auto", decay)
        if mesh:
            alone = got
            calls.clear()
            with use_mesh(make_mesh(mesh)):
                got = op("auto", decay)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, alone)
    ways = mesh or {}
    assert set(calls) == {(2 // ways.get("data", 1), 48 // ways.get("sequence", 1), 4 // ways.get("tensor", 1), 64)}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), got, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"decay": "vector"}, None),
        ({"decoupled": True}, "one gate beta, not one to erase and one to write"),
        ({"value_dim": 96}, "K in (64, 128, 256) and V in (64, 128, 256, 512), not K=128, V=96"),
        ({"platform": "gpu", "chip": "NVIDIA H100"}, None),
        ({"platform": "gpu", "chip": "NVIDIA H100", "head_dim": 96}, "K in (64, 128, 256) and V"),
        ({"platform": "gpu", "chip": "NVIDIA A100"}, "made for Hopper"),
    ],
    ids=str,
)
def test_where_the_kernel_joins(change, reason):
    known = {"head_dim": 128, "value_dim": 128, "heads": 4, "decay": "scalar", "platform": "tpu", "chip": "TPU v5 lite"}
    choice = choose("delta_rule", "auto", T=512, dtype=jnp.bfloat16, **known | change)
    assert choice.form == ("kernel" if reason is None else "chunked")
    if reason is not None:
        assert reason in choice.reason
        with pytest.raises(ValueError, match=re.escape(f'form="kernel" of delta_rule cannot run: {choice.reason}')):
            choose("delta_rule", "kernel", T=512, dtype=jnp.bfloat16, **known | change)


@pytest.mark.parametrize(("size", "dtype", "error"), [(128, "float32", 1e-6), (64, "float32", 1e-6), (128, "bfloat16", 4e-3)])
def test_inverses_of_whole_chunks(size, dtype, error):
    rng = np.random.default_rng(0)
    lower = [np.tril(rng.normal(size=(size, size)), -1) / np.sqrt(size) for _ in range(3)]
    found = tpu._inverses([jnp.asarray(A, jnp.float32) for A in lower], Masks(size), jnp.dtype(dtype))
    for X, A in zip(found, lower, strict=True):
        expected = np.linalg.inv(np.eye(size) + A)
        assert np.sqrt(np.mean((X - expected) ** 2) / np.mean(expected**2)) < error
        np.testing.assert_array_equal(np.triu(X), np.eye(size))


CASE = "pallas_kernels.cases:abstract"


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for(chip, kind, direction):
    case = {"op": "delta_rule", "platform": "tpu", "direction": direction, "decay": kind, "T": 1024}
    [kernel] = aot.report(chip, CASE, case)["kernels"]
    assert kernel["name"] == f"delta_rule_{direction}"
    of_it = {"chip": chip, "op": "delta_rule", "direction": direction, "decay": kind}
    assert_as_recorded(kernel, "bench_kernels_delta_rule/kernels.json", **of_it, tokens=2 * 1024 * 8)
    widest = {"K": 256, "V": 512, "H": 4, "dtype": "float32", "resets": True, "T": 256}
    for change in ({"resets": True}, widest, {"K": 64, "V": 256, "H": 9, "T": 256}):
        aot.report(chip, CASE, case | change)
