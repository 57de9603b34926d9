"""The three diagonal recurrences: against their definitions, every form and its gradient, packing, states, shards, memory."""

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.ops import diagonal, kernels
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan

B, D, N, C = 2, 4, 3, 4
DECAYS = np.array([0.0, -1e-7, -0.01, -0.3, -2.0, -20.0, -80.0])

# Runs of one token, a re-used id and, in row 1, one document alone; the documents as (row, start, end) below.
SEGMENTS = np.array([[3] * 4 + [1] + [3] * 4 + [7] * 4 + [2], [0] * 14])
DOCUMENTS = [(0, 0, 4), (0, 4, 5), (0, 5, 9), (0, 9, 13), (0, 13, 14), (1, 0, 14)]
T = SEGMENTS.shape[1]


def normal(rng, *shape, complex_=False):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape) if complex_ else rng.normal(size=shape)


def diagonal_inputs(rng, length, *, fixed, complex_):
    """Two channel axes; decays that mix exactly 0, tiny and down to -80, turning by any angle."""
    log_a = rng.choice(DECAYS, size=(2, D) if fixed else (B, length, 2, D))
    return {
        "log_a": log_a + 1j * rng.uniform(-3, 3, size=log_a.shape) if complex_ else log_a,
        "b": normal(rng, B, length, 2, D, complex_=complex_),
    }


def diagonal_oracle(arrays, row, start, end, h):
    b, out = arrays["b"], []
    for t in range(start, end):
        h = np.exp(arrays["log_a"] if arrays["log_a"].ndim == 2 else arrays["log_a"][row, t]) * h + b[row, t]
        out.append(h)
    return np.array(out), h


def ssm_inputs(rng, length):
    a = np.exp(rng.choice(DECAYS, size=(D, N)) + 1j * rng.uniform(-3, 3, size=(D, N)))
    return {
        "u": normal(rng, B, length, D),
        "a": np.stack([a.real, a.imag], axis=1),
        "c": normal(rng, D, 2, N),
    }


def ssm_oracle(arrays, row, start, end, h):
    a, c = (arrays[n][:, 0] + 1j * arrays[n][:, 1] for n in ("a", "c"))
    h = h[:, 0] + 1j * h[:, 1]
    out = []
    for t in range(start, end):
        h = a * h + arrays["u"][row, t][:, None]
        out.append((c * h).sum(-1).real)
    return np.array(out), np.stack([h.real, h.imag], axis=1)


def selective_inputs(rng, length):
    return {
        "u": normal(rng, B, length, D),
        "dt": rng.choice(-DECAYS, size=(B, length, D)),
        "a": -rng.uniform(0.3, 1, size=(D, N)),
        "b": normal(rng, B, length, N),
        "c": normal(rng, B, length, N),
    }


def selective_oracle(arrays, row, start, end, h):
    out = []
    for t in range(start, end):
        u, dt, b, c = (arrays[n][row, t] for n in ("u", "dt", "b", "c"))
        h = np.exp(dt[:, None] * arrays["a"]) * h + np.outer(dt * u, b)
        out.append(h @ c)
    return np.array(out), h


class Op(NamedTuple):
    inputs: Callable  # rng, T -> arrays
    call: Callable  # arrays, initial_state, segment_ids, form, chunk_size -> output, state
    oracle: Callable  # arrays, row, start, end, state -> outputs and the last state of that document
    state: tuple[int, ...]
    timed: tuple[str, ...]  # the arrays with a time axis
    forms: tuple[str, ...] = ("recurrent", "parallel", "chunked")


def diagonal_op(**options):
    names = ("b",) if options["fixed"] else ("log_a", "b")
    extra = ("fft",) if options["fixed"] else ()
    return Op(
        lambda rng, length: diagonal_inputs(rng, length, **options),
        lambda arrays, **rest: diagonal_recurrence(**arrays, **rest),
        diagonal_oracle, (2, D), names, ("recurrent", "parallel", "chunked", *extra),
    )  # fmt: skip


OPS = {
    "real": diagonal_op(fixed=False, complex_=False),
    "complex": diagonal_op(fixed=False, complex_=True),
    "fixed": diagonal_op(fixed=True, complex_=False),
    "fixed complex": diagonal_op(fixed=True, complex_=True),
    "ssm": Op(
        ssm_inputs, lambda arrays, **rest: diagonal_ssm(**arrays, **rest), ssm_oracle, (D, 2, N), ("u",),
        ("recurrent", "parallel", "chunked", "fft"),
    ),
    "selective": Op(
        selective_inputs, lambda arrays, **rest: selective_scan(**arrays, **rest), selective_oracle, (D, N),
        ("u", "dt", "b", "c"),
    ),
}  # fmt: skip
FAST = [(name, form) for name, op in OPS.items() for form in op.forms if form not in ("recurrent", "fft")]


