"""Log-linear attention against the sum that defines it, pair by pair in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import LogLinearState, levels_for, log_linear_attention, log_linear_state

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


def definition(q, k, v, g, scales, segment_ids, scale):
    """The sum over pairs of the module's docstring, levels counted digit by digit."""
    o = np.zeros((B, q.shape[1], H, V))
    for b in range(B):
        start = 0
        for t in range(q.shape[1]):
            if t and segment_ids[b, t] != segment_ids[b, t - 1]:
                start = t
            for s in range(start, t + 1):
                level = len(f"{(t - start) ^ (s - start):b}") if s < t else 0
                for h in range(H):
                    weight = scale * scales[b, t, h, level] * math.exp(g[b, s + 1 : t + 1, h].sum())
                    o[b, t, h] += weight * (q[b, t, h] @ k[b, s, h]) * v[b, s, h]
    return o


@jax.jit
def every_form(arrays, segment_ids, state=None):
    return [
        log_linear_attention(
            *arrays, scale=0.5, form=form, chunk_size=size, segment_ids=segment_ids, initial_state=state
        )
        for form, size in FORMS.items()
    ]  # fmt: skip


def test_the_definition(x64):
    arrays = inputs()
    for segment_ids in (SEGMENTS, np.zeros_like(SEGMENTS)):
        wanted = definition(*arrays, segment_ids, 0.5)
        results = every_form(arrays, segment_ids)
        for o, state in results:
            np.testing.assert_allclose(o, wanted, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(state.position, [5, T] if segment_ids.any() else [T, T])
            np.testing.assert_allclose(state.digits, results[0][1].digits, rtol=0, atol=1e-12)
    # 21 = 10101b: the blocks of 1, 4 and 16 tokens that end at 20, 19 and 15.
    digits, (_, k, v, g, _) = results[0][1].digits, arrays
    block = sum(np.exp(g[:, s + 1 :].sum(1))[..., None, None] * k[:, s, :, :, None] * v[:, s, :, None] for s in range(16, 20))
    np.testing.assert_allclose(digits[:, :, 2], block, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(digits[:, :, [1, 3]], 0)


def test_a_split_inside_a_document_continues(x64):
    arrays, cut = inputs(1), 7
    whole, (_, wanted) = every_form(arrays, SEGMENTS), every_form(arrays, SEGMENTS)[0]
    first, second = ([x[:, :cut] for x in arrays], [x[:, cut:] for x in arrays])
    for (o, _), (o1, state) in zip(whole, every_form(first, SEGMENTS[:, :cut]), strict=True):
        for o2, final in every_form(second, SEGMENTS[:, cut:], state):
            np.testing.assert_allclose(np.concatenate([o1, o2], axis=1), o, rtol=0, atol=1e-12)
            np.testing.assert_allclose(final.digits, wanted.digits, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(final.position, wanted.position)


def test_gradients_of_all_forms_agree(x64):
    arrays = inputs(2)
    rng = np.random.default_rng(2)
    # 11 = 1011b tokens are behind the first row's first document, none behind the second's.
    filled = np.array([[1, 1, 0, 1, 0], [0] * 5])[:, None, :, None, None]
    state = LogLinearState(jnp.asarray(filled * rng.normal(size=(B, H, L - 1, K, V))), jnp.asarray([11, 0]))
    weights = rng.normal(size=(B, T, H, V))

    @jax.jit
    def gradients(arrays, digits):
        def loss(arrays, digits, form, size):
            o, final = log_linear_attention(
                *arrays, initial_state=LogLinearState(digits, state.position), segment_ids=SEGMENTS, form=form, chunk_size=size
            )
            return jnp.sum(weights * o) + jnp.sum(jnp.sin(final.digits))

        return [jax.grad(loss, (0, 1))(arrays, digits, form, size) for form, size in FORMS.items()]

    wanted, *others = gradients(arrays, state.digits)
    wanted = (wanted[0], filled * wanted[1])
    assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(wanted))
    for got in others:
        # Nothing is ever written to the digits that are 0.
        got = (got[0], filled * got[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), got, wanted)


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
    wanted = definition(q, k, v, g, many, np.zeros((B, 20)), 1.0)
    call = jax.jit(
        lambda piece, state, form: log_linear_attention(*piece, initial_state=state, form=form, chunk_size=2), static_argnums=2
    )
    for form in FORMS:
        state, outputs = log_linear_state(B, 3, H, K, V, jnp.float64), []
        for t in range(0, 20, 4):
            o, state = call([x[:, t : t + 4] for x in (q, k, v, g, scales)], state, form)
            outputs.append(o)
        np.testing.assert_allclose(np.concatenate(outputs, axis=1), wanted, rtol=0, atol=1e-12)


def test_later_tokens_do_not_change_earlier_outputs_by_one_bit(x64):
    arrays = [jnp.asarray(x) for x in inputs(5)]
    changed = [x.at[:, 10:].add(1) for x in arrays[:3]] + [arrays[3].at[:, 10:].add(-1), arrays[4].at[:, 10:].add(1)]
    for (o, _), (other, _) in zip(every_form(arrays, SEGMENTS), every_form(changed, SEGMENTS), strict=True):
        np.testing.assert_array_equal(o[:, :10], other[:, :10])
        assert not np.array_equal(o[:, 10:], other[:, 10:])


def test_bfloat16_inputs_keep_float32_states():
    q, k, v, g, scales = (jnp.asarray(x, jnp.float32) for x in inputs(6))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    exact = every_form([x.astype(jnp.float32) for x in low] + [g, scales], SEGMENTS)[0][0]
    for o, state in every_form([*low, g, scales], SEGMENTS):
        assert (o.dtype, state.digits.dtype) == (jnp.bfloat16, jnp.float32)
        assert np.linalg.norm(np.asarray(o, np.float32) - exact) < 0.01 * np.linalg.norm(exact)


def test_gradient_holds_nothing_quadratic():
    q, k, v, g, scales = (jnp.zeros((1, 512, 1, n)) for n in (16, 16, 16, 1, 10))
    grad = jax.grad(lambda *x: jnp.sum(log_linear_attention(*x, chunk_size=32)[0] ** 2), argnums=(0, 1, 2, 3, 4))
    text = str(jax.make_jaxpr(grad)(q, k, v, g[..., 0], scales))
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    # 16 chunks of 9 matrices of 16 by 16.
    assert max(map(math.prod, shapes)) == 16 * 9 * 16 * 16 < 512 * 512


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_sharded_over_batch_and_heads_without_gathering(form):
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs(8)]
    digits = jnp.asarray(np.random.default_rng(8).normal(size=(B, H, L - 1, K, V)), jnp.float32)

    def loss(arrays, digits):
        state = LogLinearState(digits, jnp.asarray([11, 0], jnp.int32))
        o, final = log_linear_attention(*arrays, initial_state=state, segment_ids=SEGMENTS, form=form, chunk_size=FORMS[form])
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(final.digits)), o

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    sharded = [place(x, "data", None, "tensor") for x in arrays], place(digits, "data", "tensor")
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    compiled = step.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text(), collective
    for x, y in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(step(arrays, digits)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))


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
