"""Mixers on linear attention and the delta rules: their equations token by token, initial values, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params as params_lib
from jaxlm.layers.ffn import FFNS
from jaxlm.layers.mixers import MIXERS
from jaxlm.layers.mixers.attention import AttentionSettings
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.delta import DeltaNetSettings, GatedDeltaNetSettings, KDASettings
from jaxlm.layers.mixers.gla import GLASettings
from jaxlm.layers.mixers.hgrn import forget_gate
from jaxlm.layers.mixers.hgrn2 import HGRN2Settings
from jaxlm.layers.mixers.lightnet import LightNetSettings
from jaxlm.layers.mixers.linear import LinearSettings
from jaxlm.layers.mixers.log_linear import LogLinearSettings
from jaxlm.layers.mixers.mamba2 import Mamba2Settings
from jaxlm.layers.mixers.mom import MoMSettings
from jaxlm.layers.mixers.retention import RetentionSettings, head_log_decay
from jaxlm.layers.mixers.rwkv7 import RWKV7Settings, RWKVChannelMixingSettings
from jaxlm.models.language_model import ModelSettings, abstract_model
from jaxlm.ops.forms import OPS
from jaxlm.ops.logsumexp import running_logsumexp
from jaxlm.schema import UserError

WIDTH, LAYER, DEPTH = 16, 2, 5
IDS = [4] * 3 + [1] + [7] * 6


def context(layer=LAYER, width=WIDTH, depth=DEPTH):
    return LayerContext(width=width, depth=depth, index=jnp.asarray(layer))


def module_of(settings):
    return (MIXERS if settings.kind in MIXERS else FFNS)[settings.kind][1]


def build(settings, layer=LAYER):
    return module_of(settings)(settings, context(layer), rngs=nnx.Rngs(0))


def abstract(settings):
    return nnx.eval_shape(lambda: build(settings))


def make(settings, dtype=jnp.float32, layer=LAYER, seed=1):
    """A mixer with parameters far from their initial values, made without compiling anything."""
    graphdef, _ = nnx.split(abstract(settings))
    infos, rng = params_lib.describe(abstract(settings)), np.random.default_rng(seed)

    def value(path, info):
        if info.role == "constant":
            if path[-1].key == "log_decay":
                return head_log_decay(settings.decay, settings.heads, context(layer)).astype(dtype)
            assert path[-1].key == "position"
            return jnp.asarray(layer / DEPTH, dtype)
        noise = rng.normal(0, 0.5, info.shape)
        return jnp.asarray(1 + noise if info.role in ("norm", "dynamics") else noise, dtype)

    is_info = lambda x: isinstance(x, params_lib.ParamInfo)  # noqa: E731
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, infos, is_leaf=is_info))


@jax.jit
def exchange(layer, x, ids, shared):
    return layer.exchange(x, None, ids, shared)


def rows(batch=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(5).normal(size=(batch, len(IDS), WIDTH)), dtype)


# The oracles: one document [T, D], float64, from zero.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, scale, eps=1e-5):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def unit(x):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def convolve(x, taps, bias=0.0):
    past = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    return silu(np.stack([np.sum(past[t : t + len(taps)] * taps, 0) for t in range(len(x))]) + bias)


def heads(x, count):
    return x.reshape(len(x), count, -1)


def mamba2(p, s, x, memory=False):
    u = heads(convolve(x @ p["x"]["kernel"], p["x_convolution"], p["x_bias"]), 4)
    b, c = np.split(convolve(x @ p["bc"]["kernel"], p["bc_convolution"], p["bc_bias"]), 2, -1)
    b, c = heads(b, s.groups), heads(c, s.groups)
    dt = softplus(x @ p["dt"]["kernel"] + p["dt_bias"])
    out = np.zeros((len(x), 4, s.head_dim))
    for h in range(4):
        state, group = np.zeros((s.state, s.head_dim)), h * s.groups // 4
        for t in range(len(x)):
            state = np.exp(-dt[t, h] * np.exp(p["a_log"][h])) * state + dt[t, h] * np.outer(b[t, group], u[t, h])
            out[t, h] = c[t, group] @ state + p["skip"][h] * u[t, h]
    out = out.reshape(len(x), -1)
    if memory:
        return out
    gated = out * silu(x @ p["gate"]["kernel"])
    normed = rms(heads(gated, s.groups), 1.0).reshape(len(x), -1) * p["norm_scale"]
    return normed @ p["output"]["kernel"]


def turn(x, position, base):
    """The rotary embedding of one token, half-split, by complex numbers."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], -1)


