import jax.numpy as jnp
import pytest

from jaxlm.ops import forms, kernels

V5E = {"platform": "tpu", "chip": "TPU v5 lite"}


@pytest.mark.parametrize(
    ("op", "T", "options", "form", "reason"),
    [
        ("dplr_delta_rule", 256, {}, "chunked", "no kernel yet"),
        ("linear_attention", 256, {}, "chunked", "no Pallas kernel for cpu"),
        ("linear_attention", 256, V5E, "kernel", "Pallas"),
        ("linear_attention", 256, V5E | {"head_dim": 96}, "chunked", "K=96"),
        ("linear_attention", 256, V5E | {"value_dim": 32}, "chunked", "V=32"),
        ("linear_attention", 256, V5E | {"dtype": jnp.float16}, "chunked", "float16"),
        ("linear_attention", 256, V5E | {"heads": 9, "head_dim": 64, "value_dim": 64}, "chunked", "H=9"),
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


def test_kernels_can_be_switched_off():
    known = {"T": 256, "dtype": jnp.bfloat16} | V5E
    with forms.use_kernels(False):
        assert forms.choose("linear_attention", "auto", **known) == forms.Choice("chunked", "kernels are switched off")
        assert forms.choose("linear_attention", "auto", **known | {"T": 1}).form == "recurrent"
        assert forms.choose("linear_attention", "kernel", **known).form == "kernel"  # asked for
    assert forms.choose("linear_attention", "auto", **known).form == "kernel"
