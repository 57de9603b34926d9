"""What is particular to attention: the ring, left padding, positions, memory, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.ops.attention as attention_module
from jaxlm.ops.attention import attention, init_attention_cache


def inputs(T, B=2, H=4, G=2, K=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, K)), dtype) for heads in (H, G, G))


def test_left_padded_rows_are_as_alone():
    """Prompts of 3 and 5 tokens, padded on the left by a segment of its own, then decoded together."""
    q, k, v = inputs(9)
    pads = np.array([2, 0])
    segment_ids = jnp.asarray(np.arange(5) >= pads[:, None], jnp.int32)
    cache = init_attention_cache(2, 9, 2, 4, jnp.float32)
    o, cache = attention(q[:, :5], k[:, :5], v[:, :5], segment_ids=segment_ids, cache=cache)
    outputs = [o]
    step = jax.jit(lambda token, cache: attention(*token, cache=cache))
    for t in range(5, 9):
        o, cache = step([x[:, t : t + 1] for x in (q, k, v)], cache)
        outputs.append(o)
    outputs = jnp.concatenate(outputs, axis=1)
    for row, pad in enumerate(pads):
        alone, _ = attention(*(x[row : row + 1, pad:] for x in (q, k, v)), form="parallel")
        np.testing.assert_allclose(outputs[row, pad:], alone[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cache["positions"], [[-1, -1, *range(7)], [*range(9)]])
    assert cache["count"] == 9


@pytest.mark.parametrize(("T", "slots"), [(3, 8), (8, 8), (11, 8), (21, 8), (1, 1)])
def test_ring_keeps_the_newest_tokens(T, slots):
    """Over two calls; slot n % S holds token n."""
    q, k, v = inputs(T)
    cache = init_attention_cache(2, slots, 2, 4, jnp.float32)
    _, cache = attention(q, k, v, window=slots, cache=cache)
    _, cache = attention(q, k + 1, v + 1, window=slots, cache=cache)
    keys, values = jnp.concatenate([k, k + 1], axis=1), jnp.concatenate([v, v + 1], axis=1)
    assert cache["count"] == 2 * T
    for n in range(max(0, 2 * T - slots), 2 * T):
        assert (cache["positions"][:, n % slots] == n).all()
        np.testing.assert_array_equal(cache["k"][:, n % slots], keys[:, n])
        np.testing.assert_array_equal(cache["v"][:, n % slots], values[:, n])


def test_a_ring_of_the_window_is_enough():
    """Two chunks of a prompt, then steps, around the ring."""
    q, k, v = inputs(14)
    call = jax.jit(lambda tokens, cache: attention(*tokens, window=4, cache=cache))
    cache, outputs = init_attention_cache(2, 4, 2, 4, jnp.float32), []
    for start, end in [(0, 5), (5, 10), (10, 11), (11, 12), (12, 13), (13, 14)]:
        o, cache = call([x[:, start:end] for x in (q, k, v)], cache)
        outputs.append(o)
    wanted, _ = attention(q, k, v, window=4, form="parallel")
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), wanted, rtol=0, atol=1e-5)


def test_a_document_that_ends_leaves_the_cache():
    q, k, v = inputs(6)
    cache = init_attention_cache(2, 16, 2, 4, jnp.float32)
    _, cache = attention(q, k, v, cache=cache)
    segment_ids = jnp.asarray([[0, 0, 0, 1, 1, 1], [0] * 6])
    _, cache = attention(q, k, v, segment_ids=segment_ids, cache=cache)
    np.testing.assert_array_equal(cache["positions"][0], [-1] * 9 + [0, 1, 2] + [-1] * 4)
    np.testing.assert_array_equal(cache["positions"][1], [*range(12)] + [-1] * 4)


def test_given_positions_are_what_the_cache_keeps():
    q, k, v = inputs(3)
    positions = jnp.asarray([[5, 6, 7], [0, 1, 2]])
    _, cache = attention(q, k, v, positions=positions, cache=init_attention_cache(2, 3, 2, 4, jnp.float32))
    np.testing.assert_array_equal(cache["positions"], positions)


def test_chunked_memory_is_bounded(monkeypatch):
    """Temporaries of the compiled gradient: blocks of scores, not T x T a head."""
    monkeypatch.setattr(attention_module, "BLOCK", 32)
    q, k, v = inputs(1024, B=1, H=2, G=1)

    def temporaries(form, window=None):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v, form=form, window=window)[0]))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 1024 * 1024
    assert temporaries("parallel") > scores
    assert temporaries("chunked") < scores / 4
    assert temporaries("chunked", window=32) < scores / 16


def test_default_blocks_agree_with_all_pairs():
    """At the real block sizes: a loop in each span, a remainder, windows narrower and wider than a block."""
    q, k, v = inputs(2 * 4 * attention_module.BLOCK + 37, B=1, H=2, G=1)
    for window in (None, 40, 700):
        got, wanted = (
            jax.jit(lambda *x, f=form, w=window: attention(*x, form=f, window=w)[0])(q, k, v)
            for form in ("chunked", "parallel")
        )
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"q": jnp.zeros((1, 4, 3, 4))}, "q has H=3 heads, which must be a multiple of k's G=2"),
        ({"k": jnp.zeros((1, 4, 2, 3))}, "k must be"),
        ({"v": jnp.zeros((1, 4, 1, 4))}, "v must be"),
        ({"positions": jnp.zeros((1, 3), jnp.int32)}, "positions must be"),
        ({"segment_ids": jnp.zeros((1, 3), jnp.int32)}, "segment_ids must be"),
        ({"cache": init_attention_cache(1, 8, 1, 4, jnp.float32)}, r"cache\['k'\] must be \(1, 8, 2, 4\)"),
        ({"cache": init_attention_cache(2, 8, 2, 4, jnp.float32)}, r"cache\['k'\] must be \(1, 8, 2, 4\)"),
        ({"form": "kernel"}, "cuDNN attention needs an NVIDIA GPU, this is cpu"),
        ({"form": "dense"}, "choose auto or one of recurrent, parallel, chunked"),
    ],
)
def test_errors_name_the_argument(change, message):
    arrays = {"q": jnp.zeros((1, 4, 4, 4)), "k": jnp.zeros((1, 4, 2, 4)), "v": jnp.zeros((1, 4, 2, 4))}
    with pytest.raises(ValueError, match=message):
        attention(**{**arrays, **change})


def test_a_cache_needs_a_slot():
    with pytest.raises(ValueError, match="length=0"):
        init_attention_cache(1, 0, 1, 4, jnp.float32)
