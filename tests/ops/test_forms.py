import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxlm.ops import forms, kernels
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.ops.linear_attention import linear_attention
from pallas_kernels import gpu as hopper
from pallas_kernels import tpu

V5E = {"platform": "tpu", "chip": "TPU v5 lite"}
H100 = {"platform": "gpu", "chip": "NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(
    ("op", "T", "options", "form", "reason"),
    [
        ("dplr_delta_rule", 256, {}, "chunked", "no kernel yet"),
        ("linear_attention", 256, {}, "chunked", "no Pallas kernel for cpu"),
        ("linear_attention", 256, V5E, "kernel", "Pallas"),
        ("linear_attention", 256, V5E | {"head_dim": 96}, "chunked", "K=96"),
        ("linear_attention", 256, V5E | {"value_dim": 32}, "chunked", "V=32"),
        ("linear_attention", 256, V5E | {"dtype": jnp.float16}, "chunked", "float16"),
        ("linear_attention", 256, V5E | {"heads": 9, "head_dim": 64, "value_dim": 64}, "kernel", "Pallas"),
        ("linear_attention", 256, V5E | {"chip": "TPU v3"}, "chunked", "TPU v3"),
        ("linear_attention", 1, {}, "recurrent", "one token"),
        ("attention", 1, {"platform": "gpu", "head_dim": 64}, "recurrent", "one token"),
        ("attention", 256, {"platform": "cpu"}, "chunked", "needs an NVIDIA GPU, this is cpu"),
        ("attention", 256, {"platform": "tpu"}, "chunked", "needs an NVIDIA GPU, this is tpu"),
        ("attention", 256, {"platform": "gpu"}, "kernel", "cuDNN"),
        ("attention", 256, {"platform": "gpu", "dtype": jnp.float32}, "chunked", "float32"),
        ("attention", 256, {"platform": "gpu", "masked": True}, "chunked", "segment ids"),
        ("attention", 256, {"platform": "gpu", "cached": True}, "chunked", "cache"),
        ("attention", 256, {"platform": "gpu", "head_dim": 20}, "chunked", "K=20"),
        ("attention", 256, {"platform": "gpu", "head_dim": 64, "value_dim": 128}, "chunked", "V=128"),
    ],
)
def test_auto(op, T, options, form, reason):
    choice = forms.choose(op, "auto", T=T, **{"dtype": jnp.bfloat16, **options})
    assert choice.form == form
    assert reason in choice.reason
    if form == "chunked":
        with pytest.raises(ValueError, match=re.escape(f'form="kernel" of {op} cannot run: {choice.reason}')):
            forms.choose(op, "kernel", T=T, **{"dtype": jnp.bfloat16, **options})


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_hopper_takes_float32_where_jax_is_told_that_bfloat16_products_do(op):
    known = {"T": 256, "head_dim": 128, "value_dim": 128, "heads": 4, "decay": "scalar"} | H100
    for precision in ("bfloat16", "BF16_BF16_F32", "BF16_BF16_BF16"):
        with jax.default_matmul_precision(precision):
            assert forms.choose(op, "auto", dtype=jnp.float32, **known).form == "kernel"
            assert forms.choose(op, "kernel", dtype=jnp.float32, **known).form == "kernel"
            assert "not float16" in forms.choose(op, "auto", dtype=jnp.float16, **known).reason
    for precision in (None, "default", "tensorfloat32", "float32", "BF16_BF16_F32_X3", "TF32_TF32_F32"):
        with jax.default_matmul_precision(precision):
            choice = forms.choose(op, "auto", dtype=jnp.float32, **known)
            assert choice.form == "chunked"
            assert choice.reason == (
                "the GPU kernel multiplies in bfloat16, too coarse for float32 under "
                f"jax_default_matmul_precision={precision}: "
                'pass bfloat16, or set jax.default_matmul_precision("bfloat16")'
            )
            with pytest.raises(ValueError, match=re.escape(f'form="kernel" of {op} cannot run: {choice.reason}')):
                forms.choose(op, "kernel", dtype=jnp.float32, **known)
            assert forms.choose(op, "auto", dtype=jnp.bfloat16, **known).form == "kernel"


@pytest.mark.parametrize("op", forms.OPS)
def test_a_form_asked_for_is_taken(op):
    for form in set(forms.OPS[op]) - {"kernel"}:
        assert forms.choose(op, form, T=1, dtype=jnp.float32).form == form


def test_errors_name_what_is_there():
    with pytest.raises(ValueError, match="choose one of linear_attention, "):
        forms.choose("convolution", "auto", T=1, dtype=jnp.float32)
    with pytest.raises(ValueError, match="choose auto or one of recurrent, parallel, chunked, kernel"):
        forms.choose("attention", "flash", T=1, dtype=jnp.float32)
    with pytest.raises(ValueError, match="cannot run: no Pallas kernel for cpu"):
        forms.choose("linear_attention", "kernel", T=8, dtype=jnp.float32)


