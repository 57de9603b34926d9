"""What holds for every op in every form: a new op adds a line to OPS and an oracle."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlm.ops.attention as attention_module
from jaxlm.ops import forms
from jaxlm.ops.attention import attention
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.linear_attention import linear_attention

B, H, G, K, V, W = 2, 4, 2, 3, 5, 4
DECAYS = np.array([0.0, -1e-7, -0.01, -0.3, -2.0, -20.0, -80.0])


def correlated(rng, *shape):
    """Tokens that share most of their direction, so that scores are large and errors do not average out."""
    return rng.normal(size=(*shape[:1], 1, *shape[2:])) + 0.3 * rng.normal(size=shape)


def mixer_inputs(rng, T, *, heads=H, groups=H, decay=None):
    """q, k, v and decays that mix exactly 0, tiny and down to -80 in the same chunk; every array is [B, T, ..]."""
    arrays = {
        "q": correlated(rng, B, T, heads, K),
        "k": correlated(rng, B, T, groups, K),
        "v": rng.normal(size=(B, T, groups, V)),
    }
    if decay:
        arrays["log_decay"] = rng.choice(DECAYS, size=(B, T, heads) if decay == "scalar" else (B, T, heads, K))
    return arrays


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


def recurrence_call(op, arrays, state, form, segment_ids=None):
    return op(**arrays, initial_state=state, segment_ids=segment_ids, form=form, chunk_size=4)


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


def attention_oracle(q, k, v, window=None):
    o = np.zeros((*q.shape[:3], v.shape[3]))
    repeats = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        weights = np.exp(k[b, first : t + 1, h // repeats] @ q[b, t, h] * q.shape[3] ** -0.5)
        o[b, t, h] = weights @ v[b, first : t + 1, h // repeats] / weights.sum()
    return o


def convolution_oracle(x, weight, bias):
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for j in range(W):
            if t - W + 1 + j >= 0:
                y[b, t] += weight[j] * x[b, t - W + 1 + j]
    y = y + bias
    return y / (1 + np.exp(-y))


linear_call, delta_call = partial(recurrence_call, linear_attention), partial(recurrence_call, delta_rule)


def attention_call(arrays, state, form, segment_ids=None, window=None):
    return attention(**arrays, cache=state, segment_ids=segment_ids, form=form, window=window)


def convolution_call(arrays, state, form, segment_ids=None):
    weight, bias = convolution_weights(arrays["x"].dtype)
    return short_convolution(arrays["x"], weight, bias, state=state, segment_ids=segment_ids, activation="silu")


def convolution_weights(dtype):
    rng = np.random.default_rng(1)
    return rng.normal(size=(W, H * K)).astype(dtype), rng.normal(size=H * K).astype(dtype)


def random_state(rng, dtype):
    return rng.normal(size=(B, H, K, V)).astype(dtype)


def random_cache(rng, dtype, groups, slots):
    """A cache into which 7 tokens went, around the ring's end if it is shorter."""
    positions = np.full((B, slots), -1, np.int32)
    positions[:, np.arange(7) % slots] = np.arange(7)
    k, v = (rng.normal(size=(B, slots, groups, size)).astype(dtype) for size in (K, V))
    return {"k": k, "v": v, "positions": positions, "count": np.array(7, np.int32)}


class Op(NamedTuple):
    inputs: Callable  # rng, T -> arrays [B, T, ..]
    call: Callable  # arrays, state, form, segment_ids -> output, state
    state: Callable  # rng, dtype -> a state to start from
    oracle: Callable  # arrays in numpy, one document from nothing -> output
    forms: tuple[str, ...]


FORMS = ("recurrent", "parallel", "chunked")
WINDOW = 6
# Attention's ring has room for little more than the window, or else for all tokens of these tests.
OPS = {
    "linear": Op(mixer_inputs, linear_call, random_state, linear_oracle, FORMS),
    "linear, scalar decay": Op(partial(mixer_inputs, decay="scalar"), linear_call, random_state, linear_oracle, FORMS),
    "linear, vector decay": Op(partial(mixer_inputs, decay="vector"), linear_call, random_state, linear_oracle, FORMS),
    "delta": Op(delta_inputs, delta_call, random_state, delta_oracle, FORMS),
    "delta, scalar decay": Op(
        partial(delta_inputs, decay="scalar"), delta_call, random_state, delta_oracle, FORMS,
    ),
    "delta, vector decay": Op(
        partial(delta_inputs, decay="vector"), delta_call, random_state, delta_oracle, FORMS,
    ),
    "delta, gates": Op(
        partial(delta_inputs, decay="vector", gates=True), delta_call, random_state, delta_oracle,
        FORMS,
    ),
    "dplr": Op(dplr_inputs, partial(recurrence_call, dplr_delta_rule), random_state, dplr_oracle, FORMS),
    "attention": Op(
        partial(mixer_inputs, groups=G), attention_call, partial(random_cache, groups=G, slots=64),
        attention_oracle, FORMS,
    ),
    "attention, window": Op(
        mixer_inputs, partial(attention_call, window=WINDOW), partial(random_cache, groups=H, slots=WINDOW + 2),
        partial(attention_oracle, window=WINDOW), FORMS,
    ),
    "convolution": Op(
        lambda rng, T: {"x": rng.normal(size=(B, T, H * K))}, convolution_call,
        lambda rng, dtype: rng.normal(size=(B, W - 1, H * K)).astype(dtype),
        lambda x: convolution_oracle(x, *convolution_weights(x.dtype)), ("only",),
    ),
}  # fmt: skip
each_op = pytest.mark.parametrize("name", OPS)