def make(name, dtype=np.float64, length=T, seed=0):
    rng = np.random.default_rng(seed)
    arrays = OPS[name].inputs(rng, length)
    state = normal(rng, B, *OPS[name].state, complex_="complex" in name)
    precise = lambda x: x.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(x) else dtype)  # noqa: E731
    return {n: precise(x) for n, x in arrays.items()}, precise(state)


@cache
def run(name, form):
    """Output, new state and gradients from random cotangents of both; one jitted function for all tests."""

    def loss(inputs, segment_ids):
        arrays, state = inputs
        out = OPS[name].call(arrays, initial_state=state, segment_ids=segment_ids, form=form, chunk_size=C)
        rng = np.random.default_rng(9)
        return sum(jnp.sum(jnp.real(x * normal(rng, *x.shape, complex_=True))) for x in out), out

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_close(got, wanted, tolerance=1e-11):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())),
        *jax.device_get((got, wanted)),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "form", "packed"),
    [
        (name, form, packed)
        for name, op in OPS.items()
        for form in op.forms
        for packed in {"complex": (True,), "fixed": (False,)}.get(name, (True, False))
        if not (packed and form == "fft")
    ],
)
def test_values_and_gradients(name, form, packed):
    """Values against the definition, a state entering each row; gradients against autodiff of the token by token form."""
    op = OPS[name]
    arrays, state = make(name)
    if form == "fft" and name == "ssm":
        state = None
    gradients, (out, final) = run(name, form)((arrays, state), SEGMENTS if packed else None)
    zeros = np.zeros(op.state)
    for row, start, end in DOCUMENTS if packed else [(0, 0, T), (1, 0, T)]:
        entering = state[row] if start == 0 and state is not None else zeros
        wanted, last = op.oracle(arrays, row, start, end, entering)
        assert_close(np.asarray(out)[row, start:end], wanted)
        if end == T:
            assert_close(np.asarray(final)[row], last)
    if form != "recurrent":
        wanted, _ = run(name, "recurrent")((arrays, state), SEGMENTS if packed else None)
        assert_close(gradients, wanted)
        assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(wanted))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPS)
def test_short_pieces_continue_each_other(name):
    """Cut into pieces shorter than a chunk, longer than one, and of one token that takes the step."""
    op = OPS[name]
    arrays, state = make(name)
    for start, end in ((0, 3), (3, 4), (4, 14)):
        piece = {n: x[:, start:end] if n in op.timed else x for n, x in arrays.items()}
        out, final = jax.jit(lambda *x: op.call(x[0], initial_state=x[1], chunk_size=C))(piece, state)
        for row in range(B):
            wanted, last = op.oracle(arrays, row, start, end, np.asarray(state)[row])
            assert_close((np.asarray(out)[row], np.asarray(final)[row]), (wanted, last))
        state = final


@pytest.mark.parametrize(("name", "form"), FAST)
def test_later_tokens_change_nothing_before_them_to_the_bit(name, form):
    op = OPS[name]
    call = jax.jit(lambda arrays, state: op.call(arrays, initial_state=state, form=form, chunk_size=C)[0])
    arrays, state = make(name, np.float32)
    other, _ = make(name, np.float32, seed=1)
    before = np.asarray(call(arrays, state))
    for t in range(1, T):
        changed = {n: np.concatenate([x[:, :t], other[n][:, t:]], 1) if n in op.timed else x for n, x in arrays.items()}
        after = np.asarray(call(changed, state))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t], after[:, t])


def pairs_as_complex(x):
    return x[..., 0, :] + 1j * x[..., 1, :]