def retention(p, s, x):
    q, k, v = (x @ p["qkv"]["project"][name]["kernel"] for name in "qkv")
    if s.activation == "silu":
        q, k = silu(q), silu(k)
    q, k, v = (heads(y, s.heads) for y in (q, k, v))
    state, out = np.zeros((s.heads, *k.shape[2:], *v.shape[2:])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(s.heads):
            decay = 1 - 2.0 ** (-5 - h) if s.decay == "retnet" else np.exp(-8 / s.heads * (1 - LAYER / DEPTH) * h)
            state[h] = decay * state[h] + np.outer(turn(k[t, h], t, s.rope_base), v[t, h])
            out[t, h] = turn(q[t, h], t, s.rope_base) @ state[h] / np.sqrt(k.shape[2])
    gate = x @ p["output"]["gate"]["kernel"]
    gate = silu(gate) if s.output_gate == "swish" else sigmoid(gate)
    out = out if s.norm == "head" else out.reshape(len(x), 1, -1)
    return (rms(out, p["output"]["norm"]["scale"]).reshape(len(x), -1) * gate) @ p["output"]["project"]["kernel"]


FEATURES = {
    "identity": lambda x: x,
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "silu": silu,
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
}


def linear(p, s, x):
    """The sum over pairs, without a state; with the normaliser, an average of values (eq. 9 of arXiv 2006.16236).
    The norm of each head takes positive factors out again, but for its epsilon: small features show the normaliser."""
    q, k, v = (x @ p["qkv"]["project"][name]["kernel"] for name in "qkv")
    if s.convolution:
        q, k, v = (convolve(y, p["qkv"]["convolve"][n]["weight"]) for n, y in zip("qkv", (q, k, v), strict=True))
    q, k, v = (heads(y, s.heads) for y in (q, k, v))
    q, k = FEATURES[s.feature_map](q), FEATURES[s.feature_map](k)
    out = np.zeros_like(v)
    for t, h in np.ndindex(len(x), s.heads):
        weights = k[: t + 1, h] @ q[t, h]
        if s.normalizer:
            weights = weights / max(weights.sum(), 1e-300)
        else:
            weights = weights / np.sqrt(k.shape[2])
        out[t, h] = weights @ v[: t + 1, h]
    y = rms(out, p["output"]["norm"]["scale"]).reshape(len(x), -1)
    if s.output_gate:
        y = y * silu(x @ p["output"]["gate"]["kernel"])
    return y @ p["output"]["project"]["kernel"]


def gla(p, s, x):
    q, k, v = (heads(x @ p["qkv"]["project"][name]["kernel"], s.heads) for name in "qkv")
    gate = x @ p["gate_down"]["kernel"] @ p["gate_up"]["kernel"] + p["gate_up"]["bias"]
    decay = heads(sigmoid(gate) ** (1 / s.gate_normalizer), s.heads)
    state, out = np.zeros((s.heads, *k.shape[2:], *v.shape[2:])), np.zeros_like(v)
    for t in range(len(x)):
        for h in range(s.heads):
            state[h] = decay[t, h][:, None] * state[h] + np.outer(k[t, h], v[t, h])
            out[t, h] = q[t, h] @ state[h] / np.sqrt(k.shape[2])
    normed = rms(out, p["output"]["norm"]["scale"]).reshape(len(x), -1)
    return (normed * silu(x @ p["output"]["gate"]["kernel"])) @ p["output"]["project"]["kernel"]


def hgrn2(p, s, x):
    grown = LAYER * np.exp(p["bound_logit"])
    bound = grown / (grown + DEPTH - LAYER)
    f = bound + (1 - bound) * sigmoid(x @ p["forget"]["kernel"])
    q, f, v = (heads(y, 4) for y in (silu(x @ p["q"]["kernel"]), f, x @ p["input"]["kernel"]))
    state, out = np.zeros((4, 4, 4)), []
    for t in range(len(x)):
        state = f[t][..., None] * state + np.einsum("hk,hv->hkv", 1 - f[t], v[t])
        out.append(np.einsum("hk,hkv->hv", q[t] / 2, state).reshape(-1))
    return rms(np.stack(out), p["output"]["norm"]["scale"]) @ p["output"]["project"]["kernel"]


def lightnet(p, s, x):
    """The softmax over time itself, without the recurrence."""
    q, logits, v = (heads(x @ p[name]["kernel"], 4) for name in "qkv")
    out = []
    for t in range(len(x)):
        weights = np.exp(logits[: t + 1]) / (np.exp(logits[: t + 1]).sum(0) + s.zero_start)
        out.append(np.einsum("hk,shk,shv->hv", silu(q[t]) / 2, weights, v[: t + 1]).reshape(-1))
    gate = silu(x @ p["output"]["gate"]["down"]["kernel"] @ p["output"]["gate"]["up"]["kernel"])
    return (rms(np.stack(out), p["output"]["norm"]["scale"]) * gate) @ p["output"]["project"]["kernel"]


def delta(p, s, x):
    groups = s.value_heads or s.heads
    q, k, v = (x @ p["qkv"]["project"][name]["kernel"] for name in "qkv")
    if s.convolution:
        q, k, v = (convolve(y, p["qkv"]["convolve"][n]["weight"]) for n, y in zip("qkv", (q, k, v), strict=True))
    else:
        q, k, v = silu(q), silu(k), silu(v)
    q, k, v = unit(heads(q, s.heads)), unit(heads(k, s.heads)), heads(v, groups)
    size = q.shape[-1]
    erase = (1 + s.negative_eigenvalues) * sigmoid(x @ p["beta"]["kernel"])
    erase = heads(erase, groups)
    write = heads(sigmoid(x @ p["write"]["kernel"]), groups) if p.get("write") else erase
    if s.kind == "deltanet":
        decay = np.ones((len(x), groups, 1))
    elif s.kind == "gated_deltanet":
        decay = np.exp(-np.exp(p["a_log"]) * softplus(x @ p["decay"]["kernel"] + p["dt_bias"]))[..., None]
    else:
        f = heads(x @ p["decay"]["down"]["kernel"] @ p["decay"]["up"]["kernel"] + p["dt_bias"], groups)
        rate = np.exp(p["a_log"])[:, None]
        decay = np.exp(-rate * softplus(f) if s.decay_bound is None else s.decay_bound * sigmoid(rate * f))
    out = np.zeros((len(x), groups, v.shape[-1]))
    for h in range(groups):
        state, reads = np.zeros((size, v.shape[-1])), h // (groups // s.heads)
        for t in range(len(x)):
            key = k[t, reads]
            state = decay[t, h][:, None] * state
            state = state + np.outer(key, write[t, h] * v[t, h] - (erase[t, h] * key) @ state)
            out[t, h] = q[t, reads] @ state / np.sqrt(size)
    y = rms(out, p["output"]["norm"]["scale"]).reshape(len(x), -1)
    gate = p["output"].get("gate")
    if gate and s.kind == "kda":
        y = y * sigmoid(x @ gate["down"]["kernel"] @ gate["up"]["kernel"] + gate["up"]["bias"])
    elif gate:
        y = y * silu(x @ gate["kernel"])
    return y @ p["output"]["project"]["kernel"]


def shifted(x):
    return np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])


