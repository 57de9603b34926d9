"""The layers of log-linear attention, TTT-Linear, Moneta, Yaad and Memora against their equations in float64.

Decode, packing and causality of whole models are tests/models; the recurrences themselves are tests/ops.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params as params_lib
from jaxlm.layers.mixers import MIXERS
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.log_linear import LogLinearSettings
from jaxlm.layers.mixers.miras import MemoraSettings, MonetaSettings, YaadSettings
from jaxlm.layers.mixers.ttt import TTTLinearSettings
from jaxlm.ops.fast_weights import memora, moneta, ttt_linear, yaad
from jaxlm.ops.log_linear import log_linear_attention
from jaxlm.schema import UserError

WIDTH, DEPTH, T, HEADS, C = 8, 4, 7, 2, 4

CASES = {
    "log_linear": LogLinearSettings(heads=HEADS, max_length=8, convolution=3, chunk_size=4),
    "ttt_linear": TTTLinearSettings(head_dim=4, convolution=3, base_rate=2.0, chunk_size=C),
    "moneta": MonetaSettings(heads=HEADS, expansion=2, gate_rank=3, convolution=3, chunk_size=C),
    "yaad": YaadSettings(heads=HEADS, expansion=2, gate_rank=3, convolution=3, chunk_size=C),
    "memora": MemoraSettings(heads=HEADS, expansion=2, gate_rank=3, convolution=3, chunk_size=C),
}


def make(settings, width=WIDTH, noise=0.3):
    module = MIXERS[settings.kind][1](settings, LayerContext(width, DEPTH, jnp.asarray(1)), rngs=nnx.Rngs(0))
    structure, tree = params_lib.split(module)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: x + noise * rng.normal(size=x.shape).astype(np.float32), tree)
    if "token_rate" in tree and noise:
        tree["token_rate"] -= np.float32(0.5)  # some below -1 / (t + 1)
    return nnx.merge(structure, tree), jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def tokens(seed=0, batch=1):
    return np.random.default_rng(seed).normal(size=(batch, T, WIDTH)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def convolve(x, weight, bias=0.0):
    padded = np.concatenate([np.zeros((len(weight) - 1, x.shape[1])), x])
    return np.array([(padded[t : t + len(weight)] * weight).sum(0) for t in range(len(x))]) + bias


def heads(x):
    return x.reshape(len(x), HEADS, -1)


def rotate(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def layer_norm(x, p, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def batched(op, arrays, **options):
    """The op's definition on one row."""
    arrays = {name: jnp.asarray(x)[None] for name, x in arrays.items()}
    return np.asarray(op(**arrays, **options, form="recurrent")[0][0])


def qkv(p, x):
    silu = lambda y: y * sigmoid(y)  # noqa: E731
    for n in ("q", "k", "v"):
        yield heads(silu(convolve(x @ p["qkv"]["project"][n]["kernel"], p["qkv"]["convolve"][n]["weight"])))


def log_linear(p, x, settings):
    q, k, v = qkv(p, x)
    log_decay = -np.exp(p["a_log"]) * softplus(x @ p["decay"]["kernel"] + p["dt_bias"])
    # Rows of up to 8 tokens: levels 0 to 3.
    scales = softplus(heads(x @ p["level"]["kernel"]).reshape(T, HEADS, 4) + p["level_bias"])
    arrays = {"q": q * q.shape[-1] ** -0.5, "k": k, "v": v, "log_decay": log_decay, "level_scales": scales}
    o = batched(log_linear_attention, arrays)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * p["output"]["norm"]["scale"]
    gate = x @ p["output"]["gate"]["kernel"]
    return o.reshape(T, -1) * gate * sigmoid(gate) @ p["output"]["project"]["kernel"]


