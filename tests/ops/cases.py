"""The ops and their oracles: what test_ops.py holds for each of them is a line of OPS here."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention import attention
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan
from jaxlm.ops.fast_weights import FastState, memora, moneta, ttt_linear, yaad
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import LogLinearState, levels_for, log_linear_attention

B, H, G, K, V, W, C = 2, 4, 2, 3, 5, 4, 4
DECAYS = np.array([0.0, -1e-7, -0.01, -0.3, -2.0, -20.0, -80.0])
LEVELS = 6
# Heads, channels and hidden units of the inner models of fast weights.
INNER = (2, 4, 6)


class Op(NamedTuple):
    name: str  # in ops.forms
    inputs: Callable  # rng, T -> arrays [B, T, H, ..]
    call: Callable  # arrays, state, form, segment_ids -> output, state
    state: Callable  # rng, dtype -> a state to start from
    oracle: Callable  # arrays in numpy, one document from nothing -> output
    forms: tuple[str, ...]
    fixed: tuple[str, ...] = ()  # names of arrays without B and T: [H, ..], or of one axis
    shared: tuple[str, ...] = ()  # names of arrays without H
    heads: int = 1  # their axis in the state
    low: tuple[float, float] | None = (0.005, 0.02)  # how far bfloat16 may be from float32: outputs, gradients
    exact: float = 1e-12  # how far float64 may be from what is the same


# Never in low precision: what becomes a factor of the state.
GATES = ("log_decay", "beta", "write", "log_a", "dt", "level_scales", "rate", "threshold")


def normal(rng, *shape, complex_=False):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape) if complex_ else rng.normal(size=shape)


def cast(x, dtype):
    return x.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(x) else dtype)


def make(op: Op, dtype=np.float64, length=14, seed=0):
    """Inputs and a state, in numpy, whose slices compile nothing."""
    rng = np.random.default_rng(seed)
    return {name: cast(x, dtype) for name, x in op.inputs(rng, length).items()}, op.state(rng, dtype)


def cut(op: Op, arrays, tokens: slice, rows: slice = slice(None)):
    return {n: x if n in op.fixed else x[rows, tokens] for n, x in arrays.items()}


def fresh(state):
    """The state at the start of a document."""
    zeros = jax.tree.map(np.zeros_like, state)
    if isinstance(state, dict):
        return {**zeros, "positions": zeros["positions"] - 1}
    if isinstance(state, FastState):
        return zeros._replace(decay=None if state.decay is None else np.ones_like(state.decay))
    return zeros


def correlated(rng, *shape):
    """Tokens that share most of their direction, so that scores are large and errors do not average out."""
    return rng.normal(size=(*shape[:1], 1, *shape[2:])) + 0.3 * rng.normal(size=shape)


def recurrence_call(op, arrays, state, form, segment_ids=None):
    return op(**arrays, initial_state=state, segment_ids=segment_ids, form=form, chunk_size=C)


def random_state(rng, dtype, shape=(H, K, V), complex_=False):
    return cast(normal(rng, B, *shape, complex_=complex_), dtype)


# Linear attention.


def mixer_inputs(rng, T, *, heads=H, groups=H, decay=None):
    """q, k, v and decays that mix exactly 0, tiny and down to -80 in the same chunk."""
    arrays = {
        "q": correlated(rng, B, T, heads, K),
        "k": correlated(rng, B, T, groups, K),
        "v": rng.normal(size=(B, T, groups, V)),
    }
    if decay:
        arrays["log_decay"] = rng.choice(DECAYS, size=(B, T, heads) if decay == "scalar" else (B, T, heads, K))
    return arrays


def linear_oracle(q, k, v, log_decay=None):
    o = np.zeros(v.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        state = np.zeros((q.shape[3], v.shape[3]))
        for t in range(q.shape[1]):
            if log_decay is not None:
                state = np.exp(log_decay[b, t, h]).reshape(-1, 1) * state
            state = state + np.outer(k[b, t, h], v[b, t, h])
            o[b, t, h] = q.shape[3] ** -0.5 * q[b, t, h] @ state
    return o


# Delta rules.


def delta_inputs(rng, T, *, decay=None, gates=False):
    """Similar unit keys, and steps that overshoot (beta up to 2)."""
    arrays = mixer_inputs(rng, T, decay=decay)
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays["beta"] = 2 * rng.random((B, T, H, K) if gates else (B, T, H))
    if gates:
        arrays["write"] = rng.random((B, T, H, V))
    return arrays


def dplr_inputs(rng, T):
    arrays = mixer_inputs(rng, T, decay="vector")
    a = correlated(rng, B, T, H, K)
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    return arrays | {"a": -a, "b": a * rng.random((B, T, H, K))}


def delta_oracle(q, k, v, beta, log_decay=None, write=None):
    """With the transition as a matrix: S = (I - k^T (e k)) Diag(exp(g)) S + k^T (w v)."""
    o = np.zeros(v.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        state = np.zeros((q.shape[3], v.shape[3]))
        for t in range(q.shape[1]):
            key, erase = k[b, t, h], np.broadcast_to(beta[b, t, h], q.shape[3])
            decay = np.ones(q.shape[3]) if log_decay is None else np.exp(np.broadcast_to(log_decay[b, t, h], q.shape[3]))
            transition = (np.eye(q.shape[3]) - np.outer(key, erase * key)) @ np.diag(decay)
            state = transition @ state + np.outer(key, (beta if write is None else write)[b, t, h] * v[b, t, h])
            o[b, t, h] = q.shape[3] ** -0.5 * q[b, t, h] @ state
    return o


def dplr_oracle(q, k, v, a, b, log_decay):
    o = np.zeros(v.shape)
    for i, h in np.ndindex(q.shape[0], q.shape[2]):
        state = np.zeros((q.shape[3], v.shape[3]))
        for t in range(q.shape[1]):
            transition = np.diag(np.exp(log_decay[i, t, h])) + np.outer(b[i, t, h], a[i, t, h])
            state = transition @ state + np.outer(k[i, t, h], v[i, t, h])
            o[i, t, h] = q.shape[3] ** -0.5 * q[i, t, h] @ state
    return o


# Attention, convolution.


def attention_call(arrays, state, form, segment_ids=None, window=None):
    return attention(**arrays, cache=state, segment_ids=segment_ids, form=form, window=window)


def attention_oracle(q, k, v, window=None):
    o = np.zeros((*q.shape[:3], v.shape[3]))
    repeats = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        weights = np.exp(k[b, first : t + 1, h // repeats] @ q[b, t, h] * q.shape[3] ** -0.5)
        o[b, t, h] = weights @ v[b, first : t + 1, h // repeats] / weights.sum()
    return o


def random_cache(rng, dtype, groups, slots):
    """A cache into which 7 tokens went, around the ring's end if it is shorter."""
    positions = np.full((B, slots), -1, np.int32)
    positions[:, np.arange(7) % slots] = np.arange(7)
    k, v = (rng.normal(size=(B, slots, groups, size)).astype(dtype) for size in (K, V))
    return {"k": k, "v": v, "positions": positions, "count": np.array(7, np.int32)}