def lora(x, p, activation=lambda x: x):
    return activation(x @ p["down"]["kernel"]) @ p["up"]["kernel"] + (0 if p.get("bias") is None else p["bias"])


def rwkv7(p, s, x, v_first=None):
    xr, xw, xk, xv, xa, xg = (x + (shifted(x) - x) * mu for mu in p["mix"])
    r, k, v = xr @ p["r"]["kernel"], xk @ p["k"]["kernel"], xv @ p["v"]["kernel"]
    # As the paper and the authors write it.
    decay = np.exp(-np.exp(-softplus(-lora(xw, p["decay"], np.tanh)) - 0.5))
    rate, gate = sigmoid(lora(xa, p["rate"])), lora(xg, p["gate"], sigmoid)
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(lora(xv, p["value"]))
    removal = unit(heads(k * p["k_k"], 4))
    k = heads(k * (1 + (rate - 1) * p["k_a"]), 4)
    r, v, decay, rate = (heads(y, 4) for y in (r, v, decay, rate))
    state, out = np.zeros((4, 4, 4)), np.zeros((len(x), 4, 4))
    for t in range(len(x)):
        for h in range(4):
            transition = np.diag(decay[t, h]) - np.outer(removal[t, h] * rate[t, h], removal[t, h])
            state[h] = transition @ state[h] + np.outer(k[t, h], v[t, h])
            out[t, h] = r[t, h] @ state[h]
    normed = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5 * 4)
    normed = normed * p["norm_scale"] + p["norm_bias"]
    y = normed + np.sum(r * k * p["r_k"], -1, keepdims=True) * v
    return (y.reshape(len(x), -1) * gate) @ p["output"]["kernel"]