def test_a_kernel_that_does_not_take_a_call_says_so_once(caplog):
    known = {"T": 64, "dtype": jnp.float32, "head_dim": 96, "value_dim": 64, "heads": 2, "decay": "scalar"}
    with kernels.interpreted("tpu", "TPU v5 lite"):
        for _ in range(3):
            assert forms.choose("linear_attention", "auto", **known).form == "chunked"
        forms.choose("linear_attention", "auto", **known | {"head_dim": 64, "T": 1})
    forms.choose("linear_attention", "auto", **known)  # a CPU has no kernel to miss
    assert caplog.messages == [
        "linear_attention runs as chunked, without its kernel: "
        "the TPU kernel has K in (64, 128, 256) and V in (64, 128, 256, 512), not K=96, V=64"
    ]


def anew(monkeypatch, *modules):
    """Modules are imported when they are needed again."""
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)


# By platform: what Pallas has for it, a name that is needed at the import, and one where a kernel is traced.
OF_JAX = {"gpu": (plgpu, "Layout"), "gpu, traced": (plgpu, "wgmma"), "tpu, traced": (pltpu, "CompilerParams")}


@pytest.mark.parametrize("where", OF_JAX)
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "diagonal_recurrence"])
def test_a_jax_without_what_a_kernel_needs_declines(op, where, monkeypatch, caplog):
    folder, platform = op.removesuffix("_recurrence"), where[:3]
    parts = (platform, f"{platform}_channels", f"{folder}.{platform}")
    anew(monkeypatch, *(f"pallas_kernels.{part}" for part in parts))
    module, name = OF_JAX[where]
    monkeypatch.delattr(module, name)
    reason = f"the kernel needs jax >= 0.11.2 and does not import with jax {jax.__version__}: "
    with kernels.interpreted(platform, (H100 if platform == "gpu" else V5E)["chip"]):
        for _ in range(2):
            choice = forms.choose(op, "auto", T=64, dtype=jnp.bfloat16)
            assert choice.form == "chunked"
            assert choice.reason.startswith(reason)
            assert f"has no attribute '{name}'" in choice.reason
        with pytest.raises(ValueError, match=f'form="kernel" of {op} cannot run: {reason}'):
            forms.choose(op, "kernel", T=64, dtype=jnp.bfloat16)
    assert [message.partition(reason)[0] for message in caplog.messages] == [f"{op} runs as chunked, without its kernel: "]


@pytest.mark.parametrize(("alias", "platform"), [("plgpu", hopper), ("pltpu", tpu)], ids=["gpu", "tpu"])
def test_kernels_say_all_that_they_need_of_jax(alias, platform):
    sources = [path.read_text() for path in Path(platform.__file__).parent.rglob("*.py")]
    assert set(platform.NEEDS) == {name for text in sources for name in re.findall(rf"\b{alias}\.(\w+)", text)}


def test_modules_that_jax_lacks_are_its_own(monkeypatch):
    anew(monkeypatch, "pallas_kernels.linear_attention.gpu")
    monkeypatch.delattr(pl, "mosaic_gpu")
    monkeypatch.setitem(sys.modules, plgpu.__name__, None)
    with pytest.raises(kernels.OtherJax, match="mosaic_gpu"):
        kernels.module("linear_attention", "gpu")


def test_names_that_kernels_lack_are_errors(monkeypatch):
    anew(monkeypatch, "pallas_kernels.linear_attention.gpu")
    monkeypatch.delattr(hopper, "declines")
    with pytest.raises(ImportError, match="cannot import name 'declines' from 'pallas_kernels.gpu'") as found:
        forms.choose("linear_attention", "auto", T=64, dtype=jnp.bfloat16, platform="gpu", chip="NVIDIA H100")
    assert not isinstance(found.value, kernels.OtherJax)


def test_kernels_can_be_switched_off():
    known = {"T": 256, "dtype": jnp.bfloat16} | V5E
    with forms.use_kernels(False):
        assert forms.choose("linear_attention", "auto", **known) == forms.Choice("chunked", "kernels are switched off")
        assert forms.choose("linear_attention", "auto", **known | {"T": 1}).form == "recurrent"
        assert forms.choose("linear_attention", "kernel", **known).form == "kernel"  # asked for
    assert forms.choose("linear_attention", "auto", **known).form == "kernel"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("wide", ["gates", "state"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "diagonal_recurrence"])
def test_kernels_decline_float64_of_gates_and_states(op, wide, platform):
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    gate = -jnp.ones((1, 64, 2), jnp.float64 if wide == "gates" else jnp.float32)
    state = jnp.zeros((1, 2, 64, 64), jnp.float64 if wide == "state" else jnp.float32)
    chip = {"gpu": H100, "tpu": V5E}[platform]["chip"]

    def run(form):
        if op == "linear_attention":
            return linear_attention(q, q, q, gate, initial_state=state, form=form)
        if op == "delta_rule":
            return delta_rule(q, q, q, -gate, gate, initial_state=state, form=form)
        return diagonal_recurrence(gate, q[..., 0], initial_state=state[:, :, 0, 0], form=form)

    with kernels.interpreted(platform, chip):
        assert run("auto")[1].dtype == jnp.float64
        with pytest.raises(ValueError, match=r'form="kernel" of .* takes bfloat16 and float32, not float64'):
            run("kernel")