RUNS = {
    "real": (
        diagonal.run_diagonal,
        lambda arrays, reset: diagonal.diagonal_transition(arrays["log_a"], reset, arrays["b"].shape),
    ),
    "ssm": (diagonal.run_ssm, lambda arrays, reset: diagonal.ssm_transition(arrays["a"], reset, arrays["u"].shape[1])),
    "selective": (
        diagonal.run_selective, lambda arrays, reset: diagonal.selective_transition(arrays["dt"], arrays["a"], reset)
    ),
}  # fmt: skip
RUNS["fixed complex"] = RUNS["real"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "form"), [*((name, "chunked") for name in RUNS), ("ssm", "recurrent"), ("selective", "recurrent")]
)
def test_a_piece_is_its_transition_and_what_it_leaves_from_zeros(name, form):
    """S_out = M S_in + N per row, where a row's document begins at token 0, later, or before the piece."""
    arrays, state = make(name, length=6)
    if name == "selective":
        arrays["dt"] = arrays["dt"] / 80
    compute, transition = RUNS[name]

    @jax.jit
    def pieces(state, reset):
        run = lambda state: compute(*arrays.values(), reset, state, form=form, chunk_size=C)  # noqa: E731
        return run(state), run(None), transition(arrays, reset)

    number = lambda x: x[..., 0, :] + 1j * x[..., 1, :] if name == "ssm" else x  # noqa: E731
    for token in (0, 3, None):
        reset = None if token is None else np.zeros((B, 6), bool)
        if reset is not None:
            reset[0, token] = True
        (out, final), (out_0, from_zeros), m = jax.device_get(pieces(state, reset))
        assert_close(number(final), number(m) * number(state) + number(from_zeros))
        assert np.abs(m[-1]).max() > 1e-3
        assert (np.abs(m[0]).max() == 0) == (token is not None)
        if token == 0:
            np.testing.assert_array_equal(out[0], out_0[0])
            assert np.abs(out[1] - out_0[1]).max() > 0.01