def rwkv_channels(p, s, x):
    return np.maximum((x + (shifted(x) - x) * p["mix"]) @ p["key"]["kernel"], 0) ** 2 @ p["value"]["kernel"]


RWKV_RANKS = {"decay_rank": 3, "rate_rank": 4, "value_rank": 2, "gate_rank": 5}
CASES = {
    "linear": (linear, LinearSettings(heads=2, chunk_size=4)),
    "linear-identity": (linear, LinearSettings(heads=2, feature_map="identity", output_gate=True, chunk_size=4)),
    "linear-silu": (
        linear,
        LinearSettings(heads=2, feature_map="silu", convolution=3, expand_k=0.5, expand_v=2.0, chunk_size=4),
    ),
    "linear-relu": (linear, LinearSettings(heads=2, feature_map="relu", normalizer=True, expand_k=2.0, chunk_size=4)),
    "linear-squared-relu": (linear, LinearSettings(heads=2, feature_map="squared_relu", chunk_size=4)),
    "linear-softmax": (linear, LinearSettings(heads=2, feature_map="softmax", normalizer=True, expand_v=0.5, chunk_size=4)),
    "gla": (gla, GLASettings(heads=2, gate_rank=3, chunk_size=4)),
    "gla-normalizer": (gla, GLASettings(heads=2, gate_rank=3, gate_normalizer=2.0, expand_k=1.0, expand_v=2.0, chunk_size=4)),
    "mamba2": (mamba2, Mamba2Settings(head_dim=8, state=6, groups=2, convolution=2, chunk_size=4)),
    "retnet": (retention, RetentionSettings(heads=2, rope_base=50.0, chunk_size=4)),
    "transnormer": (
        retention,
        RetentionSettings(
            heads=2,
            rope_base=50.0,
            decay="lightning",
            activation="silu",
            output_gate="sigmoid",
            norm="all",
            expand_v=1.0,
            chunk_size=4,
        ),
    ),
    "hgrn2": (hgrn2, HGRN2Settings(head_dim=4, chunk_size=4)),
    "lightnet": (lightnet, LightNetSettings(head_dim=4, gate_rank=3, chunk_size=4)),
    "lightnet-zero-start": (lightnet, LightNetSettings(head_dim=4, gate_rank=3, zero_start=True, chunk_size=4)),
    "deltanet": (delta, DeltaNetSettings(heads=2, chunk_size=4)),
    "deltanet-options": (
        delta,
        DeltaNetSettings(
            heads=2,
            value_heads=6,
            head_dim=4,
            expand_v=1.5,
            output_gate=True,
            convolution=0,
            negative_eigenvalues=True,
            chunk_size=4,
        ),
    ),
    "gated-deltanet": (delta, GatedDeltaNetSettings(heads=2, value_heads=4, head_dim=4, chunk_size=4)),
    "kda": (delta, KDASettings(heads=2, value_heads=4, head_dim=4, expand_v=1.5, chunk_size=4)),
    "kda-bounded": (delta, KDASettings(heads=2, decay_bound=-5.0, negative_eigenvalues=True, chunk_size=4)),
    "gated-deltanet-2": (delta, KDASettings(heads=2, value_heads=4, head_dim=4, gates="channel", chunk_size=4)),
    "rwkv7": (rwkv7, RWKV7Settings(head_dim=4, **RWKV_RANKS, chunk_size=4)),
    "rwkv-channels": (rwkv_channels, RWKVChannelMixingSettings(ratio=1.5)),
}