def lane(name, form, *rest):
    """The delta rules' parallel form is the chunked one with a single chunk, GDN-2's gates are one more product: what these
    cost to compile, they rarely tell."""
    slow = (form == "parallel" and name.startswith(("delta,", "dplr"))) or name == "delta, gates"
    return pytest.param(name, form, *rest, marks=pytest.mark.slow if slow else ())


each_form = pytest.mark.parametrize(("name", "form"), [lane(name, form) for name, op in OPS.items() for form in op.forms])

# Runs of one token, a re-used id and, in row 1, one document alone; the documents as (row, start, end) below.
SEGMENTS = np.array([[3] * 4 + [1] + [3] * 4 + [7] * 4 + [2], [0] * 14])
DOCUMENTS = [(0, 0, 4), (0, 4, 5), (0, 5, 9), (0, 9, 13), (0, 13, 14), (1, 0, 14)]
T = SEGMENTS.shape[1]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Attention blocks so small that these short sequences take several, in a loop and alone."""
    monkeypatch.setattr(attention_module, "SMALL_BLOCK", 2)
    monkeypatch.setattr(attention_module, "BLOCK", 3)
    monkeypatch.setattr(attention_module, "SPANS", 2)


def make(op: Op, dtype=np.float64, length=T, seed=0):
    """Inputs and a state, in numpy, whose slices compile nothing."""
    rng = np.random.default_rng(seed)
    return {name: x.astype(dtype) for name, x in op.inputs(rng, length).items()}, op.state(rng, dtype)


def fresh(state):
    """The state at the start of a document."""
    state = jax.tree.map(np.zeros_like, state)
    return {**state, "positions": state["positions"] - 1} if isinstance(state, dict) else state


@cache
def jitted(name, form):
    """One jitted function for all tests, so that they share what it compiles."""
    return jax.jit(lambda arrays, state, segment_ids=None: OPS[name].call(arrays, state, form, segment_ids))


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@jax.jit
def live(state):
    """A state as values to compare: of a cache, the keys and values in use in the order of their positions."""
    if not isinstance(state, dict):
        return state
    order = jnp.argsort(state["positions"], axis=1)
    used = jnp.take_along_axis(state["positions"], order, 1)
    pick = lambda x: jnp.where(used[..., None, None] >= 0, jnp.take_along_axis(x, order[..., None, None], 1), 0)  # noqa: E731
    return {"k": pick(state["k"]), "v": pick(state["v"]), "positions": used}


def assert_close(got, wanted, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())),
        *jax.device_get((got, wanted)),
    )


@cache
def gradients(name, form, case):
    """Output, new state, and gradients of every float input and state leaf from random cotangents of all these."""
    op = OPS[name]
    arrays, state = make(op, length=3 if case == "shorter than a chunk" else T)
    segment_ids = jnp.asarray(SEGMENTS) if case == "packed" else None

    def loss(inputs):
        arrays, leaves = inputs
        leaves = iter(leaves)
        entering = jax.tree.map(lambda x: next(leaves) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
        o, new_state = op.call(arrays, entering, form, segment_ids)
        new_state = live(new_state)
        rng = np.random.default_rng(9)
        return sum(jnp.sum(x * rng.normal(size=x.shape)) for x in [o, *floats(new_state)]), (o, new_state)

    return jax.jit(jax.grad(loss, has_aux=True))((arrays, floats(state)))


@pytest.mark.usefixtures("x64")
@each_op
def test_first_form_is_the_definition(name):
    op = OPS[name]
    arrays, state = make(op)
    o, _ = jitted(name, op.forms[0])(arrays, fresh(state), SEGMENTS)
    for row, start, end in DOCUMENTS:
        document = {n: x[row : row + 1, start:end] for n, x in arrays.items()}
        assert_close(np.asarray(o)[row, start:end], op.oracle(**document)[0], 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "form", "case"),
    [
        lane(name, form, case)
        for name, op in OPS.items()
        for form in op.forms[1:]
        for case in ("packed", "plain", "shorter than a chunk")
        if case != "shorter than a chunk" or "attention" not in name
    ],
)
def test_forms_agree_with_gradients(name, form, case):
    got, wanted = gradients(name, form, case), gradients(name, OPS[name].forms[0], case)
    assert_close(got, wanted, 1e-10)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(wanted[0]))


@each_form
def test_later_tokens_change_nothing_before_them_to_the_bit(name, form):
    op = OPS[name]
    arrays, state = make(op, np.float32)
    other, _ = make(op, np.float32, seed=1)
    before = np.asarray(jitted(name, form)(arrays, state)[0])
    for t in range(1, T):
        changed = jax.tree.map(lambda x, y, t=t: np.concatenate([x[:, :t], y[:, t:]], axis=1), arrays, other)
        after = np.asarray(jitted(name, form)(changed, state)[0])
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t], after[:, t])


@pytest.mark.usefixtures("x64")
@each_form
def test_packed_documents_are_as_alone(name, form):
    arrays, state = make(OPS[name])
    packed, packed_state = jitted(name, form)(arrays, state, SEGMENTS)
    for row, start, end in DOCUMENTS:
        alone = {n: x[:, start:end] for n, x in arrays.items()}
        o, final = jitted(name, form)(alone, state if start == 0 else fresh(state))
        assert_close(np.asarray(packed)[row, start:end], np.asarray(o)[row], 1e-12)
        if end == T:
            assert_close(
                *(jax.tree.map(lambda x, row=row: np.asarray(x)[row], live(x)) for x in (packed_state, final)), 1e-12
            )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cuts", [(1, 5, 9, 13), (4, 8, 12, 13), tuple(range(1, T))], ids=str)
@each_form
def test_any_split_gives_the_same(name, form, cuts):
    arrays, state = make(OPS[name])
    whole, final = jitted(name, form)(arrays, state)
    parts = []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        o, state = jitted(name, form)({n: x[:, start:end] for n, x in arrays.items()}, state)
        parts.append(o)
    assert_close(np.concatenate(parts, axis=1), np.asarray(whole), 1e-12)
    assert_close(live(state), live(final), 1e-12)


@each_op
def test_sharded_over_batch_and_heads_without_gathering(name):
    op = OPS[name]
    arrays, state = make(op, np.float32)

    def loss(arrays, state):
        o, new_state = op.call(arrays, state, op.forms[-1], jnp.asarray(SEGMENTS))
        return sum(jnp.sum(jnp.sin(x)) for x in [o, *floats(new_state)]), o

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def place(x, heads_axis):
        axes = [None] * x.ndim
        if x.ndim > 0:
            axes[0] = "data"
        if x.ndim > 2:
            axes[heads_axis] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    recurrent_state = not isinstance(state, dict) and state.ndim == 4  # [B, H, K, V]
    sharded = (
        {n: place(x, 2) for n, x in arrays.items()},
        jax.tree.map(lambda x: place(x, 1 if recurrent_state else 2), state),
    )
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = step.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text(), collective
    assert_close(compiled(*sharded), step(arrays, state), 1e-5)


@each_op
def test_low_precision_stays_near_float32(name):
    op = OPS[name]
    arrays, _ = make(op, np.float32, length=64)
    low = {n: x if n in ("log_decay", "beta", "write") else x.astype(jnp.bfloat16) for n, x in arrays.items()}
    exact = {n: x.astype(np.float32) for n, x in low.items()}

    def run(arrays, form):
        def loss(arrays):
            o, _ = op.call(arrays, None, form)
            return jnp.sum(o.astype(jnp.float32) * np.random.default_rng(3).normal(size=o.shape)), o

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    wanted_grads, wanted = run(exact, op.forms[0])
    grads, got = run(low, op.forms[-1])
    assert got.dtype == jnp.bfloat16
    # Steps that reflect (beta near 2) do not damp what rounding the state did.
    assert relative_rms(got, wanted) < (0.008 if name.startswith("delta") else 0.005)
    for n, grad in grads.items():
        assert grad.dtype == low[n].dtype
        assert relative_rms(grad, wanted_grads[n]) < 0.02, n


def relative_rms(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


def test_every_form_of_every_op_is_tested_here():
    here = {"linear_attention", "delta_rule", "dplr_delta_rule", "attention"}
    # Other shapes or semantics: test_diagonal_op.py, test_log_linear_op.py, test_ttt_ops.py.
    elsewhere = {"diagonal_recurrence", "log_linear_attention", "ttt_linear", "miras"}
    assert set(forms.OPS) == here | elsewhere
    assert all(set(forms.OPS[op]) == {*FORMS, "kernel"} for op in here)