def every_equation(jaxpr):
    """In loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["ssm", "selective"])
def test_states_of_all_tokens_are_never_held(name, packed):
    length, states, size = 1024, 64, 8
    shapes = {"u": (1, length, 2), "dt": (1, length, 2), "b": (1, length, states), "c": (1, length, states), "a": (2, states)}
    if name == "ssm":
        shapes = {"u": (1, length, 2), "a": (2, 2, states), "c": (2, 2, states)}
    arrays = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
    ids = jnp.zeros((1, length), jnp.int32) if packed else None

    def largest(form):
        loss = lambda arrays: jnp.sum(OPS[name].call(arrays, segment_ids=ids, form=form, chunk_size=size)[0] ** 2)  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr
        return max(math.prod(x.aval.shape) for equation in every_equation(jaxpr) for x in equation.outvars)

    # One pair of states a chunk and channel, or b and c themselves.
    assert largest("chunked") <= length * 2 * 2 * states // size + length * states
    assert largest("recurrent") >= length * 2 * states


@pytest.mark.parametrize("name", ["real", "ssm", "selective"])
def test_float32_accuracy(name):
    """Slow, fast and turning states over many chunks, values and gradients of chunks of 64 against float64."""
    rng = np.random.default_rng(0)
    length = 300
    arrays, state = make(name, np.float32, length=length)
    if name == "ssm":
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), size=(D, 1)))
        a = np.exp(dt * (-0.5 + 1j * np.pi * np.arange(N) * 10))
        arrays["a"] = np.stack([a.real, a.imag], 1).astype(np.float32)

    def gradient(form):
        def loss(arrays, state):
            out = OPS[name].call(arrays, initial_state=state, form=form)
            rng = np.random.default_rng(9)
            return sum(jnp.sum(jnp.real(x * normal(rng, *x.shape, complex_=True))) for x in out), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    got = jax.device_get(gradient("chunked")(arrays, state))
    with jax.enable_x64(True):
        double = lambda x: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
        wanted = jax.device_get(gradient("recurrent")(*jax.tree.map(double, (arrays, state))))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == (np.complex64 if np.iscomplexobj(y) else np.float32)
        assert np.sqrt(np.mean(np.abs(x - y) ** 2) / np.mean(np.abs(y) ** 2)) < 1e-5


@pytest.mark.parametrize("name", ["ssm", "selective"])
def test_low_precision_inputs_meet_float32_states(name):
    arrays, _ = make(name, np.float32, length=40)
    low = {n: x.astype(jnp.bfloat16) if n in OPS[name].timed and n not in ("log_a", "dt") else x for n, x in arrays.items()}
    exact = {n: np.asarray(x, np.float32) for n, x in low.items()}

    @jax.jit
    def call(arrays):
        def loss(arrays):
            out = OPS[name].call(arrays, chunk_size=C)
            return jnp.sum(out[0].astype(jnp.float32) * np.random.default_rng(9).normal(size=out[0].shape)), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays)
        return out, gradients

    (out, state), gradients = call(low)
    (wanted, wanted_state), wanted_gradients = call(exact)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(state, wanted_state, 1e-6)
    relative = lambda x, y: np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)  # noqa: E731
    assert relative(out, wanted) < 0.005
    for n, gradient in gradients.items():
        assert gradient.dtype == low[n].dtype
        assert relative(gradient, wanted_gradients[n]) < 0.02, n


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_sharded_over_batch_and_channels_without_gathering(name):
    op = OPS[name]
    arrays, state = make(name, np.float32)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    timed = P("data", None, None, "tensor")
    varying = {"log_a": timed, "b": timed, "state": P("data", None, "tensor")}
    fixed = varying | {"log_a": P(None, "tensor")}
    specs = {
        "real": varying, "complex": varying, "fixed": fixed, "fixed complex": fixed,
        "ssm": {"u": P("data", None, "tensor"), "a": P("tensor"), "c": P("tensor"), "state": P("data", "tensor")},
        "selective": {
            "u": P("data", None, "tensor"), "dt": P("data", None, "tensor"), "a": P("tensor"), "b": P("data"), "c": P("data"),
            "state": P("data", "tensor"),
        },
    }[name]  # fmt: skip

    def loss(arrays, state):
        out = op.call(arrays, initial_state=state, segment_ids=SEGMENTS, chunk_size=C)
        return sum(jnp.sum(jnp.sin(x.real) + jnp.cos(x.imag)) for x in out)

    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    sharded = {n: place(x, specs[n]) for n, x in arrays.items()}, place(state, specs["state"])
    compiled = step.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text(), collective
    assert_close(compiled(*sharded), step(arrays, state), 1e-5)


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_a": zeros(1, 4)}, "log_a must be .* or .* = \\(3,\\), got \\(1, 4\\)"),
        ({"b": zeros(1)}, "b must be"),
        ({"log_a": zeros(3, dtype=jnp.complex64)}, "log_a is complex and b is float32; make b complex"),
        ({"initial_state": zeros(1, 3, dtype=jnp.complex64)}, "initial_state is complex"),
        ({"initial_state": zeros(1, 2)}, "initial_state must be"),
        ({"segment_ids": zeros(1, 4)}, "segment_ids must be integers"),
        ({"chunk_size": 48}, "chunk_size must be a power of two, got 48"),
        ({"form": "quick"}, "choose auto or one of recurrent, parallel, chunked, fft"),
        ({"form": "fft", "log_a": zeros(3), "segment_ids": zeros(1, 4, dtype=jnp.int32)}, 'use form="chunked"'),
        ({"form": "fft"}, 'form="fft" takes log_a \\[\\*D\\] and no segment ids; use form="chunked"'),
    ],
)
def test_errors_of_the_recurrence_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        diagonal_recurrence(**{"log_a": zeros(1, 4, 3), "b": zeros(1, 4, 3), **change})


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (diagonal_ssm, {"u": zeros(4, 3)}, "u must be"),
        (diagonal_ssm, {"a": zeros(3, 2, 6)}, "a and c must both be"),
        (diagonal_ssm, {"initial_state": zeros(1, 3, 5)}, "initial_state must be"),
        (diagonal_ssm, {"form": "fft", "initial_state": zeros(1, 3, 2, 5)}, 'use form="chunked"'),
        (diagonal_ssm, {"form": "fft", "segment_ids": zeros(1, 4, dtype=jnp.int32)}, 'use form="chunked"'),
        (selective_scan, {"u": zeros(4, 3)}, "u must be"),
        (selective_scan, {"dt": zeros(1, 4, 1)}, "dt must have the shape of u"),
        (selective_scan, {"a": zeros(5, 3)}, "a must be"),
        (selective_scan, {"b": zeros(1, 4, 3)}, "b must be"),
        (selective_scan, {"c": zeros(1, 4, 3)}, "c must be"),
        (selective_scan, {"initial_state": zeros(1, 5, 3)}, "initial_state must be"),
        (selective_scan, {"form": "fft"}, 'use form="chunked"'),
    ],
)
def test_errors_of_the_state_space_models_name_the_argument(op, change, message):
    arrays = {"u": zeros(1, 4, 3)}
    if op is diagonal_ssm:
        arrays.update(a=zeros(3, 2, 5), c=zeros(3, 2, 5))
    else:
        arrays.update(dt=zeros(1, 4, 3), a=zeros(3, 5), b=zeros(1, 4, 5), c=zeros(1, 4, 5))
    with pytest.raises(ValueError, match=message):
        op(**{**arrays, **change})


def test_complex_numbers_need_a_backend_that_has_them(monkeypatch):
    # The mesh's device decides, as it does for the form.
    monkeypatch.setattr(kernels, "device", lambda: SimpleNamespace(platform="METAL", device_kind="M1"))
    with pytest.raises(ValueError, match="METAL has no complex numbers; use diagonal_ssm"):
        diagonal_recurrence(jnp.zeros(3), jnp.zeros((1, 4, 3), jnp.complex64))
    diagonal_recurrence(jnp.zeros(3), jnp.zeros((1, 4, 3)))