def documents(x):
    return np.split(np.asarray(x[0]), np.flatnonzero(np.diff(IDS)) + 1)


def assert_close(y, expected):
    expected = np.concatenate(expected)
    # Gates and states are float32.
    np.testing.assert_allclose(y[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_mixers_equal_their_equations_in_every_document(case, x64):
    oracle, settings = CASES[case]
    layer, x = make(settings, jnp.float64), rows(dtype=jnp.float64)
    y, _ = jax.jit(lambda layer, x, ids: layer(x, None, ids))(layer, x, jnp.asarray([IDS]))
    p = jax.tree.map(np.asarray, params_lib.split(layer)[1])
    assert_close(y, [oracle(p, settings, document) for document in documents(x)])


def test_the_memory_of_mamba2_comes_before_gate_and_norm(x64):
    oracle, settings = CASES["mamba2"]
    layer, x = make(settings, jnp.float64), rows(dtype=jnp.float64)
    _, _, memory = exchange(layer, x, jnp.asarray([IDS]), None)
    p = jax.tree.map(np.asarray, params_lib.split(layer)[1])
    assert_close(memory, [oracle(p, settings, document, memory=True) for document in documents(x)])


def test_rwkv7_layers_mix_in_the_first_ones_values(x64):
    of_role = lambda role: RWKV7Settings(head_dim=4, value_residual=role, **RWKV_RANKS, chunk_size=4)  # noqa: E731
    assert [of_role(role).produces for role in ("make", "mix", "none")] == ["v_first", None, None]
    assert [of_role(role).consumes for role in ("make", "mix", "none")] == [None, "v_first", None]
    x, ids = rows(dtype=jnp.float64), jnp.asarray([IDS])
    first, later = make(of_role("make"), jnp.float64, seed=2), make(of_role("mix"), jnp.float64, seed=3)
    assert first.value is None
    p = jax.tree.map(np.asarray, params_lib.split(first)[1])
    _, _, made = exchange(first, x, ids, None)
    expected = [(d + (shifted(d) - d) * p["mix"][3]) @ p["v"]["kernel"] for d in documents(x)]
    assert_close(made, expected)

    p = jax.tree.map(np.asarray, params_lib.split(later)[1])
    y, _, nothing = exchange(later, x, ids, made)
    assert nothing is None
    assert_close(y, [rwkv7(p, later.settings, d, v) for d, v in zip(documents(x), expected, strict=True)])


@pytest.mark.parametrize("case", CASES)
def test_states_keep_their_shapes_and_are_float32_under_bfloat16(case):
    settings = CASES[case][1]
    layer = make(settings)
    sizes = (2,) if case == "rwkv-channels" else (2, 9)
    state = jax.eval_shape(lambda: layer.init_state(*sizes, jnp.bfloat16))
    y, after = jax.eval_shape(lambda x, state: layer(x, state), rows(batch=2, dtype=jnp.bfloat16), state)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    if case != "rwkv-channels":
        assert after["recurrent"].dtype == jnp.float32
        assert settings.op in OPS


def test_decays_that_are_sums_of_exponentials_never_exceed_one():
    """In exact numbers they cannot; rounded, they did, by one part in ten million, which the ops refuse outside jit."""
    bound, forget = jnp.linspace(-10, 10, 401)[:, None], jnp.linspace(-5, 40, 1001)
    log_f, rest = forget_gate(forget, bound)
    assert jnp.max(log_f) <= 0
    np.testing.assert_allclose(jnp.exp(log_f) + rest, 1, atol=3e-7)
    _, log_decay = running_logsumexp(3 * jax.random.normal(jax.random.key(0), (2, 300, 2, 8)), None, None)
    assert jnp.max(log_decay) <= 0


@pytest.mark.parametrize("case", ["hgrn2", "lightnet"])
def test_gradients_are_finite_where_logarithms_are_not(case):
    """Layer 0 of HGRN2 has bound 0, a document of LightNet starts with a sum of nothing."""
    layer = make(CASES[case][1], layer=0)
    graphdef, tree = params_lib.split(layer)
    state = layer.init_state(1, 9, jnp.float32)

    @jax.jit
    def gradient(tree, x, state):
        loss = lambda tree, x: jnp.sum(nnx.merge(graphdef, tree)(x, state, jnp.asarray([IDS]))[0] ** 3)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(tree, x)

    gradients = gradient(tree, rows(), state)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.asarray(gradients[1]) != 0)
    if case == "hgrn2":
        assert not np.any(gradients[0]["bound_logit"])


def stacked(settings, width, depth, names=None):
    """Initial parameters (or those named, made alone) of all layers, leading axis the layer, as a stacked model has them."""

    def one(index, key):
        tree = params_lib.split(module_of(settings)(settings, LayerContext(width, depth, index), rngs=nnx.Rngs(key)))[1]
        return {name: tree[name] for name in names or tree}

    every = lambda: jax.vmap(one)(jnp.arange(depth), jax.random.split(jax.random.key(0), depth))  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(every)())


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (Mamba2Settings(head_dim=2), 1, 16),
        (GatedDeltaNetSettings(heads=64, head_dim=2), 0, 16),
        (KDASettings(heads=64, head_dim=2), 1, 16),
    ],
    ids=["mamba2", "gated-deltanet", "kda"],
)
def test_initial_rates_and_steps(settings, low, high):
    tree = stacked(settings, 64, 5, ("a_log", "dt_bias"))
    steps = softplus(tree["dt_bias"].astype(np.float64)).ravel()
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    # Log-uniform: its logarithm's mean and deviation.
    span = np.log(100)
    assert np.mean(np.log(steps)) == pytest.approx(np.log(1e-2), abs=0.1 * span)
    assert np.std(np.log(steps)) == pytest.approx(span / 12**0.5, rel=0.1)
    rates = np.exp(tree["a_log"].astype(np.float64)).ravel()
    assert rates.min() >= low
    assert rates.max() <= high * 1.0001
    assert rates.max() - rates.min() > 0.95 * (high - low)
    assert np.mean(rates) == pytest.approx((low + high) / 2, rel=0.1)


