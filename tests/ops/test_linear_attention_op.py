"""What is particular to linear attention: memory, accuracy in float32, shapes, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.ops.chunks import GROUPS
from jaxlm.ops.linear_attention import linear_attention


def inputs(seed, B, T, H, K, V, decay, dtype=jnp.float32, decays=(0.0, -1e-7, -0.01, -0.3, -2.0, -20.0, -80.0)):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(B, 1, H, K)) + 0.3 * rng.normal(size=(B, T, H, K))
    arrays = [rng.normal(size=(B, T, H, K)), k, rng.normal(size=(B, T, H, V))]
    if decay:
        arrays.append(rng.choice(decays, size=(B, T, H) if decay == "scalar" else (B, T, H, K)))
    state = rng.normal(size=(B, H, K, V))
    return tuple(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(state, dtype)


def value_and_gradients(form, chunk_size=64):
    def loss(arrays, state):
        o, final = linear_attention(*arrays, initial_state=state, form=form, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final)), (o, final)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def every_equation(jaxpr):
    """In loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_gradient_holds_nothing_quadratic_and_no_state_a_token(decay):
    B, T, H, K, V, C = 1, 512, 2, 16, 16, 16
    arrays, state = inputs(0, B, T, H, K, V, decay)

    def largest(form):
        jaxpr = jax.make_jaxpr(value_and_gradients(form, C))(arrays, state)
        return max(math.prod(x.aval.shape) for equation in every_equation(jaxpr.jaxpr) for x in equation.outvars)

    # The largest inputs and scores of chunks have B T H max(K, V, C) elements, and the chunk states B H K V T/C.
    bound = B * T * H * max(K, V, C, K * V // C)
    assert largest("chunked") <= bound
    assert largest("parallel") >= B * H * T * T
    assert largest("recurrent") >= B * H * T * K * V


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_memory_of_the_gradient_is_linear_and_a_few_times_the_inputs(decay):
    used = []
    for T in (1024, 2048):
        arrays, state = inputs(0, 2, T, 4, 64, 64, decay)
        compiled = value_and_gradients("chunked").lower(arrays, state).compile()
        used.append(compiled.memory_analysis().temp_size_in_bytes / sum(x.nbytes for x in arrays))
    assert used[1] < 4
    assert used[1] < 1.1 * used[0]


@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_residuals_are_the_inputs_and_a_state_a_group(decay):
    arrays, state = inputs(0, 1, 64, 2, 8, 8, decay)
    _, pullback = jax.vjp(
        lambda *x: linear_attention(*x[:-1], initial_state=x[-1], form="chunked", chunk_size=8), *arrays, state
    )
    kept = sum(x.size for x in jax.tree.leaves(pullback) if x.ndim > 0)
    assert kept <= sum(x.size for x in arrays) + GROUPS * state.size


@pytest.mark.parametrize("decay", [None, "scalar", "vector"])
def test_bfloat16_products_are_summed_in_float32(decay):
    arrays, state = inputs(0, 1, 8, 2, 4, 4, decay)
    low = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])
    jaxpr = jax.make_jaxpr(value_and_gradients("chunked", 4))(low, state)
    products = [equation for equation in every_equation(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) > 10
    assert all(equation.outvars[0].aval.dtype == jnp.float32 for equation in products)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_float32_accuracy_beside_strong_decays(decay):
    """Cumulative sums that reach -80 * 64 would leave weak decays after them three digits."""
    arrays, state = inputs(0, 2, 128, 2, 8, 12, decay, decays=(0.0, -0.01, -0.3, -80.0))
    got = value_and_gradients("chunked")(arrays, state)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (arrays, state))
        wanted = value_and_gradients("recurrent")(*exact)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        assert np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)) < 2e-6


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_only_zero_and_only_strong_decays(decay):
    call = jax.jit(lambda *x: linear_attention(*x[:-1], initial_state=x[-1], form="chunked", chunk_size=16))
    (q, k, v, zero), state = inputs(0, 1, 20, 1, 4, 4, decay, decays=(0.0,))
    undecayed = linear_attention(q, k, v, initial_state=state, form="recurrent")
    # At -80 every token sees itself alone.
    alone = 0.5 * jnp.sum(q * k, axis=-1, keepdims=True) * v, jnp.einsum("bhk,bhv->bhkv", k[:, -1], v[:, -1])
    for decays, wanted in ((zero, undecayed), (zero - 80, alone)):
        for x, y in zip(call(q, k, v, decays, state), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(
    T=st.integers(1, 40), C=st.sampled_from([1, 2, 8, 64]), K=st.integers(1, 4), V=st.integers(1, 4),
    decay=st.sampled_from([None, "scalar", "vector"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_shapes(T, C, K, V, decay, seed):
    arrays, state = inputs(seed, 1, T, 2, K, V, decay)
    segment_ids = jnp.asarray(np.random.default_rng(seed).integers(0, 2, size=(1, T)))
    got, wanted = jax.jit(
        lambda *x: [
            linear_attention(*x, initial_state=state, segment_ids=segment_ids, chunk_size=C, form=form)
            for form in ("chunked", "recurrent")
        ]
    )(*arrays)
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()))


def test_defaults():
    """scale is K ** -0.5, the state starts at zero and is float32 for bfloat16 inputs, o has v's dtype."""
    (q, k, v), _ = inputs(0, 1, 9, 2, 4, 3, None)
    o, final = linear_attention(q, k, v)
    np.testing.assert_allclose(o[:, 0], 0.5 * jnp.sum(q * k, -1, keepdims=True)[:, 0] * v[:, 0], rtol=1e-5)
    doubled, _ = linear_attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(doubled, 2 * o, rtol=1e-5, atol=1e-6)
    low, low_final = linear_attention(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    assert (low.dtype, low_final.dtype, final.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 4, 1, 3))}, "k must have the shape of q"),
        ({"v": jnp.zeros((1, 5, 2, 3))}, "v must be"),
        ({"log_decay": jnp.zeros((1, 4))}, "log_decay must be"),
        ({"initial_state": jnp.zeros((1, 2, 5, 3))}, "initial_state must be"),
        ({"segment_ids": jnp.zeros((1, 3), jnp.int32)}, "segment_ids must be"),
        ({"segment_ids": jnp.zeros((1, 4))}, "segment_ids must be integers"),
        ({"chunk_size": 48}, "chunk_size must be a power of two"),
        ({"form": "quick"}, "choose auto or one of recurrent, parallel, chunked"),
    ],
)
def test_errors_name_the_argument(change, message):
    arrays = {"q": jnp.zeros((1, 4, 2, 3)), "k": jnp.zeros((1, 4, 2, 3)), "v": jnp.zeros((1, 4, 2, 3))}
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**arrays, **change})
