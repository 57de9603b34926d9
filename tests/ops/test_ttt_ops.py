"""What is particular to TTT-Linear, Moneta, Yaad and Memora: whole chunks, the branches of Yaad, memory, errors."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.fast_weights import FastState, ttt_linear
from tests.ops.cases import FAST_WEIGHTS, INNER, INNER_WEIGHTS, OPS, B, C, fresh, make

T, (H, D, E) = 16, INNER


@cache
def jitted(name):
    call = OPS[name].call
    return jax.jit(lambda arrays, state=None: {form: call(arrays, state, form) for form in OPS[name].forms})


@pytest.mark.parametrize(
    "name", ["ttt", *(pytest.param(name, marks=pytest.mark.slow) for name in FAST_WEIGHTS if name != "ttt")]
)
def test_rows_without_a_state_of_one_document_are_whole_chunks(x64, name):
    arrays, state = make(OPS[name], length=11)
    wanted, wanted_state = jitted(name)(arrays, fresh(state))["recurrent"]
    for o, final in jitted(name)(arrays).values():
        np.testing.assert_allclose(o, wanted, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(final.position, [3, 3])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), final, wanted_state)


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_states_of_miras():
    arrays, state = make(OPS["yaad"], np.float32, 2 * C)
    low = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in arrays.items()}
    exact = jitted("yaad")({n: x.astype(np.float32) for n, x in low.items()}, fresh(state))["recurrent"][0]
    for o, final in jitted("yaad")(low, fresh(state)).values():
        assert o.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(final[:2])} == {jnp.dtype(jnp.float32)}
        assert np.linalg.norm(np.asarray(o, np.float32) - exact) < 0.03 * np.linalg.norm(exact)


def test_thresholds_of_yaad_split_the_errors():
    """Else the equations would test one branch alone: with thresholds out of reach the outputs are others."""
    arrays, state = make(OPS["yaad"], np.float32)
    run = jax.jit(lambda arrays: OPS["yaad"].call(arrays, state, "recurrent")[0])
    got, far, near = (run(arrays | {"threshold": factor * arrays["threshold"]}) for factor in np.float32([1, 100, 1e-6]))
    assert min(np.abs(got - far).max(), np.abs(got - near).max()) > 0.1


def test_gradient_keeps_about_the_square_root_of_the_states():
    """256 chunks of a state with 2 (16 16 + 16) elements: never more than 16 of them together."""
    x = jnp.zeros((1, 1024, 1, 16))
    weights = {"w": jnp.zeros((1, 16, 16)), "b": jnp.zeros((1, 16))}
    norm = jnp.ones((1, 16))

    def loss(x, weights):
        return jnp.sum(ttt_linear(x, x, x, x[..., 0], jnp.ones(4), weights, norm, norm, chunk_size=4)[0] ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert max(math.prod(shape) for shape in shapes if shape[-2:] == (16, 16)) == 16 * 16 * 16
    assert max(map(math.prod, shapes)) == x.size


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ttt", {"k": jnp.zeros((B, T, H, D + 1))}, "k must have the shape of q"),
        ("ttt", {"rate": jnp.zeros((B, T, H, D))}, r"rate must be \(2, 16, 2\)"),
        ("ttt", {"token_scale": jnp.zeros(3)}, r"token_scale must be \(4,\)"),
        ("ttt", {"weights": {"w": jnp.zeros((H, D, E)), "b": jnp.zeros((H, D))}}, r"weights\['w'\] must be \(2, 4, 4\)"),
        ("ttt", {"form": "parallel"}, "form='parallel' is not a form of ttt_linear"),
        ("yaad", {"threshold": jnp.zeros((B, T, H, D))}, "threshold must be"),
        ("yaad", {"chunk_size": 6}, "chunk_size must be a power of two, got 6"),
        ("memora", {"log_decay": jnp.zeros((B, T, H))}, "log_decay must be"),
        ("memora", {"initial_state": FastState({}, {}, None, jnp.zeros(B))}, "see ttt_state and miras_state"),
        ("moneta", {"q_norm": 2.5}, "q_norm must be 2 or at least 3, got 2.5"),
        ("moneta", {"p": 0.5}, "p must be at least 1, got 0.5"),
        ("moneta", {"retention": "none"}, 'choose "gradient" or "printed"'),
    ],
)
def test_input_that_does_not_fit_is_named(name, changes, message):
    arrays, _ = make(OPS[name], np.float32, T)
    weights = {n: arrays.pop(n) for n in INNER_WEIGHTS if n in arrays}
    with pytest.raises(ValueError, match=message):
        FAST_WEIGHTS[name][0](**{**arrays, "weights": weights, "chunk_size": C, **changes})
