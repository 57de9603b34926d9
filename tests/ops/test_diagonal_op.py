"""What is particular to the diagonal recurrences: FFT, pieces and their transitions, memory, accuracy, errors."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import diagonal, kernels
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan
from tests.ops import cases
from tests.ops.cases import OPS, B, C, H, K

FUNCTIONS = {
    "diagonal": diagonal_recurrence, "diagonal, fixed": diagonal_recurrence, "diagonal, fixed complex": diagonal_recurrence,
    "ssm": diagonal_ssm, "selective": selective_scan,
}  # fmt: skip


def make(name, dtype=np.float64, length=14):
    return cases.make(OPS[name], dtype, length)


def assert_close(got, wanted, tolerance=1e-11):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())),
        *jax.device_get((got, wanted)),
    )


def gradient(name, form, chunk_size=64):
    """Gradients of arrays and state from random cotangents, output and final state."""

    def loss(arrays, state):
        out = FUNCTIONS[name](**arrays, initial_state=state, form=form, chunk_size=chunk_size)
        rng = np.random.default_rng(9)
        return sum(jnp.sum(jnp.real(x * cases.normal(rng, *x.shape, complex_=True))) for x in out), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["diagonal, fixed", "diagonal, fixed complex", "ssm"])
def test_fft_equals_the_recurrent_form_with_gradients(name):
    arrays, state = make(name)
    state = None if name == "ssm" else state
    got, wanted = (gradient(name, form, C)(arrays, state) for form in ("fft", "recurrent"))
    assert_close(got, wanted)
    assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(wanted[0]))


RUNS = {
    "diagonal": (
        diagonal.run_diagonal,
        lambda arrays, reset: diagonal.diagonal_transition(arrays["log_a"], reset, arrays["b"].shape),
    ),
    "ssm": (diagonal.run_ssm, lambda arrays, reset: diagonal.ssm_transition(arrays["a"], reset, arrays["u"].shape[1])),
    "selective": (
        diagonal.run_selective, lambda arrays, reset: diagonal.selective_transition(arrays["dt"], arrays["a"], reset)
    ),
}  # fmt: skip
RUNS["diagonal, fixed complex"] = RUNS["diagonal"]


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


def pairs_as_complex(x):
    return x[..., 0, :] + 1j * x[..., 1, :]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_rows_that_end_earlier_leave_the_state_of_their_last_token(form, packed):
    """Rows of all lengths from 0 to T, with what the transition says of them."""
    T = 14
    arrays, state = make("ssm", length=T)
    lengths, state = np.arange(T + 1), state[:1].repeat(T + 1, 0)
    u = np.where(np.arange(T)[:, None] < lengths[:, None, None], arrays["u"][:1], 0)
    reset = np.isin(np.arange(T), (2, 3, 9))[None].repeat(T + 1, 0) if packed else None
    options = {"form": form, "chunk_size": C, "lengths": lengths}
    run = jax.jit(lambda state: diagonal.run_ssm(u, arrays["a"], arrays["c"], reset, state, **options))
    (y, final), (_, written) = run(state), run(np.zeros_like(state))
    m = diagonal.ssm_transition(arrays["a"], reset, T, jnp.asarray(lengths))
    assert_close(pairs_as_complex(final), pairs_as_complex(m) * pairs_as_complex(state) + pairs_as_complex(written))

    a, c, h = *(pairs_as_complex(arrays[name]) for name in ("a", "c")), pairs_as_complex(state)
    for t in range(T):
        h = 0 * h if packed and reset[0, t] else h
        counts = (t < lengths)[:, None]
        h = np.where(counts[..., None], a * h + u[:, t, :, None], h)
        assert_close(np.where(counts, y[:, t], 0), np.where(counts, (c * h).sum(-1).real, 0))
    assert_close(pairs_as_complex(final), h)


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
        loss = lambda arrays: jnp.sum(FUNCTIONS[name](**arrays, segment_ids=ids, form=form, chunk_size=size)[0] ** 2)  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr
        return max(math.prod(x.aval.shape) for equation in every_equation(jaxpr) for x in equation.outvars)

    # One pair of states a chunk and channel, or b and c themselves.
    assert largest("chunked") <= length * 2 * 2 * states // size + length * states
    assert largest("recurrent") >= length * 2 * states


@pytest.mark.parametrize("name", ["diagonal", "ssm", "selective"])
def test_float32_accuracy(name):
    """Slow, fast and turning states over many chunks, values and gradients of chunks of 64 against float64."""
    rng = np.random.default_rng(0)
    length = 300
    arrays, state = make(name, np.float32, length=length)
    if name == "ssm":
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), size=(H, 1)))
        a = np.exp(dt * (-0.5 + 1j * np.pi * np.arange(K) * 10))
        arrays["a"] = np.stack([a.real, a.imag], 1).astype(np.float32)

    got = jax.device_get(gradient(name, "chunked")(arrays, state))
    with jax.enable_x64(True):
        double = lambda x: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
        wanted = jax.device_get(gradient(name, "recurrent")(*jax.tree.map(double, (arrays, state))))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == (np.complex64 if np.iscomplexobj(y) else np.float32)
        assert np.sqrt(np.mean(np.abs(x - y) ** 2) / np.mean(np.abs(y) ** 2)) < 1e-5


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