def convolution_weights(dtype):
    rng = np.random.default_rng(1)
    return rng.normal(size=(W, H * K)).astype(dtype), rng.normal(size=H * K).astype(dtype)


def convolution_call(arrays, state, form, segment_ids=None):
    weight, bias = convolution_weights(arrays["x"].dtype)
    return short_convolution(arrays["x"], weight, bias, state=state, segment_ids=segment_ids, activation="silu")


def convolution_oracle(x, weight, bias):
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for j in range(W):
            if t - W + 1 + j >= 0:
                y[b, t] += weight[j] * x[b, t - W + 1 + j]
    y = y + bias
    return y / (1 + np.exp(-y))


# Diagonal recurrences.


def diagonal_inputs(rng, T, *, fixed=False, complex_=False):
    """Two channel axes; decays turning by any angle where complex."""
    log_a = rng.choice(DECAYS, size=(H, K) if fixed else (B, T, H, K))
    return {
        "log_a": log_a + 1j * rng.uniform(-3, 3, size=log_a.shape) if complex_ else log_a,
        "b": normal(rng, B, T, H, K, complex_=complex_),
    }


def diagonal_oracle(log_a, b):
    h, out = np.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = np.exp(log_a if log_a.ndim < b.ndim else log_a[:, t]) * h + b[:, t]
        out.append(h)
    return np.stack(out, axis=1)


