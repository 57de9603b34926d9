"""What holds for every op in every form: a new op adds a line to OPS, and an oracle."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlm.ops.attention as attention_module
from jaxlm.ops import forms
from tests.ops.cases import FAST_WEIGHTS, GATES, OPS, cut, fresh, make, normal

# What these cost to compile, they rarely tell: one more product, or an option of their siblings.
SIBLINGS = ("delta, gates", "diagonal, fixed complex", "yaad", "moneta, printed", "moneta, p = q = 2")
# Of these gradients, then also shards and low precision, which cost the most.
DEAR = ("diagonal, fixed", "diagonal, complex", "moneta", "memora")
DEARER = (*DEAR, "ssm", "log-linear", "ttt")


def lane(name, *rest, dear=()):
    """The parallel form of these is the chunked one with a single chunk."""
    parallel = "parallel" in rest and name.startswith(("delta,", "dplr", "ssm", "log-linear"))
    slow = parallel or name in (*SIBLINGS, *dear)
    return pytest.param(name, *rest, marks=pytest.mark.slow if slow else ())


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


@cache
def jitted(name, form):
    """One jitted function for all tests, so that they share what it compiles."""
    return jax.jit(lambda arrays, state, segment_ids=None: OPS[name].call(arrays, state, form, segment_ids))


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


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
        entering = jax.tree.map(lambda x: next(leaves) if jnp.issubdtype(x.dtype, jnp.inexact) else x, state)
        o, new_state = op.call(arrays, entering, form, segment_ids)
        new_state = live(new_state)
        rng = np.random.default_rng(9)
        weigh = lambda x: jnp.sum(jnp.real(x * normal(rng, *x.shape, complex_=jnp.iscomplexobj(x))))  # noqa: E731
        return sum(weigh(x) for x in [o, *floats(new_state)]), (o, new_state)

    return jax.jit(jax.grad(loss, has_aux=True))((arrays, floats(state)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPS)
def test_first_form_is_the_definition(name):
    op = OPS[name]
    arrays, state = make(op)
    o, _ = jitted(name, op.forms[0])(arrays, fresh(state), SEGMENTS)
    for row, start, end in DOCUMENTS:
        document = cut(op, arrays, slice(start, end), slice(row, row + 1))
        assert_close(np.asarray(o)[row, start:end], op.oracle(**document)[0], op.exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "form", "case"),
    [
        lane(name, form, case, dear=DEAR)
        for name, op in OPS.items()
        for form in op.forms[1:]
        for case in ("packed", "plain", "shorter than a chunk")
        if case != "shorter than a chunk" or (form == "chunked" and name not in FAST_WEIGHTS and "attention" not in name)
    ],
)
def test_forms_agree_with_gradients(name, form, case):
    got, wanted = gradients(name, form, case), gradients(name, OPS[name].forms[0], case)
    assert_close(got, wanted, max(1e-10, 10 * OPS[name].exact))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(wanted[0]))


@each_form
def test_later_tokens_change_nothing_before_them_to_the_bit(name, form):
    op = OPS[name]
    arrays, state = make(op, np.float32)
    other, _ = make(op, np.float32, seed=1)
    before = np.asarray(jitted(name, form)(arrays, state)[0])
    for t in range(1, T):
        later = {n: np.concatenate([x[:, :t], other[n][:, t:]], axis=1) for n, x in arrays.items() if n not in op.fixed}
        after = np.asarray(jitted(name, form)(arrays | later, state)[0])
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t], after[:, t])


@pytest.mark.usefixtures("x64")
@each_form
def test_packed_documents_are_as_alone(name, form):
    op = OPS[name]
    arrays, state = make(op)
    packed, packed_state = jitted(name, form)(arrays, state, SEGMENTS)
    for row, start, end in DOCUMENTS:
        o, final = jitted(name, form)(cut(op, arrays, slice(start, end)), state if start == 0 else fresh(state))
        assert_close(np.asarray(packed)[row, start:end], np.asarray(o)[row], op.exact)
        if end == T:
            of_row = partial(jax.tree.map, lambda x, row=row: np.asarray(x)[row])
            assert_close(of_row(live(packed_state)), of_row(live(final)), op.exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cuts", [(1, 5, 9, 13), (4, 8, 12, 13), tuple(range(1, T))], ids=str)
@each_form
def test_any_split_gives_the_same(name, form, cuts):
    op = OPS[name]
    arrays, state = make(op)
    whole, final = jitted(name, form)(arrays, state)
    parts = []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        o, state = jitted(name, form)(cut(op, arrays, slice(start, end)), state)
        parts.append(o)
    assert_close(np.concatenate(parts, axis=1), np.asarray(whole), op.exact)
    assert_close(live(state), live(final), op.exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [lane(name, dear=DEARER) for name in OPS])
def test_sharded_over_batch_and_heads_without_gathering(name):
    op = OPS[name]
    arrays, state = make(op)

    def loss(arrays, state):
        o, new_state = op.call(arrays, state, op.forms[-1], jnp.asarray(SEGMENTS))
        return sum(jnp.sum(jnp.sin(x.real) + jnp.cos(x.imag)) for x in [o, *floats(new_state)]), o

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def place(x, batch, heads):
        """With axis 0 split over `data` and axis `heads` over `tensor`, where x has them."""
        axes = [None] * x.ndim
        if batch and x.ndim:
            axes[0] = "data"
        if heads is not None and x.ndim > max(heads, 1):
            axes[heads] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    def place_input(name, x):
        fixed = name in op.fixed
        return place(x, not fixed, None if name in op.shared else 0 if fixed else 2)

    sharded = (
        {n: place_input(n, x) for n, x in arrays.items()},
        jax.tree.map(lambda x: place(x, True, op.heads if x.ndim > 2 else None), state),
    )
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = step.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text(), collective
    assert_close(compiled(*sharded), step(arrays, state), 100 * op.exact)


@pytest.mark.parametrize("name", [lane(name, dear=DEARER) for name, op in OPS.items() if op.low])
def test_low_precision_stays_near_float32(name):
    op = OPS[name]
    arrays, _ = make(op, np.float32, length=64)
    low = {n: x if n in op.fixed or n in GATES else x.astype(jnp.bfloat16) for n, x in arrays.items()}
    exact = {n: x.astype(np.float32) for n, x in low.items()}

    def run(arrays, form):
        def loss(arrays):
            o, state = op.call(arrays, None, form)
            return jnp.sum(o.astype(jnp.float32) * np.random.default_rng(3).normal(size=o.shape)), (o, state)

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    wanted_grads, (wanted, _) = run(exact, op.forms[0])
    grads, (got, state) = run(low, op.forms[-1])
    assert got.dtype == jnp.bfloat16
    # A convolution's are inputs; attention was given no cache.
    assert name == "convolution" or all(x.dtype == jnp.float32 for x in floats(state))
    assert relative_rms(got, wanted) < op.low[0]
    for n, grad in grads.items():
        assert grad.dtype == low[n].dtype
        assert relative_rms(grad, wanted_grads[n]) < op.low[1], n


def relative_rms(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


def test_every_form_of_every_op_is_tested_here():
    assert {op.name for op in OPS.values()} == {*forms.OPS, "short_convolution"}
    for op in OPS.values():
        # By FFT later tokens change how earlier outputs are rounded: test_diagonal_op.py.
        assert {*op.forms, "kernel", "fft"} >= set(forms.OPS.get(op.name, ())), op.name
