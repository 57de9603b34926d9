"""GPU kernels of linear attention: by the interpreter with its race detection, by the compiler for Hopper, and on a GPU."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.forms import choose
from jaxlm.ops.linear_attention import linear_attention
from pallas_kernels import aot
from pallas_kernels import gpu as hopper
from pallas_kernels.linear_attention import gpu
from tests.pallas_kernels import interpreters
from tests.pallas_kernels.linear_attention import (
    KINDS,
    NAMES,
    TOLERANCES,
    arrays,
    assert_all_close,
    assert_close,
    assert_joins_in_float32,
    assert_rounded,
    mild,
    reference,
)


def run(inputs, reset, state, do, d_final, interpret):
    """Outputs and gradients of the kernels."""
    scale = inputs[0].shape[-1] ** -0.5

    @jax.jit
    def both(inputs, state, do, d_final):
        o, final, saved = gpu.forward(scale, *inputs, reset, state, save=True, interpret=interpret)
        return o, final, *gpu.backward(scale, *inputs, reset, saved, do, d_final, interpret=interpret)

    return both(inputs, state, do, d_final)


CASES = [
    # kind, T, H, K, V, resets, segments of time (0: blocks so many that each has two warpgroups)
    ("scalar", 300, 1, 64, 128, True, 1),
    ("scalar", 300, 1, 128, 64, False, 3),
    ("none", 130, 2, 64, 64, True, 1),
    ("vector", 130, 1, 64, 128, True, 1),
    ("vector", 400, 1, 64, 64, False, 4),
    ("scalar", 200, 1, 64, 128, True, 0),
    ("vector", 200, 1, 64, 128, True, 0),
]
MORE = [
    ("scalar", 130, 1, 256, 256, True, 1),
    ("vector", 130, 1, 256, 256, True, 1),
    ("none", 130, 1, 128, 512, False, 1),
    ("vector", 300, 1, 128, 128, True, 3),
    ("vector", 65, 2, 128, 64, False, 1),
    ("scalar", 600, 1, 128, 128, True, 3),
    ("scalar", 64, 3, 128, 128, True, 1),
    ("none", 1, 2, 128, 128, False, 1),
    ("none", 260, 2, 128, 128, False, 1),
    ("none", 500, 1, 64, 64, False, 4),
    ("scalar", 250, 1, 64, 64, True, 2),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_values_gradients_and_no_races(case, monkeypatch):
    *sizes, resets, segments = case
    inputs, reset, *rest = arrays(*sizes, B=1, dtype="bfloat16")
    if segments > 1:  # decays that leave something of a state after a segment
        inputs = mild(inputs)
    # Documents start at the first token, or later ones only and the initial state enters the first.
    reset = reset.at[0, 0].set(sizes[1] == 130)
    # A chip of as many multiprocessors as make that many segments.
    monkeypatch.setattr(hopper, "SMS", max(1, segments * sizes[2] * (sizes[4] // hopper.C)))
    segments = max(1, segments)
    monkeypatch.setattr(gpu, "FEWEST", 1)
    found, count = [], gpu._segments
    monkeypatch.setattr(gpu, "_segments", lambda *args, **rest: found.append(count(*args, **rest)) or found[-1])
    reset = reset if resets else None
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, reset, *rest, interpret=interpreters.GPU))
    assert found == [segments, 1 if segments == 2 else segments]  # of two the first walk in reverse would be as long
    assert got[0].dtype == inputs[2].dtype
    assert [x.dtype for x in got[2:5]] == [x.dtype for x in inputs[:3]]
    assert_close(got, reference(inputs, reset, *rest), "bfloat16")


def test_two_segments_of_time_are_walked_only_where_the_first_walk_is_cheap():
    for walks, most in ((16, 4), (32, 2), (64, 1)):
        assert gpu._segments(walks, 128, 128, cheaply=True) == most
        assert gpu._segments(walks, 128, 128, cheaply=False) == (1 if most == 2 else most)
    assert gpu._segments(1, 128, 4 * gpu.FEWEST, cheaply=False) == 4


@interpreters.INTERPRETER_AND_GPU
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_no_earlier_bit(kind, interpret):
    inputs, reset, state, *_ = arrays(kind, 150, 1, 64, 64, B=1, dtype="bfloat16")
    other = arrays(kind, 150, 1, 64, 64, B=1, dtype="bfloat16", seed=1)[0]
    forward = jax.jit(partial(gpu.forward, 0.125, save=False, interpret=interpret))
    o = forward(*inputs, reset, state)[0]
    for t in (3, 64, 100):
        changed = jax.tree.map(lambda x, y, t=t: jnp.concatenate([x[:, :t], y[:, t:]], axis=1), inputs, other)
        np.testing.assert_array_equal(o[:, :t], forward(*changed, reset, state)[0][:, :t])


@interpreters.ONE_AND_SEVERAL
def test_the_op_calls_the_kernel(kind, T, H, mesh, interpret, monkeypatch):
    if mesh:
        interpreters.let_gpus_differ(monkeypatch)
    (q, k, v, g), *_ = arrays(kind, T, H, 64, 64, B=2, dtype="bfloat16")
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(4, size=(2, T)), axis=1))
    calls = []
    forward = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda *args, **rest: calls.append(args[1].shape) or forward(*args, **rest))

    def loss(form, dtype=jnp.bfloat16):
        def of(q, k, v, g):
            o, state = linear_attention(q, k, v, g if kind == "vector" else g[..., 0], segment_ids=ids, form=form)
            return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(state)), (o, state)

        low = [x.astype(dtype) for x in (q, k, v)]
        (_, out), gradients = jax.jit(jax.value_and_grad(of, range(4), has_aux=True))(*low, g)
        return *out, *gradients

    expected = loss("recurrent", jnp.float32)
    if mesh:
        with interpreters.hopper(interpret):
            alone = loss("auto")
        calls.clear()
    with interpreters.hopper(interpret, mesh):
        got = loss("auto")
    devices = 8 if mesh else 1 if interpret else jax.device_count()
    assert len(calls) == 1
    assert calls[0][1::2] == (T, 64)
    assert calls[0][0] * calls[0][2] * devices == 2 * H
    names = NAMES[:-1]
    assert_all_close(got, expected, names, TOLERANCES["bfloat16"])
    if mesh:
        # Sums of decays that XLA makes can differ in their last digit, and with them that of bfloat16 numbers.
        assert_all_close(got, alone, names, dict.fromkeys(names, 0.001))


@pytest.mark.parametrize("kind", ["scalar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "vector"))])
def test_others_are_rounded_to_bfloat16(kind):
    (q, k, v, *gates), reset, state, do, d_final = arrays(kind, 70, 1, 64, 64, B=1)
    if kind != "scalar":
        q = q.astype(jnp.bfloat16)
    assert_rounded(partial(run, interpret=True), (q, k, v, *gates), reset, state, do, d_final)


@interpreters.INTERPRETER_AND_GPU
def test_float32_through_the_op(interpret, monkeypatch):
    inputs, *_ = arrays("scalar", 130, 1, 64, 64, B=1)
    assert_joins_in_float32(linear_attention, gpu, inputs, NAMES[:-1], TOLERANCES["bfloat16"], monkeypatch, interpret=interpret)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"chip": "NVIDIA GH200 480GB"}, None),
        ({"chip": "NVIDIA A100-SXM4-40GB"}, "made for Hopper (H100, H200, GH200, H800, H20), not for NVIDIA A100-SXM4-40GB"),
        ({"chip": "NVIDIA GB200"}, "made for Hopper"),
        ({"decay": "vector"}, None),
        ({"head_dim": 96}, "K in (64, 128, 256) and V in (64, 128, 256, 512), not K=96, V=64"),
        ({"dtype": jnp.float16}, "takes bfloat16 and float32, not float16"),
    ],
    ids=str,
)
def test_where_the_kernel_joins(change, reason):
    known = {"head_dim": 64, "value_dim": 64, "heads": 4, "decay": "scalar", "dtype": jnp.bfloat16, "T": 512}
    known |= {"chip": "NVIDIA H100 80GB HBM3"} | change
    choice = choose("linear_attention", "auto", platform="gpu", **known)
    assert choice.form == ("kernel" if reason is None else "chunked")
    if reason is not None:
        assert reason in choice.reason
        with pytest.raises(ValueError, match=re.escape(f'form="kernel" of linear_attention cannot run: {choice.reason}')):
            choose("linear_attention", "kernel", platform="gpu", **known)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the wheels of jax-cuda13-plugin and jax-cuda13-pjrt"
)


@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_hopper(kind, direction):
    case = {"op": "linear_attention", "platform": "gpu", "direction": direction, "decay": kind, "B": 16, "T": 2048, "H": 16}
    names = {"forward": ["forward"], "backward": ["backward", "backward_states"]}[direction]
    # Bytes a thread that registers are short of, at most: the compiler's today and a tenth.
    spills = {
        "linear_attention_backward": 44, "linear_attention_channels_scores": 53, "linear_attention_channels_backward": 141,
    }  # fmt: skip
    spills_of_256 = {
        "linear_attention_backward": 44, "linear_attention_channels_scores": 273, "linear_attention_channels_backward": 154,
    }  # fmt: skip
    if kind == "vector":
        names = [f"channels_{name}" for name in (*names, *(["scores"] if direction == "forward" else []))]
    large = ({"K": 256, "V": 512}, {"K": 256, "resets": True})
    first = {"forward": "states", "backward": "backward_added"}[direction]  # a walk of segments of time
    first = f"channels_{first}" if kind == "vector" else first
    for change in ({}, {"resets": True}, {"K": 64}, {"V": 64}, {"B": 1, "H": 2}, *large):
        found = aot.report("h100", "pallas_kernels.cases:abstract", case | change)["kernels"]
        expected = [*names, *([first] if "B" in change else [])]
        assert sorted(kernel["name"] for kernel in found) == sorted(f"linear_attention_{name}" for name in expected)
        for kernel in found:
            assert kernel["smem_bytes"] <= 227 * 1024
            limit = (spills_of_256 if change in large else spills).get(kernel["name"], 0)
            assert kernel["spill_bytes"] <= (limit if change or kind == "vector" else 0), (change, kernel)


@pytest.mark.aot
@needs_compiler
def test_the_forward_of_inference_compiles_for_hopper():
    case = {"op": "linear_attention", "platform": "gpu", "direction": "forward", "decay": "scalar", "B": 16, "T": 2048, "H": 16}
    found = aot.report("h100", "pallas_kernels.cases:abstract", case | {"save": False})["kernels"]
    assert sorted(kernel["name"] for kernel in found) == ["linear_attention_forward"]
    assert not any(kernel["spill_bytes"] for kernel in found)


LARGE = [  # many heads, and mild decays over segments of time: of two in the forward alone, and of more
    ("scalar", 300, 70, 128, 128, True, None),
    ("vector", 300, 70, 128, 128, True, None),
    ("scalar", 1100, 1, 128, 128, True, "mild"),
    ("scalar", 2300, 2, 128, 128, True, "mild"),
    ("none", 2500, 2, 128, 64, False, "mild"),
    ("vector", 1700, 1, 128, 128, True, "mild"),
    ("vector", 2100, 2, 256, 64, False, "mild"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *MORE, *LARGE], ids=str)
def test_on_the_device(case):
    *sizes, resets, decays = case
    inputs, reset, *rest = arrays(*sizes, dtype="bfloat16")
    if decays == "mild":
        inputs = mild(inputs)
        reset = reset & (jnp.arange(reset.shape[1]) % 64 == 5)  # documents of a thousand tokens
    reset = reset if resets else None
    got = run(inputs, reset, *rest, interpret=False)
    assert_close(got, reference(inputs, reset, *rest), "bfloat16")
    again = run(inputs, reset, *rest, interpret=False)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_float32_on_the_device():
    assert_rounded(partial(run, interpret=False), *arrays("scalar", 256, 2, 256, 256))