def test_bounded_kda_starts_without_slopes():
    tree = stacked(KDASettings(heads=4, decay_bound=-5.0), 16, 2, ("a_log",))
    np.testing.assert_array_equal(tree["a_log"], 0)


def test_lower_bounds_start_at_the_papers():
    tree = stacked(HGRN2Settings(head_dim=4), 8, 4, ("position", "bound_logit"))
    np.testing.assert_allclose(tree["position"], [0, 0.25, 0.5, 0.75])
    np.testing.assert_array_equal(tree["bound_logit"], 0)


def test_rwkv7_initial_values_are_the_authors():
    width, depth, size = 16, 4, 8
    tree = stacked(RWKV7Settings(head_dim=size, value_residual="mix", **RWKV_RANKS), width, depth)
    channels = stacked(RWKVChannelMixingSettings(), width, depth)
    for layer in range(depth):
        up, down = layer / (depth - 1), 1 - layer / depth
        for n in range(width):
            share, linear = n / width, n / (width - 1) - 0.5
            zigzag = (n % size - (size - 1) / 2) / ((size - 1) / 2)
            zigzag *= abs(zigzag)
            expected = {
                "mix": [1 - share ** (power * down) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)],
                "decay": -6 + 6 * (n / (width - 1)) ** (1 + up**0.3) + 0.5 + zigzag * 2.5,
                "rate": -0.19 + zigzag * 0.3 + linear * 0.4,
                "value": 0.73 - linear * 0.4,
                "k_k": 0.71 - linear * 0.1,
                "k_a": 1.02,
            }
            got = {name: tree[name][layer, n] for name in ("k_k", "k_a")}
            got |= {name: tree[name]["bias"][layer, n] for name in ("decay", "rate", "value")}
            got["mix"] = tree["mix"][layer, :, n]
            got["channels"], expected["channels"] = channels["mix"][layer, n], 1 - share ** (down**4)
            for name, value in expected.items():
                assert got[name] == pytest.approx(value, rel=2e-5, abs=2e-6), f"{name} of channel {n} in layer {layer}"
        np.testing.assert_allclose(tree["norm_scale"][layer], ((layer + 1) / depth) ** 0.7, rtol=1e-6)
    np.testing.assert_allclose(tree["r_k"], -0.04, rtol=1e-6)

    gram = lambda kernel: np.einsum("lij,lkj->lik", kernel, kernel)  # noqa: E731
    eye = np.broadcast_to(np.eye(width), (depth, width, width))
    for name, gain in (("r", 1), ("k", 0.1), ("v", 1)):
        np.testing.assert_allclose(gram(tree[name]["kernel"]), gain**2 * eye, atol=1e-5)
    np.testing.assert_allclose(gram(channels["key"]["kernel"]), eye, atol=1e-5)
    np.testing.assert_allclose(gram(tree["gate"]["up"]["kernel"]), 0.01 * np.eye(5) + np.zeros((depth, 1, 1)), atol=1e-6)
    zeros = [tree["output"], channels["value"], *(tree[name]["down"] for name in ("decay", "rate", "value", "gate"))]
    assert not any(np.any(leaf["kernel"]) for leaf in zeros)
    assert len(np.unique(tree["r"]["kernel"][:, 0, 0])) == depth


