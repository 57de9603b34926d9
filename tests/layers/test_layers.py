"""Norms, rotary positions, feed-forward, and that every mixer has defaults that can be built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.layers.ffn import SwiGLU, SwiGLUSettings
from jaxlm.layers.mixers import MIXERS
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.norms import LayerNorm, RMSNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from tests.layers import test_diagonal_mixers, test_linear_mixers, test_ttt_mixers


def test_rms_norm_value_and_dtype():
    norm = RMSNorm(4, eps=0.0)
    norm.scale[...] = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    x = jnp.asarray([[1.0, -1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(norm(x), [[1, -2, 3, 4], [2, 0, 0, 0]], rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm_value():
    norm = LayerNorm(3, eps=0.0)
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.0, 1.0, 0.0])
    x = jnp.asarray([[1.0, 2.0, 3.0], [-7.0, 5.0, 2.0]])
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * jnp.asarray([1.0, 2.0, 3.0]) + jnp.asarray(
        [0, 1, 0]
    )
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


def test_rotary_turns_pairs_and_scores_depend_on_distance_alone():
    key = jax.random.key(0)
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))
    score = lambda i, j: jnp.sum(  # noqa: E731
        rotary(q, jnp.asarray([[i]]), base=100.0) * rotary(k, jnp.asarray([[j]]), base=100.0)
    )
    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    # Pair (0, 4) turns by the position itself.
    turned = rotary(jnp.eye(8)[0].reshape(1, 1, 1, 8), jnp.asarray([[2]]), base=100.0)[0, 0, 0]
    np.testing.assert_allclose(turned[jnp.asarray([0, 4])], [np.cos(2), np.sin(2)], rtol=1e-6)


def test_partial_rotary_leaves_the_rest():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    y = rotary(x, jnp.arange(5)[None], fraction=0.5)
    np.testing.assert_array_equal(x[..., 4:], y[..., 4:])
    assert not np.allclose(x[:, 1:, :, :4], y[:, 1:, :, :4])
    with pytest.raises(ValueError, match="even number"):
        rotary(x, jnp.arange(5)[None], fraction=3 / 8)


def test_positions_restart_where_the_id_changes_and_continue_from_start():
    ids = jnp.asarray([[5, 5, 2, 2, 2, 5], [1, 2, 3, 3, 3, 3]])
    np.testing.assert_array_equal(positions_in_segments(ids, (2, 6)), [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3]])
    start = jnp.asarray([10, 4])
    np.testing.assert_array_equal(positions_in_segments(ids, (2, 6), start), [[10, 11, 0, 1, 2, 0], [4, 0, 0, 1, 2, 3]])
    np.testing.assert_array_equal(positions_in_segments(None, (2, 3), start), [[10, 11, 12], [4, 5, 6]])


def test_swiglu_size_and_value():
    assert SwiGLUSettings().hidden_size(1024) == 2816
    assert SwiGLUSettings().hidden_size(2048) == 5632
    layer = SwiGLU(SwiGLUSettings(hidden=6), LayerContext(width=4, depth=1, index=0), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    gate, up = x @ layer.gate.kernel[...], x @ layer.up.kernel[...]
    np.testing.assert_allclose(layer(x)[0], (gate / (1 + jnp.exp(-gate)) * up) @ layer.down.kernel[...], atol=1e-6)


# test_mom.py has a table of rules, test_hybrid_mixers.py a test each; keys and values alone are tested by those that read them.
WITHOUT_A_LINE = {"mom", "attention", "cross_attention", "gmu", "key_value", "mla"}


def test_every_other_mixer_has_a_line_in_a_table_of_equations():
    lines = [settings for _, settings in test_linear_mixers.CASES.values()]
    lines += [settings for settings, _, _ in test_diagonal_mixers.CASES.values()]
    lines += test_ttt_mixers.CASES.values()
    assert set(MIXERS) - {settings.kind for settings in lines} == WITHOUT_A_LINE


@pytest.mark.parametrize("kind", MIXERS)
def test_the_defaults_of_every_mixer_build_at_usual_widths(kind):
    settings, module = MIXERS[kind]
    for width in (512, 1024, 2048):
        context = LayerContext(width=width, depth=12, index=jnp.asarray(1))
        nnx.eval_shape(lambda context=context: module(settings(), context, rngs=nnx.Rngs(0)))
