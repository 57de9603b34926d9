"""GPU kernels of the delta rule: by the interpreter with its race detection, by the compiler for Hopper, and on a GPU."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.forms import choose
from pallas_kernels import aot
from pallas_kernels import gpu as hopper
from pallas_kernels.delta_rule import gpu
from tests.pallas_kernels import interpreters, linear_attention
from tests.pallas_kernels.delta_rule import KINDS, NAMES, TOLERANCES, arrays, assert_close, reference
from tests.pallas_kernels.linear_attention import assert_all_close, assert_joins_in_float32, assert_rounded


def run(inputs, reset, state, do, d_final, interpret):
    """Outputs and gradients of the kernels."""
    scale = inputs[0].shape[-1] ** -0.5

    @jax.jit
    def both(inputs, state, do, d_final):
        o, final, saved = gpu.forward(scale, *inputs, reset, state, save=True, interpret=interpret)
        return o, final, *gpu.backward(scale, *inputs, reset, saved, do, d_final, interpret=interpret)

    return both(inputs, state, do, d_final)


def mild(inputs):
    """With decays and betas that leave something of a state after hundreds of tokens."""
    q, k, v, beta, g = linear_attention.mild(inputs)
    return q, k, v, beta / 8, g


# With beta up to 2 what is written is large beside the state that it sums to, and it is rounded to bfloat16; the sum of two
# numbers would cost the forward more than it is ahead of others (docs/kernels.md). With decays of channels it is one.
REFLECTIONS = {"final state": 0.0065}

CASES = [
    # kind, T, H, K, V, resets, largest beta, value channels in blocks of their own
    ("scalar", 300, 1, 64, 128, True, 1.0, False),
    ("scalar", 130, 2, 128, 64, False, 2.0, False),
    ("scalar", 200, 1, 64, 128, False, 2.0, True),
    ("none", 130, 2, 64, 64, True, 2.0, False),
    ("vector", 130, 1, 64, 128, True, 1.0, False),
    ("vector", 130, 1, 128, 64, False, 2.0, False),
]
MORE = [
    ("scalar", 130, 1, 256, 256, True, 1.0, False),
    ("vector", 130, 1, 256, 256, True, 1.0, False),
    ("none", 200, 1, 256, 512, False, 1.0, False),
    ("none", 1, 1, 128, 128, False, 1.0, True),
    ("none", 260, 2, 64, 128, True, 2.0, False),
    ("scalar", 64, 2, 128, 128, True, 1.0, True),
    ("scalar", 500, 1, 128, 128, True, 1.0, False),
    ("vector", 260, 1, 128, 128, True, 1.0, True),
    ("vector", 1, 2, 64, 64, False, 1.0, False),
    ("none", 300, 2, 64, 64, True, 1.0, False),
    ("vector", 300, 1, 64, 256, True, 1.0, False),
    ("scalar", 130, 1, 256, 64, False, 1.0, False),
    ("scalar", 128, 1, 256, 64, False, 2.0, False),
    ("none", 128, 1, 256, 64, True, 2.0, False),
    ("none", 64, 1, 256, 64, True, 1.0, False),
]

LARGE = [  # many heads, and segments of time
    ("scalar", 300, 70, 128, 128, True, 1.0, None),
    ("scalar", 1700, 1, 128, 128, True, 1.0, None),
    ("none", 2500, 2, 128, 64, False, 1.0, None),
    ("vector", 1700, 1, 128, 128, True, 1.0, None),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_values_gradients_and_no_races(case, monkeypatch):
    *sizes, resets, most, split = case
    inputs, reset, *rest = arrays(*sizes, B=1, dtype="bfloat16", most=most)
    # A chip of too many or too few multiprocessors for one block of value channels.
    monkeypatch.setattr(hopper, "SMS", 132 if split else 1)
    reset = reset if resets else None
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, reset, *rest, interpret=interpreters.GPU))
    assert got[0].dtype == inputs[2].dtype
    assert [x.dtype for x in got[2:6]] == [x.dtype for x in inputs[:4]]
    others = REFLECTIONS if most > 1 and sizes[0] != "vector" else {}
    assert_close(got, reference(inputs, reset, *rest), "bfloat16", **others)


@pytest.mark.parametrize(
    "case",
    [
        ("scalar", 64, 128, True),
        ("vector", 128, 64, False),
        pytest.param(("none", 64, 64, False), marks=pytest.mark.slow),
        pytest.param(("none", 64, 128, True), marks=pytest.mark.slow),
        pytest.param(("scalar", 64, 128, False), marks=pytest.mark.slow),
        pytest.param(("scalar", 256, 64, False), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_segments_of_time(case, monkeypatch):
    """Three of two, two and one chunks; decays and betas that leave something of a state, documents that end in them."""
    kind, K, V, resets = case
    inputs, reset, *rest = arrays(kind, 300, 1, K, V, B=1, dtype="bfloat16")
    inputs = mild(inputs)
    monkeypatch.setattr(hopper, "SMS", 4 * V // 64)
    monkeypatch.setattr(gpu, "FEWEST", 1)
    assert gpu._segments(1, V, 5) == 3
    assert gpu._segments(2, V, 5) == 1  # two would gain nothing
    reset = reset if resets else None
    with interpreters.no_races(kernels=2):
        got = jax.block_until_ready(run(inputs, reset, *rest, interpret=interpreters.GPU))
    assert_close(got, reference(inputs, reset, *rest), "bfloat16")


@interpreters.INTERPRETER_AND_GPU
@pytest.mark.parametrize("kind", ["scalar", pytest.param("vector", marks=pytest.mark.slow)])
def test_gradients_of_small_losses(kind, interpret):
    """Cotangents by 2^-40 give gradients by 2^-40: none goes through float16, as what the forward makes does."""
    inputs, _, state, do, d_final = arrays(kind, 70, 1, 64, 64, B=1, dtype="bfloat16")
    inputs = mild(inputs)
    gradients = run(inputs, None, state, do, d_final, interpret=interpret)[2:]
    small = run(inputs, None, state, do * 2.0**-40, d_final * 2.0**-40, interpret=interpret)[2:]
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(small), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y * 2.0**40))
        assert np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)) < 1e-4  # not 0: a GPU has no numbers below 2^-126


@interpreters.INTERPRETER_AND_GPU
@pytest.mark.parametrize("kind", ["scalar", "vector", pytest.param("none", marks=pytest.mark.slow)])
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
    (q, k, v, beta, g), *_ = arrays(kind, T, H, 64, 64, B=2, dtype="bfloat16")
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(4, size=(2, T)), axis=1))
    calls = []
    forward = gpu.forward
    monkeypatch.setattr(gpu, "forward", lambda *args, **rest: calls.append(args[1].shape) or forward(*args, **rest))

    def loss(form, dtype=jnp.bfloat16):
        def of(q, k, v, beta, g):
            o, state = delta_rule(q, k, v, beta[..., 0], g if kind == "vector" else g[..., 0], segment_ids=ids, form=form)
            return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(state)), (o, state)

        low = [x.astype(dtype) for x in (q, k, v)]
        (_, out), gradients = jax.jit(jax.value_and_grad(of, range(5), has_aux=True))(*low, beta, g)
        return *out, *gradients

    expected = loss("recurrent", jnp.float32)
    if mesh:
        with interpreters.hopper(interpret):
            alone = loss("auto")
        calls.clear()
    with interpreters.hopper(interpret, mesh):
        assert choose("delta_rule", "auto", T=T, dtype=jnp.bfloat16).form == "kernel"
        got = loss("auto")
    if mesh:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, alone)
    devices = 8 if mesh else 1 if interpret else jax.device_count()
    assert len(calls) == 1
    assert calls[0][1::2] == (T, 64)
    assert calls[0][0] * calls[0][2] * devices == 2 * H
    assert_all_close(got, expected, NAMES[:-1], TOLERANCES["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_others_are_rounded_to_bfloat16(kind):
    (q, k, v, *gates), reset, state, do, d_final = arrays(kind, 70, 1, 64, 64, B=1)
    if kind != "scalar":
        q = q.astype(jnp.bfloat16)
    assert_rounded(partial(run, interpret=True), (q, k, v, *gates), reset, state, do, d_final)


@interpreters.INTERPRETER_AND_GPU
def test_float32_through_the_op(interpret, monkeypatch):
    inputs, *_ = arrays("scalar", 130, 1, 64, 64, B=1)
    assert_joins_in_float32(delta_rule, gpu, inputs, NAMES[:-1], TOLERANCES["bfloat16"], monkeypatch, interpret=interpret)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the wheels of jax-cuda13-plugin and jax-cuda13-pjrt"
)
# Bytes a thread that registers are short of, at most: the compiler's today and a tenth.
SPILLS = {"delta_rule_backward": 9, "delta_rule_channels_backward": 225}
SPILLS_OF_256 = {
    "delta_rule_backward": 9, "delta_rule_channels_scores": 53, "delta_rule_channels_forward": 506,
    "delta_rule_channels_backward_added": 9, "delta_rule_channels_backward_states": 180, "delta_rule_channels_backward": 300,
}  # fmt: skip


@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_hopper(kind, direction):
    case = {"op": "delta_rule", "platform": "gpu", "direction": direction, "decay": kind, "B": 16, "T": 2048, "H": 16}
    names = {"forward": ["forward", "inverses"], "backward": ["backward", "backward_states"]}[direction]
    if kind == "vector":
        names = {"forward": ["forward", "scores"], "backward": ["backward", "backward_states"]}[direction]
        names = [f"channels_{name}" for name in names] + ["inverses"] * (direction == "forward")
    # With one row and few heads value channels have blocks of their own, and time has segments.
    large = ({"K": 256, "V": 512}, {"K": 256, "resets": True}, {"B": 1, "H": 2, "K": 256})
    for change in ({}, {"resets": True}, {"K": 64}, {"V": 64}, {"B": 1, "H": 2}, *large):
        found = aot.report("h100", "pallas_kernels.cases:abstract", case | change)["kernels"]
        several = ["maps" if direction == "forward" else "backward_added"] if "B" in change else []
        several = [f"channels_{name}" if kind == "vector" else name for name in several]
        assert sorted(kernel["name"] for kernel in found) == sorted(f"delta_rule_{name}" for name in names + several)
        for kernel in found:
            assert kernel["smem_bytes"] <= 227 * 1024
            limit = (SPILLS_OF_256 if change in large else SPILLS).get(kernel["name"], 0)
            assert kernel["spill_bytes"] <= limit, (change, kernel)


@pytest.mark.aot
@needs_compiler
def test_the_forward_of_inference_compiles_for_hopper():
    case = {"op": "delta_rule", "platform": "gpu", "direction": "forward", "decay": "scalar", "B": 16, "T": 2048, "H": 16}
    found = aot.report("h100", "pallas_kernels.cases:abstract", case | {"save": False})["kernels"]
    assert sorted(kernel["name"] for kernel in found) == ["delta_rule_forward", "delta_rule_inverses"]
    assert all(kernel["spill_bytes"] <= 8 for kernel in found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *MORE, *LARGE], ids=str)
def test_on_the_device(case):
    *sizes, resets, most, _ = case
    inputs, reset, *rest = arrays(*sizes, dtype="bfloat16", most=most)
    if sizes[1] > 1000:
        inputs = mild(inputs)
        reset = reset & (jnp.arange(reset.shape[1]) % 64 == 5)  # documents of a thousand tokens
    reset = reset if resets else None
    got = run(inputs, reset, *rest, interpret=False)
    others = REFLECTIONS if most > 1 and sizes[0] != "vector" else {}
    assert_close(got, reference(inputs, reset, *rest), "bfloat16", **others)
    again = run(inputs, reset, *rest, interpret=False)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_float32_on_the_device():
    assert_rounded(partial(run, interpret=False), *arrays("scalar", 300, 2, 128, 128))