def test_ranks_follow_the_width():
    settings = RWKV7Settings()
    assert [settings.rank(name, 2048) for name in ("decay", "rate", "value", "gate")] == [128, 128, 64, 224]
    assert [settings.rank(name, 256) for name in ("decay", "rate", "value", "gate")] == [32, 32, 32, 64]


def test_roles_decide_what_decays():
    """What sets the rates is trained and never decayed."""
    dynamics = {
        "mamba2": {"a_log", "dt_bias", "skip"},
        "hgrn2": {"bound_logit"},
        "deltanet": set(),
        "gated-deltanet": {"a_log", "dt_bias"},
        "kda": {"a_log", "dt_bias"},
        "rwkv7": {"mix", "k_k", "k_a", "r_k", "decay.bias", "rate.bias"},
        "rwkv-channels": {"mix"},
    }
    for case, names in dynamics.items():
        infos = params_lib.leaves(params_lib.describe(abstract(CASES[case][1])))
        assert {name for name, info in infos if info.role == "dynamics"} == names, case
        kernels = {name for name, info in infos if info.role == "hidden"}
        assert all(name.endswith("kernel") for name in kernels)
        undecayed = {info.role for name, info in infos if name not in kernels}
        assert undecayed <= {"dynamics", "norm", "bias", "convolution", "constant"}


def model(mixer, depth, width, vocabulary=32_000, **changes):
    return ModelSettings(
        vocab_size=vocabulary, width=width, depth=depth, pattern=("m",), mixers={"m": mixer}, **changes
    )  # fmt: skip


def rwkv(depth, width, **ranks):
    mixers = {name: RWKV7Settings(value_residual=role, **ranks) for name, role in (("first", "make"), ("rest", "mix"))}
    return ModelSettings(
        vocab_size=32_000, width=width, depth=depth, pattern=None, tied_embedding=False, norm="layer", embedding_norm=True,
        stages=[{"pattern": ["first"]}, {"pattern": ["rest"], "repeat": depth - 1}], mixers=mixers, ffn={"kind": "rwkv"},
    )  # fmt: skip


def mamba2_model(depth, width, vocabulary=50_288, tied=True):
    return model(Mamba2Settings(), depth, width, vocabulary, ffn={"kind": "none"}, tied_embedding=tied)