def ssm_inputs(rng, T):
    """H channels of K complex states."""
    a = np.exp(rng.choice(DECAYS, size=(H, K)) + 1j * rng.uniform(-3, 3, size=(H, K)))
    return {"u": normal(rng, B, T, H), "a": np.stack([a.real, a.imag], axis=1), "c": normal(rng, H, 2, K)}


def ssm_oracle(u, a, c):
    a, c = (x[:, 0] + 1j * x[:, 1] for x in (a, c))
    h, out = np.zeros((u.shape[0], *a.shape), complex), []
    for t in range(u.shape[1]):
        h = a * h + u[:, t, :, None]
        out.append((c * h).sum(-1).real)
    return np.stack(out, axis=1)


def selective_inputs(rng, T):
    """H channels of K states."""
    return {
        "u": normal(rng, B, T, H),
        "dt": rng.choice(-DECAYS, size=(B, T, H)),
        "a": -rng.uniform(0.3, 1, size=(H, K)),
        "b": normal(rng, B, T, K),
        "c": normal(rng, B, T, K),
    }


def selective_oracle(u, dt, a, b, c):
    h, out = np.zeros((u.shape[0], *a.shape)), []
    for t in range(u.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt * u)[:, t, :, None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1))
    return np.stack(out, axis=1)


# Log-linear attention.


def log_linear_inputs(rng, T):
    levels = max(LEVELS, levels_for(T))
    return mixer_inputs(rng, T, decay="scalar") | {"level_scales": rng.uniform(0.1, 2, size=(B, T, H, levels))}


def log_linear_call(arrays, state, form, segment_ids=None):
    if state is not None:
        # A digit of the position that is 0 stands for nothing.
        filled = (state.position[:, None] >> jnp.arange(LEVELS - 1, dtype=jnp.int32)) & 1
        state = state._replace(digits=filled[:, None, :, None, None] * state.digits)
    options = {"initial_state": state, "segment_ids": segment_ids, "form": form, "chunk_size": C}
    return log_linear_attention(**arrays, scale=0.5, **options)


def log_linear_state(rng, dtype):
    """Eleven tokens (1011b) and six came before."""
    return LogLinearState(normal(rng, B, H, LEVELS - 1, K, V).astype(dtype), np.array([11, 6], np.int32))


