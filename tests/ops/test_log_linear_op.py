"""What is particular to log-linear attention: digits, levels that run out, memory, errors."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import LogLinearState, levels_for, log_linear_attention, log_linear_state
from tests.ops import cases

B, T, H, K, V, L = 2, 21, 2, 3, 4, 6
# Documents that begin anywhere, one of a single token, an id that comes back; and a row of one document.
SEGMENTS = np.array([[3] * 2 + [1] + [3] * 13 + [2] * 5, [0] * T])
FORMS = {"recurrent": 64, "parallel": 64, "chunked": 4}


def inputs(seed=0, length=T, levels=L, decays=(0.0, -0.01, -0.3, -80.0)):
    # Rarely the strongest: what is older than it has no effect.
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, length, H, n)) for n in (K, K, V))
    return (
        q,
        k,
        v,
        rng.choice(decays, p=[0.3, 0.38, 0.3, 0.02], size=(B, length, H)),
        rng.uniform(0.1, 2, size=(B, length, H, levels)),
    )


@jax.jit
def every_form(arrays, segment_ids, state=None):
    return [
        log_linear_attention(
            *arrays, scale=0.5, form=form, chunk_size=size, segment_ids=segment_ids, initial_state=state
        )
        for form, size in FORMS.items()
    ]  # fmt: skip


def test_a_digit_is_the_block_that_it_stands_for(x64):
    arrays = inputs()
    (_, (digits, position)), *others = every_form(arrays, np.zeros_like(SEGMENTS))
    # 21 = 10101b: the blocks of 1, 4 and 16 tokens that end at 20, 19 and 15.
    np.testing.assert_array_equal(position, [T, T])
    _, k, v, g, _ = arrays
    block = sum(np.exp(g[:, s + 1 :].sum(1))[..., None, None] * k[:, s, :, :, None] * v[:, s, :, None] for s in range(16, 20))
    np.testing.assert_allclose(digits[:, :, 2], block, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(digits[:, :, [1, 3]], 0)
    for _, state in others:
        np.testing.assert_allclose(state.digits, digits, rtol=0, atol=1e-12)


def test_equal_scales_are_linear_attention(x64):
    q, k, v, g, scales = inputs(3)
    wanted, state = linear_attention(q, k, v, g, scale=0.5, segment_ids=SEGMENTS, form="recurrent")
    for o, final in every_form((q, k, v, g, np.ones_like(scales)), SEGMENTS):
        np.testing.assert_allclose(o, wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(final.digits.sum(2), state, rtol=0, atol=1e-12)


def test_what_outgrows_the_levels_stays_in_the_last(x64):
    """Three levels serve four tokens; after more, as if there were levels enough, all beyond the second being equal."""
    q, k, v, g, scales = inputs(4, length=20, levels=3)
    many = np.concatenate([scales, np.repeat(scales[..., -1:], 3, axis=-1)], axis=-1)
    wanted = cases.log_linear_oracle(q, k, v, g, many, scale=1.0)
    call = jax.jit(
        lambda piece, state, form: log_linear_attention(*piece, initial_state=state, form=form, chunk_size=2), static_argnums=2
    )
    for form in FORMS:
        state, outputs = log_linear_state(B, 3, H, K, V, jnp.float64), []
        for t in range(0, 20, 4):
            o, state = call([x[:, t : t + 4] for x in (q, k, v, g, scales)], state, form)
            outputs.append(o)
        np.testing.assert_allclose(np.concatenate(outputs, axis=1), wanted, rtol=0, atol=1e-12)


def test_gradient_holds_nothing_quadratic():
    q, k, v, g, scales = (jnp.zeros((1, 512, 1, n)) for n in (16, 16, 16, 1, 10))
    grad = jax.grad(lambda *x: jnp.sum(log_linear_attention(*x, chunk_size=32)[0] ** 2), argnums=(0, 1, 2, 3, 4))
    text = str(jax.make_jaxpr(grad)(q, k, v, g[..., 0], scales))
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    # 16 chunks of 9 matrices of 16 by 16.
    assert max(map(math.prod, shapes)) == 16 * 9 * 16 * 16 < 512 * 512


@pytest.mark.parametrize(("length", "levels"), [(1, 2), (2, 2), (3, 3), (4, 3), (5, 4), (2048, 12)])
def test_levels_for(length, levels):
    assert levels_for(length) == levels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": np.zeros((B, T, H, K + 1))}, "k must have the shape of q"),
        ({"v": np.zeros((B, T, V))}, r"v must be \[B, T, H, V\]"),
        ({"log_decay": np.zeros((B, T, H, K))}, "log_decay must be .* decay a head"),
        ({"level_scales": np.zeros((B, T, H))}, r"level_scales must be \[B, T, H, L\]"),
        ({"level_scales": np.zeros((B, T, H, 5))}, "5 levels, which serve 16 tokens, but q has 21; give 6 levels"),
        ({"initial_state": LogLinearState(np.zeros((B, L, H, K, V)), np.zeros(B, int))}, r"digits \[B, H, L-1, K, V\]"),
        ({"chunk_size": 12}, "chunk_size must be a power of two, got 12"),
        ({"form": "fast"}, "form='fast' is not a form of log_linear_attention"),
    ],
)
def test_input_that_does_not_fit_is_named(changes, message):
    names = ("q", "k", "v", "log_decay", "level_scales")
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**{**dict(zip(names, map(jnp.asarray, inputs()), strict=True)), **changes})
