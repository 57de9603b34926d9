"""Chunked cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training.loss import cross_entropy


def inputs(length=11, vocab=13):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, length, 5))
    kernel = jax.random.normal(keys[1], (5, vocab))
    targets = jax.random.randint(keys[2], (2, length), 0, vocab)
    weights = (jax.random.uniform(keys[3], (2, length)) > 0.3).astype(jnp.float32)
    return hidden, kernel, targets, weights


def reference(hidden, kernel, targets, weights):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    nll = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    log_z = jax.nn.logsumexp(hidden @ kernel, axis=-1)
    hits = jnp.argmax(log_probs, -1) == targets
    return jnp.sum(weights * nll), jnp.sum(weights * log_z**2), jnp.sum(weights * hits)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
def test_every_chunk_gives_the_unchunked_sums_and_gradients(chunk):
    args = inputs()
    loss, expected = cross_entropy(*args, chunk=chunk), reference(*args)
    np.testing.assert_allclose(jnp.stack(loss), jnp.stack(expected), rtol=1e-5)
    total = lambda f: lambda h, k: (lambda r: r[0] + 0.1 * r[1])(f(h, k, *args[2:]))  # noqa: E731
    ours = jax.grad(total(lambda *a: cross_entropy(*a, chunk=chunk)), argnums=(0, 1))(*args[:2])
    theirs = jax.grad(total(reference), argnums=(0, 1))(*args[:2])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_full_logits_never_exist():
    hidden, kernel, targets, weights = inputs(length=64, vocab=97)
    grad = jax.grad(lambda h, k: cross_entropy(h, k, targets, weights, chunk=8).nll, argnums=(0, 1))
    text = jax.jit(grad).lower(hidden, kernel).as_text()
    assert "2x8x97x" in text
    assert "2x64x97x" not in text
    assert "8x2x8x97x" not in text