def log_linear_oracle(q, k, v, log_decay, level_scales, scale=0.5):
    """The sum over pairs of the op's docstring, levels counted digit by digit."""
    o = np.zeros(v.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        for s in range(t + 1):
            level = len(f"{t ^ s:b}") if s < t else 0
            weight = scale * level_scales[b, t, h, level] * np.exp(log_decay[b, s + 1 : t + 1, h].sum())
            o[b, t, h] += weight * (q[b, t, h] @ k[b, s, h]) * v[b, s, h]
    return o


# Fast weights: token by token by their equations, the inner gradients by autodiff.


def average_map(a):
    return a**3 / jnp.sqrt(jnp.mean(a**4) + 1e-6 / a.size)


def softmax(x):
    return jax.nn.softmax(x, axis=0)


# name -> op, its options, dual variables to weights
FAST_WEIGHTS = {
    "ttt": (ttt_linear, {}, None),
    "moneta": (moneta, {}, average_map),
    "moneta, printed": (moneta, {"retention": "printed"}, lambda a: a / jnp.sqrt(jnp.sum(a**4) + 1e-6)),
    "moneta, p = q = 2": (moneta, {"p": 2.0, "q_norm": 2.0}, lambda a: a),
    "yaad": (yaad, {}, lambda a: a),
    "memora": (memora, {}, softmax),
}
INNER_WEIGHTS = ("w", "b", "w_in", "w_out")


def fast_inputs(rng, T, name):
    heads, D, E = INNER
    arrays = {n: rng.normal(size=(B, T, heads, D)) for n in "qkv"}
    arrays |= {"norm_scale": 1 + 0.3 * rng.normal(size=(heads, D)), "norm_bias": 0.3 * rng.normal(size=(heads, D))}
    if name == "ttt":
        arrays |= {"rate": rng.uniform(0, 0.5, size=(B, T, heads)), "token_scale": rng.uniform(0.2, 1, size=C)}
        return arrays | {"w": 0.5 * rng.normal(size=(heads, D, D)), "b": 0.1 * rng.normal(size=(heads, D))}
    arrays["rate"] = rng.uniform(0, 0.3, size=(B, T, heads, D))
    arrays["log_decay"] = rng.choice([0, -0.1, -1, -80], p=[0.3, 0.4, 0.25, 0.05], size=(B, T, heads, D))
    if name == "yaad":
        arrays["threshold"] = rng.uniform(0.5, 5, size=(B, T, heads))
    return arrays | {"w_in": rng.normal(size=(heads, D, E)), "w_out": rng.normal(size=(heads, E, D))}


def fast_state(rng, dtype, name):
    """In the midst of a chunk; one row's ends with the first token."""
    heads, D, E = INNER
    shapes = {"w": (D, D), "b": (D,)} if name == "ttt" else {"w_in": (D, E), "w_out": (E, D)}
    start, change = ({n: 0.3 * random_state(rng, dtype, (heads, *shape)) for n, shape in shapes.items()} for _ in range(2))
    decay = None if name == "ttt" else rng.uniform(0.3, 1, size=(B, heads, D)).astype(dtype)
    return FastState(start, change, decay, np.array([3, 1], np.int32))


def fast_call(name, arrays, state, form, segment_ids=None):
    op, options, _ = FAST_WEIGHTS[name]
    weights = {n: arrays[n] for n in INNER_WEIGHTS if n in arrays}
    arrays = {n: x for n, x in arrays.items() if n not in weights}
    return op(
        **arrays, weights=weights, initial_state=state, segment_ids=segment_ids, form=form, chunk_size=C, **options
    )  # fmt: skip


def normalize(x):
    return (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-6)


def pull(name, error, threshold):
    if name.startswith("moneta"):
        p = FAST_WEIGHTS[name][1].get("p", 3)
        return p * jnp.tanh(10 * error) * jnp.sqrt(error**2 + 1e-6) ** (p - 1)
    length = jnp.sqrt(jnp.sum(error**2))
    return jnp.where(length > threshold, threshold * error / length, error) if name == "yaad" else error


@cache
def inner_model(name):
    def model(w, norm, x):
        y = x @ w["w"] + w["b"] if name == "ttt" else jax.nn.gelu(x @ w["w_in"]) @ w["w_out"]
        return x + norm[0] * normalize(y) + norm[1]

    def gradient(w, norm, k, v, threshold):
        prediction, back = jax.vjp(lambda w: model(w, norm, k), w)
        return back(pull(name, prediction - v, threshold))[0]

    return jax.jit(model), jax.jit(gradient)


def fast_document(name, x, weights, norm):
    """One head of one document [T, ..], by the equations."""
    read, gradient = inner_model(name)
    threshold = x.get("threshold", np.zeros(len(x["q"])))
    dual, out = weights, []
    for t in range(len(x["q"])):
        grad = lambda at, t=t: gradient(at, norm, x["k"][t], x["v"][t], threshold[t])  # noqa: E731
        if name == "ttt":
            if t % C == 0:
                start, total = dual, jax.tree.map(np.zeros_like, dual)
            total = jax.tree.map(lambda s, g, t=t: s + x["rate"][t] * g, total, grad(start))
            dual = jax.tree.map(lambda w, s, t=t: w - x["token_scale"][t % C] * s, start, total)
            out.append(read(dual, norm, x["q"][t]))
            continue
        rate, alpha = x["rate"][t], np.exp(x["log_decay"][t])

        def move(w, g, rate=rate, alpha=alpha):
            return {
                "w_in": alpha[:, None] * w["w_in"] - rate[:, None] * g["w_in"],
                "w_out": alpha * w["w_out"] - rate * g["w_out"],
            }

        if t % C == 0:
            start = jax.tree.map(FAST_WEIGHTS[name][2], dual)
            moving = start
            if name == "memora":
                dual = jax.tree.map(jnp.log, jax.tree.map(softmax, move(jax.tree.map(jnp.log, start), grad(start))))
                start = moving = jax.tree.map(jnp.exp, dual)
        if name != "memora":
            moving, dual = move(moving, grad(start)), move(dual, grad(start))
        elif t % C:
            dual = move(dual, grad(start))
        out.append(read(moving, norm, x["q"][t]))
    return np.array(out)


def fast_oracle(name, norm_scale, norm_bias, **arrays):
    o = np.zeros(arrays["v"].shape)
    weights = {n: arrays.pop(n) for n in INNER_WEIGHTS if n in arrays}
    token_scale = arrays.pop("token_scale", None)
    for b, h in np.ndindex(o.shape[0], o.shape[2]):
        x = {n: a[b, :, h] for n, a in arrays.items()} | {"token_scale": token_scale}
        o[b, :, h] = fast_document(name, x, {n: w[h] for n, w in weights.items()}, (norm_scale[h], norm_bias[h]))
    return o


# The table. Attention's ring has room for little more than the window, or else for all tokens of these tests.

FORMS = ("recurrent", "parallel", "chunked")
WINDOW = 6


def linear(decay=None):
    inputs, call = partial(mixer_inputs, decay=decay), partial(recurrence_call, linear_attention)
    return Op("linear_attention", inputs, call, random_state, linear_oracle, FORMS)


def delta(decay=None, gates=False):
    inputs, call = partial(delta_inputs, decay=decay, gates=gates), partial(recurrence_call, delta_rule)
    # Steps that reflect (beta near 2) do not damp what rounding the state did.
    return Op("delta_rule", inputs, call, random_state, delta_oracle, FORMS, low=(0.008, 0.02))


def diagonal(fixed=False, complex_=False):
    return Op(
        "diagonal_recurrence", partial(diagonal_inputs, fixed=fixed, complex_=complex_),
        partial(recurrence_call, diagonal_recurrence), partial(random_state, shape=(H, K), complex_=complex_), diagonal_oracle,
        FORMS, fixed=("log_a",) if fixed else (), low=None if complex_ else (0.005, 0.02),
    )  # fmt: skip


def fast(name):
    """Powers and quotients of the inner models' errors amplify rounding: of Miras' 64 tokens bfloat16 leaves nothing."""
    return Op(
        "ttt_linear" if name == "ttt" else "miras", partial(fast_inputs, name=name), partial(fast_call, name),
        partial(fast_state, name=name), partial(fast_oracle, name), ("recurrent", "chunked"),
        fixed=("norm_scale", "norm_bias", "token_scale", *INNER_WEIGHTS), low=(0.03, 0.1) if name == "ttt" else None,
        exact=1e-10,
    )  # fmt: skip


OPS = {
    "linear": linear(),
    "linear, scalar decay": linear("scalar"),
    "linear, vector decay": linear("vector"),
    "delta": delta(),
    "delta, scalar decay": delta("scalar"),
    "delta, vector decay": delta("vector"),
    "delta, gates": delta("vector", gates=True),
    "dplr": Op(
        "dplr_delta_rule", dplr_inputs, partial(recurrence_call, dplr_delta_rule), random_state, dplr_oracle, FORMS,
    ),
    "attention": Op(
        "attention", partial(mixer_inputs, groups=G), attention_call, partial(random_cache, groups=G, slots=64),
        attention_oracle, FORMS, heads=2,
    ),
    "attention, window": Op(
        "attention", mixer_inputs, partial(attention_call, window=WINDOW), partial(random_cache, groups=H, slots=WINDOW + 2),
        partial(attention_oracle, window=WINDOW), FORMS, heads=2,
    ),
    "convolution": Op(
        "short_convolution", lambda rng, T: {"x": rng.normal(size=(B, T, H * K))}, convolution_call,
        lambda rng, dtype: rng.normal(size=(B, W - 1, H * K)).astype(dtype),
        lambda x: convolution_oracle(x, *convolution_weights(x.dtype)), ("only",), heads=2,
    ),
    "diagonal": diagonal(),
    "diagonal, complex": diagonal(complex_=True),
    "diagonal, fixed": diagonal(fixed=True),
    "diagonal, fixed complex": diagonal(fixed=True, complex_=True),
    "ssm": Op(
        "diagonal_recurrence", ssm_inputs, partial(recurrence_call, diagonal_ssm), partial(random_state, shape=(H, 2, K)),
        ssm_oracle, FORMS, fixed=("a", "c"),
    ),
    "selective": Op(
        "diagonal_recurrence", selective_inputs, partial(recurrence_call, selective_scan), partial(random_state, shape=(H, K)),
        selective_oracle, FORMS, fixed=("a",), shared=("b", "c"),
    ),
    "log-linear": Op(
        "log_linear_attention", log_linear_inputs, log_linear_call, log_linear_state, log_linear_oracle, FORMS,
    ),
    **{name: fast(name) for name in FAST_WEIGHTS},
}  # fmt: skip
