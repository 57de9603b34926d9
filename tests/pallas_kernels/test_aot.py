"""What is read from the TPU compiler's output."""

import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import aot, cases

PROGRAM = """HloModule m

%nested.1 (n.1: f32[40,128]) -> f32[8,128] {
  %n.1 = f32[40,128]{1,0:T(8,128)} parameter(0)
  ROOT %n.2 = f32[8,128]{1,0:T(8,128)} dynamic-slice(%n.1, %c, %c), dynamic_slice_sizes={8,128}
}

%tiled.1 (t.1: f32[40,128]) -> f32[40,128] {
  %t.1 = f32[40,128]{1,0:T(8,128)} parameter(0)
  ROOT %t.2 = f32[40,128]{1,0:T(4,128)} copy(%t.1)
}

%slicing.1 (q.1: f32[40,128], q.2: f32[8,128]) -> f32[8,128] {
  %q.1 = f32[40,128]{1,0:T(8,128)} parameter(0)
  %q.2 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %q.0 = f32[40,128]{1,0:T(4,128)} fusion(%q.1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiled.1
  %q.3 = f32[8,128]{1,0:T(8,128)} fusion(%q.0), kind=kLoop, calls=%nested.1
  ROOT %q.4 = f32[8,128]{1,0:T(8,128)} add(%q.2, %q.3)
}

%updating.1 (u.1: f32[40,128], u.2: f32[8,128]) -> f32[40,128] {
  %u.1 = f32[40,128]{1,0:T(8,128)} parameter(0)
  %u.2 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %u.4 = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%u.2)
  ROOT %u.3 = f32[40,128]{1,0:T(8,128)} dynamic-update-slice(%u.1, %u.4, %c, %c)
}

%body.1 (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %y.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x.1), kind=kLoop, calls=%f
  %z.1 = f32[8,128]{1,0:T(8,128)} fusion(%y.1), kind=kLoop, calls=%f
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i.1, %z.1)
}

%condition.1 (p.2: (s32[], f32[8,128])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %c.2 = s32[]{:T(128)} constant(5)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %c.2), direction=LT
}

ENTRY %main.1 (a.1: bf16[4,2]) -> f32[8,128] {
  %a.1 = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = f32[8,128]{1,0:T(8,128)} fusion(%a.1), kind=kLoop, calls=%f
  %s.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%c.1, %b.1)
  %w.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%s.1), condition=%condition.1, body=%body.1
  %r.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w.1), index=1
  %k.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%r.1)
  %d.1 = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%k.1)
  %s.1 = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) call-start(%r.1)
  %s.2 = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) call-update(%s.1)
  %g.1 = f32[40,128]{1,0:T(8,128)} broadcast(%c.1), dimensions={}
  %h.1 = f32[8,128]{1,0:T(8,128)} fusion(%g.1, %r.1), kind=kLoop, calls=%slicing.1
  %e.1 = f32[40,128]{1,0:T(8,128)} fusion(%g.1, %h.1), kind=kLoop, calls=%updating.1
  ROOT %o.1 = f32[40,128]{1,0:T(8,128)} dynamic-update-slice(%e.1, %h.1, %c.1, %c.1)
}
"""


def test_bytes_of_a_program_count_loops_and_padding_but_not_the_chips_own_memory():
    tile = 8 * 128 * 4
    entry = tile // 2 + tile  # a is padded to a tile of bfloat16
    loop = 5 * 2 * tile  # x read and z written; y stays on the chip
    copy = tile
    call = 2 * tile
    broadcast = 5 * tile
    slicing = 3 * tile  # a slice of g, r, and the result
    updating = 2 * tile  # h, and where it goes
    assert aot.hbm_bytes(PROGRAM) == entry + loop + copy + call + broadcast + slicing + updating + 2 * tile


def test_kernels_of_a_program_are_found_inside_its_calls():
    def double(x):
        kernel = pl.pallas_call(
            lambda x, o: o.__setitem__(..., 2 * x[...]), grid=(3,), name="double",
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))], out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
        )  # fmt: skip
        return jax.jit(kernel)(x)

    jaxpr = jax.make_jaxpr(double)(jnp.zeros((24, 128)))
    assert list(aot.pallas_calls(jaxpr.jaxpr)) == [("double", [3], 2 * 24 * 128 * 4)]