UNTIED = {"tied_embedding": False}
PUBLISHED = {
    "deltanet-1.3b": (lambda: model(DeltaNetSettings(heads=16), 24, 2048, **UNTIED), 1_365_677_056),
    "deltanet-340m": (lambda: model(DeltaNetSettings(heads=8), 24, 1024), 341_594_112),
    "gated-deltanet": (lambda: model(GatedDeltaNetSettings(head_dim=256), 21, 2048, **UNTIED), 1_387_348_732),
    "gated-deltanet-16": (
        lambda: model(GatedDeltaNetSettings(heads=16, head_dim=128, expand_v=1), 24, 2048, **UNTIED), 1_467_127_552,
    ),
    "kda": (lambda: model(KDASettings(), 24, 2048, **UNTIED), 1_390_941_568),
    "hgrn2": (lambda: model(HGRN2Settings(), 24, 2048, **UNTIED), 1_364_396_032),
    "rwkv7": (lambda: rwkv(24, 2048, decay_rank=64, rate_rank=64, value_rank=16, gate_rank=128), 1_366_644_736),
    "retnet": (lambda: model(RetentionSettings(), 24, 2048, **UNTIED), 1_766_963_200),
    "mamba2-130m": (lambda: mamba2_model(24, 768), 128_989_632),
    "mamba2-370m": (lambda: mamba2_model(48, 1024), 368_346_624),
    "mamba2-780m": (lambda: mamba2_model(48, 1536), 780_161_280),
    "mamba2-1.3b": (lambda: mamba2_model(48, 2048), 1_343_757_312),
    "mamba2-2.7b": (lambda: mamba2_model(64, 2560), 2_702_599_680),
    "mamba2-fla": (lambda: mamba2_model(48, 2048, 32_000, tied=False), 1_371_839_488),
    # 24 (4 d^2 + 256 d + d + 3 d 2816 + 2 d) + d + 32000 d at d = 1024.
    "lightnet": (lambda: model(LightNetSettings(), 24, 1024), 347_415_552),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    settings, count = PUBLISHED[name]
    assert params_lib.count(params_lib.describe(abstract_model(settings()))) == count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (AttentionSettings(heads=3), "attention: 16 channels do not divide over heads=3"),
        (RetentionSettings(heads=3), r"retention.expand_k: 16 channels do not divide over heads=3"),
        (RetentionSettings(heads=2, expand_v=1.1875), r"retention.expand_v: 19 channels do not divide over heads=2"),
        (LinearSettings(heads=3), r"linear.expand_k: 16 channels do not divide over heads=3"),
        (LinearSettings(heads=2, expand_v=1.1875), r"linear.expand_v: 19 channels do not divide over heads=2"),
        (LogLinearSettings(heads=3), r"log_linear.expand_k: 8 channels do not divide over heads=3"),
        (LogLinearSettings(heads=2, expand_v=1.1875), r"log_linear.expand_v: 19 channels do not divide over heads=2"),
        (MoMSettings(heads=3), r"mom.expand_k: 16 channels do not divide over heads=3"),
        (MoMSettings(heads=2, expand_v=1.1875), r"mom.expand_v: 19 channels do not divide over heads=2"),
        (Mamba2Settings(head_dim=5), r"mamba2.expand over head_dim.* 32 channels do not divide over heads=5"),
        (Mamba2Settings(head_dim=8, groups=3), r"mamba2.groups.* 4 channels do not divide over heads=3"),
        (HGRN2Settings(head_dim=5), "hgrn2.* 16 channels do not divide"),
        (LightNetSettings(head_dim=5), "lightnet.* 16 channels do not divide"),
        (DeltaNetSettings(heads=3), "deltanet.* 16 channels do not divide over heads=3"),
        (GatedDeltaNetSettings(heads=2, head_dim=3, expand_v=1.5), r"gated_deltanet.expand_v: 4.5 channels"),
        (RWKV7Settings(head_dim=5), "rwkv7.* 16 channels do not divide"),
    ],
)
def test_sizes_that_do_not_divide_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        module_of(settings)(settings, context(), rngs=nnx.Rngs(0))


def test_settings_that_contradict_are_named():
    with pytest.raises(ValueError, match="value_heads=3 must be a multiple of heads=2"):
        DeltaNetSettings(heads=2, value_heads=3)
    with pytest.raises(ValueError, match="a_min=20.0 is above a_max=16.0"):
        Mamba2Settings(a_min=20)
    with pytest.raises(ValueError, match="'rest' reads 'v_first'"):
        ModelSettings(width=64, depth=2, pattern=("rest",), mixers={"rest": RWKV7Settings(value_residual="mix")})


def test_recurrence_flops():
    assert Mamba2Settings().sequence_flops(1024, 100) == 4 * 2048 * 128
    assert HGRN2Settings().sequence_flops(1024, 100) == LightNetSettings().sequence_flops(1024, 9) == 4 * 1024 * 128
    assert GatedDeltaNetSettings(head_dim=256).sequence_flops(2048, 100) == 6 * 6 * 256 * 512
    assert RWKV7Settings().sequence_flops(2048, 100) == 8 * 2048 * 64