def ttt(p, x, settings):
    shared = x @ p["qk"]["kernel"]
    q, k = (rotate(heads(convolve(shared, p[f"{n}_convolution"], p[f"{n}_bias"])), np.arange(T) % C) for n in ("q", "k"))
    rate = 2.0 * sigmoid(x @ p["rate"]["kernel"] + p["rate"]["bias"]) / 4
    scale = np.maximum(0, 1 / np.arange(1, C + 1) + p["token_rate"])
    assert 0 < (scale == 0).sum() < C
    o = batched(
        ttt_linear, {"q": q, "k": k, "v": heads(x @ p["v"]["kernel"]), "rate": rate},
        token_scale=jnp.asarray(scale), weights={"w": jnp.asarray(p["inner_weight"]), "b": jnp.asarray(p["inner_bias"])},
        norm_scale=jnp.asarray(p["inner_norm_scale"]), norm_bias=jnp.asarray(p["inner_norm_bias"]), chunk_size=C,
    )  # fmt: skip
    return layer_norm(o.reshape(T, -1), p["norm"], 1e-6) * gelu(x @ p["gate"]["kernel"]) @ p["output"]["kernel"]


def miras(p, x, settings):
    q, k, v = qkv(p, x)
    q, k = (rotate(y, np.arange(T)) for y in (q, k))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    low_rank = lambda n: x @ p[n]["down"]["kernel"] @ p[n]["up"]["kernel"] + p[f"{n}_bias"]  # noqa: E731
    arrays = {"q": q, "k": k, "v": v, "rate": heads(sigmoid(low_rank("rate")))}
    arrays["log_decay"] = heads(np.log(sigmoid(low_rank("decay"))))
    if settings.kind == "yaad":
        arrays["threshold"] = softplus(x @ p["threshold"]["kernel"] + p["threshold_bias"])
    o = batched(
        {"moneta": moneta, "yaad": yaad, "memora": memora}[settings.kind], arrays,
        weights={"w_in": jnp.asarray(p["inner_in"]), "w_out": jnp.asarray(p["inner_out"])},
        norm_scale=jnp.asarray(p["inner_norm_scale"]), norm_bias=jnp.asarray(p["inner_norm_bias"]), chunk_size=C,
    )  # fmt: skip
    gate = x @ p["gate"]["kernel"]
    return layer_norm(o.reshape(T, -1), p["norm"], 1e-5) * gate * sigmoid(gate) @ p["output"]["kernel"]


ORACLES = {"log_linear": log_linear, "ttt_linear": ttt}


@pytest.mark.parametrize("case", CASES)
def test_equations(case):
    module, p = make(CASES[case])
    x = tokens()
    got, _ = jax.jit(lambda m, x: m(x))(module, x)
    with jax.enable_x64(True):
        wanted = ORACLES.get(case, miras)(p, x[0].astype(np.float64), CASES[case])
    # Inner training multiplies rounding errors.
    np.testing.assert_allclose(got[0], wanted, rtol=0, atol=(1e-5 if case in ORACLES else 1e-3) * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_activations_keep_float32_states(case):
    module, _ = make(CASES[case])
    state = module.init_state(2, T, jnp.bfloat16)
    y, after = jax.eval_shape(lambda m, x, s: m(x, s), module, jnp.asarray(tokens(batch=2), jnp.bfloat16), state)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(lambda s: (s.shape, s.dtype), state)
    inner = after["recurrent"].digits if case == "log_linear" else after["inner"].start
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(inner))


def abstract(settings, width, depth=DEPTH):
    def build(index, key):
        return MIXERS[settings.kind][1](settings, LayerContext(width, depth, index), rngs=nnx.Rngs(key))

    return nnx.eval_shape(lambda: params_lib.stack(build, jnp.arange(depth), jax.random.split(jax.random.key(0), depth)))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # wqk, wv, gate, wo; two convolutions with a bias; rates; inner model and its norm; the norm after it.
        (TTTLinearSettings(), 4 * 128**2 + 2 * 5 * 128 + (128 * 2 + 2) + 16 + 2 * (64 * 64 + 3 * 64) + 2 * 128),
        # q, k, v of half, half and all channels, gate and output; convolutions; decay; 12 levels; the norm.
        (LogLinearSettings(), 4 * 128**2 + 4 * 256 + (128 * 4 + 2 * 4) + (128 + 1) * 4 * 12 + 32),
        # Five projections; convolutions; two low-rank maps with biases; inner network and its norm; the norm after it.
        (MonetaSettings(heads=2), 5 * 128**2 + 4 * 384 + 2 * (2 * 128 * 32 + 128) + 2 * (2 * 64 * 256 + 2 * 64) + 2 * 128),
    ],
)  # fmt: skip
def test_parameter_counts(settings, wanted):
    assert params_lib.count(params_lib.describe(abstract(settings, 128))) == DEPTH * wanted


