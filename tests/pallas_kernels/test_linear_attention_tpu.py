"""TPU kernels of linear attention: by the interpreter against the recurrent form, and by the compiler for every chip."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import kernels
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.parallel.context import use_mesh
from jaxlm.parallel.mesh import make_mesh
from pallas_kernels import aot
from pallas_kernels.linear_attention import tpu
from pallas_kernels.tpu import Layout, heads_a_step
from tests.pallas_kernels import interpreters
from tests.pallas_kernels.linear_attention import (
    KINDS,
    NAMES,
    TOLERANCES,
    arrays,
    assert_all_close,
    assert_close,
    of_both_dtypes,
    reference,
    steep,
)
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
    # kind, T, H, K, V, resets
    ("none", 37, 2, 64, 128, True),
    ("none", 7, 1, 128, 64, False),
    ("scalar", 37, 9, 64, 128, True),
    ("scalar", 7, 1, 128, 64, False),
    ("vector", 37, 9, 64, 128, True),
    ("vector", 7, 1, 128, 64, False),
]


@pytest.mark.parametrize(("dtype", "case"), of_both_dtypes(CASES, TOLERANCES))
def test_values_and_gradients(case, dtype):
    *sizes, resets = case
    inputs, reset, *rest = arrays(*sizes, dtype=dtype)
    reset = reset if resets else None
    got = run(inputs, reset, *rest, chunk=16, interpret=True)
    assert got[0].dtype == inputs[2].dtype
    assert [x.dtype for x in got[2:5]] == [x.dtype for x in inputs[:3]]
    assert_close(got, reference(inputs, reset, *rest), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "V"), [(256, 128), (128, 512), (128, 128)])
def test_whole_chunks_and_wide_heads(kind, K, V):
    inputs, *rest = arrays(kind, 200, 4, K, V, B=1, dtype="bfloat16")
    assert_close(run(inputs, *rest, interpret=True), reference(inputs, *rest), "bfloat16")


@pytest.mark.parametrize("kind", ["scalar", pytest.param("vector", marks=pytest.mark.slow)])
def test_whole_chunks_of_steep_decays_in_float32(kind):
    inputs, _, *rest = arrays(kind, 128, 2, 64, 64, B=1)
    inputs = steep(inputs)
    assert_close(run(inputs, None, *rest, interpret=True), reference(inputs, None, *rest), "float32")


@pytest.mark.parametrize("kind", ["none", "scalar", pytest.param("vector", marks=pytest.mark.slow)])
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
    inputs, *rest = arrays(kind, 300, 9, 64, 64, B=1, dtype="bfloat16")
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, *rest, interpret=interpreters.TPU))
    assert_close(got, reference(inputs, *rest), "bfloat16")


@pytest.mark.parametrize("kind", ["none", "scalar", pytest.param("vector", marks=pytest.mark.slow)])
def test_later_tokens_change_no_earlier_bit(kind):
    T, chunk = (140, 128) if kind == "vector" else (40, 16)  # all levels that there are
    inputs, reset, state, *rest = arrays(kind, T, 2, 64, 64, B=1, dtype="bfloat16")
    other = arrays(kind, T, 2, 64, 64, B=1, dtype="bfloat16", seed=1)[0]
    forward = jax.jit(partial(tpu.forward, 64**-0.5, save=False, chunk=chunk, interpret=True))
    o, final, _ = forward(*inputs, reset, state)
    assert_all_close((o, final), reference(inputs, reset, state, *rest)[:2], NAMES[:2], TOLERANCES["bfloat16"])
    for t in (3, 16, 29, *((70, 129) if kind == "vector" else ())):
        changed = jax.tree.map(lambda x, y, t=t: jnp.concatenate([x[:, :t], y[:, t:]], axis=1), inputs, other)
        np.testing.assert_array_equal(o[:, :t], forward(*changed, reset, state)[0][:, :t])


def op(form, *, decay, packed=True, T=48, H=4):
    """Outputs and gradients of the op in a form."""
    q, k, v, g = arrays(decay, T, H, 64, 64, dtype="float32")[0]
    g = None if g is None else g[..., 0] if decay == "scalar" else g
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(5, size=(2, T)), axis=1)) if packed else None

    def loss(q, k, v, g):
        o, state = linear_attention(q, k, v, g, segment_ids=ids, form=form)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state)), o

    arguments = (0, 1, 2) if g is None else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(loss, arguments, has_aux=True))(q, k, v, g)


@pytest.mark.parametrize(
    ("decay", "H", "mesh"),
    [
        ("scalar", 4, None),
        ("scalar", 18, {"data": 2, "tensor": 2, "sequence": 2}),  # 9 a device, which do not pair
        pytest.param("scalar", 4, {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param("vector", 4, {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=["one device", "split tokens too", "split rows and heads", "split decays of channels"],
)
def test_the_op_calls_the_kernel(decay, H, mesh, monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16)
    expected = op("recurrent", decay=decay, H=H)
    calls = []
    forward = tpu.forward
    monkeypatch.setattr(tpu, "forward", lambda *args, **rest: calls.append(args[1].shape) or forward(*args, **rest))
    with kernels.interpreted("tpu", "TPU v5 lite"):
        got = op("auto", decay=decay, H=H)
        if mesh:
            alone = got
            calls.clear()
            with use_mesh(make_mesh(mesh)):
                got = op("auto", decay=decay, H=H)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, alone)
    ways = mesh or {}
    assert set(calls) == {(2 // ways.get("data", 1), 48 // ways.get("sequence", 1), H // ways.get("tensor", 1), 64)}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), got, expected)


@pytest.mark.parametrize(
    ("H", "K", "V", "vector", "steps"),
    [
        (16, 128, 128, False, [8, 8]),
        (9, 128, 128, False, [3] * 3),
        (9, 64, 128, False, [2] * 5),
        (15, 128, 64, False, [8, 8]),
        (7, 64, 256, False, [7]),
        (7, 64, 256, True, [8]),  # all at once need more memory than v4 has
        (3, 64, 256, True, [3]),
        (1, 64, 64, True, [1]),
    ],
)
def test_heads_fill_lanes_with_one_more_where_they_have_to(H, K, V, vector, steps):
    q, v = (jax.ShapeDtypeStruct((1, 128, H, width), jnp.bfloat16) for width in (K, V))
    layout = Layout(q, v, heads_a_step(q, v, 8, vector=vector), 128)
    assert [layout.n] * layout.grid[1] == steps
    assert sum(steps) == layout.H


def test_form_kernel_says_why_not():
    with pytest.raises(ValueError, match='form="kernel" of linear_attention cannot run: no Pallas kernel for cpu'):
        op("kernel", decay="none")


CASE = "pallas_kernels.cases:abstract"


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for(chip, kind, direction):
    case = {"op": "linear_attention", "platform": "tpu", "direction": direction, "decay": kind}
    report = aot.report(chip, CASE, case)
    [kernel] = report["kernels"]
    assert kernel["name"] == f"linear_attention_{direction}"
    of_it = {"chip": chip, "op": "linear_attention", "direction": direction, "decay": kind}
    assert_as_recorded(kernel, "bench_kernels/kernels.json", **of_it, tokens=2 * 4096 * 8)
    widest = {"K": 256, "V": 512, "H": 4, "dtype": "float32", "resets": True, "T": 256}
    narrow = {"K": 64, "V": 64, "H": 9, "resets": True, "T": 256}  # which do not pair
    wider = {"dtype": "float32", "resets": True, "T": 256}
    largest = {"K": 256, "V": 256, "resets": True, "T": 256}
    for change in ({"resets": True}, widest, narrow, wider, largest, {"K": 64, "V": 256, "T": 512}):
        aot.report(chip, CASE, case | change)