def test_shared_memory_of_gpu_kernels_is_counted():
    function, arguments = cases.abstract("delta_rule", "forward", "scalar", "gpu", B=1, T=128, H=1)
    tile = 64 * 64 * 2
    tokens, state, found = 2 * tile, 4 * tile, {}
    for name, shared, operands in aot.gpu_calls(jax.make_jaxpr(function)(*arguments).jaxpr):
        found[name] = operands
        # Inverses: a chunk's keys, A, R and two times 16 of 64 columns, beta, decays twice, and a barrier.
        # Forward, value tiles in blocks of their own: keys, R and gates of three chunks; queries, values, states and r, as it
        # is used and as it is saved, of two; an output; twelve barriers.
        chunks, turns = 3 * (tokens + tile + 3 * 256), 2 * (2 * tokens + 3 * tile)
        expected = {"inverses": tokens + 2 * tile + tile // 2 + 3 * 256 + 8, "forward": chunks + turns + tile + 12 * 8}
        assert shared == expected[name.removeprefix("delta_rule_")]
    gates = 2 * 128 * 4
    inputs, saved = 3 * 2 * tokens + 2 * tile, 2 * state + 2 * tokens
    assert found["delta_rule_inverses"] == 2 * tokens + gates + 2 * tile
    assert found["delta_rule_forward"] == inputs + gates + 2 * 2 * state + 2 * tokens + saved


def test_kernels_of_one_name_are_refused(monkeypatch):
    """What the assembler says of one would count for both."""
    kernels = [{"name": name} for name in ("walk", "other", "walk")]
    said = "Compiling entry function '{}_mosaic_gpu_kernel'\n{} bytes stack frame, {} bytes spill stores\nUsed 99 registers\n"
    text = "".join(said.format(name, spill, spill) for name, spill in (("walk", 8), ("other", 16), ("walk", 0)))
    done = subprocess.CompletedProcess([], 0, json.dumps({"kernels": kernels}), text)
    monkeypatch.setattr(aot.subprocess, "run", lambda *args, **rest: done)
    with pytest.raises(RuntimeError, match="module:case: kernels of one name, give each its own: other, walk, walk"):
        aot.report("h100", "module:case", {})
    done.stdout = json.dumps({"kernels": kernels[:2]})
    done.stderr = text[: text.rindex("Compiling")]
    assert [kernel["spill_bytes"] for kernel in aot.report("h100", "module:case", {})["kernels"]] == [8, 16]


def test_least_bytes_and_flops_are_those_of_the_formulas():
    shape = cases.Shape(B=1, T=1, H=1, K=128, V=128)
    assert cases.least_bytes("linear_attention", "forward", "scalar", shape) == 1028
    assert cases.least_bytes("linear_attention", "forward", "vector", shape) == 1536
    assert cases.flops("linear_attention", "forward", shape, 64) == 98_304
    assert cases.flops("linear_attention", "backward", shape, 64) == 245_760
    assert cases.flops("delta_rule", "forward", shape, 64) == 98_304 + 81_920 + 2730


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"does not compile for v5e(.|\n)*f16"):
        case = {"op": "linear_attention", "platform": "tpu", "direction": "forward", "decay": "none", "T": 128}
        aot.report("v5e", "pallas_kernels.cases:abstract", case | {"dtype": "float16"})


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize(
    ("direction", "change"),
    [
        ("forward", {"save": False}),
        # An odd number of heads, all in one step, that take most of the memory; rows too many for the compiler to keep there.
        ("backward", {"H": 3, "K": 64, "V": 256, "B": 64, "T": 1024}),
    ],
    ids=["of inference", "of heads that do not pair"],
)
def test_compiles_for_v5e(op, direction, change):
    case = {"op": op, "platform": "tpu", "direction": direction, "decay": "vector", "T": 256} | change
    [kernel] = aot.report("v5e", "pallas_kernels.cases:abstract", case, schedules=False)["kernels"]
    assert kernel["name"] == f"{op}_{direction}"