def test_yaad_adds_a_threshold_a_head():
    counts = {s.kind: params_lib.count(params_lib.describe(abstract(s, 128))) for s in (MemoraSettings(), YaadSettings())}
    assert counts["yaad"] - counts["memora"] == DEPTH * (128 + 1) * 16


def test_layers_start_as_published():
    """Log-linear attention as linear attention on average, TTT with rates 1/(t+1), Miras with slow decays."""
    module, p = make(CASES["log_linear"], noise=0)
    np.testing.assert_allclose(softplus(p["level_bias"]), 1, rtol=1e-6)
    _, p = make(TTTLinearSettings(), width=256, noise=0)
    np.testing.assert_allclose(np.std(p["inner_weight"]), 0.02, rtol=0.05)
    assert not p["inner_bias"].any()
    assert not p["token_rate"].any()
    module, p = make(YaadSettings(heads=2), width=128, noise=0)
    np.testing.assert_allclose(sigmoid(p["rate_bias"]), 0.01, rtol=0.01)
    np.testing.assert_allclose(sigmoid(p["decay_bias"]), 0.9933, rtol=1e-4)
    np.testing.assert_allclose(softplus(p["threshold_bias"]), 8, rtol=1e-5)
    np.testing.assert_allclose([np.std(p["inner_in"]), np.std(p["inner_out"])], [64**-0.5, 256**-0.5], rtol=0.05)
    roles = {info.role for name, info in params_lib.leaves(params_lib.describe(module)) if name.endswith("_bias")}
    assert roles == {"dynamics", "bias"}


@pytest.mark.parametrize("use", [lambda m: m(tokens()), lambda m: m.init_state(1, T, jnp.float32)])
def test_rows_longer_than_the_levels_are_refused(use):
    module, _ = make(LogLinearSettings(heads=HEADS, max_length=6))
    with pytest.raises(UserError, match=r"log_linear.max_length=6 is less than the 7 tokens.*at least 7"):
        use(module)


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="12 is not a power of two; the default is 16"):
        TTTLinearSettings(chunk_size=12)
    with pytest.raises(ValueError, match=r"moneta.q_norm=2.5 .*use 2 or at least 3"):
        MonetaSettings(q_norm=2.5)
    for settings, field in ((TTTLinearSettings(head_dim=3), "ttt_linear"), (YaadSettings(heads=3), "yaad")):
        with pytest.raises(UserError, match=f"{field}: the width.*8 channels do not divide"):
            make(settings)


def test_flops_per_token():
    assert LogLinearSettings(heads=4).sequence_flops(64, 1024) == 2 * 4 * 8 * 16 * (11 + 1)
    assert TTTLinearSettings(head_dim=16).sequence_flops(64, 100) == 4 * 3 * 2 * 16 * 16
    assert YaadSettings(heads=4).sequence_flops(64, 100) == 4 * 14 * 16 * 64


def test_chunk_sizes_of_frozen_gradients_make_models():
    """And those of log-linear attention do not."""
    x, outputs = tokens(), {}
    call = jax.jit(lambda mixer, x: mixer(x)[0])
    for case in ("log_linear", "ttt_linear"):
        p = params_lib.split(make(CASES[case])[0])[1]
        for size in (2, 4):
            structure, own = params_lib.split(make(CASES[case].model_copy(update={"chunk_size": size}))[0])
            p_here = p | {"token_rate": own["token_rate"]} if "token_rate" in own else p
            outputs[case, size] = call(nnx.merge(structure, p_here), x)
    np.testing.assert_allclose(outputs["log_linear", 2], outputs["log_linear", 4], atol=1e-5)
    assert np.abs(outputs["ttt_linear", 2] - outputs["ttt_linear", 4]).max() > 1e-2
    assert math.isfinite(float(np.abs(outputs["ttt_linear", 4]).max()))
