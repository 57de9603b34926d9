"""Drawing tokens: what may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.sampling import sample

LOGITS = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))
DRAWS = 20_000


def frequencies(**settings):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    settings = {"valid": 4, **settings}
    drawn = jax.jit(lambda keys: sample(jnp.broadcast_to(LOGITS, (DRAWS, 4)), keys, **settings))(keys)
    return np.bincount(drawn, minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 100}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"valid": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"valid": 3, "top_k": 3}, np.array([0.5, 0.25, 0.15]) / 0.9),
    ],
)
def test_frequencies(settings, expected):
    expected = np.pad(np.asarray(expected, float), (0, 4 - len(expected)))
    found = frequencies(**settings)
    # Four standard deviations of a frequency; what may not be drawn never is.
    np.testing.assert_allclose(found, expected, atol=4 * (0.25 / DRAWS) ** 0.5)
    assert np.all(found[expected == 0] == 0)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    keys = jax.random.split(jax.random.key(1), 5)
    logits = jax.random.normal(jax.random.key(2), (5, 7))
    together = sample(logits, keys, valid=7)
    alone = jnp.concatenate([sample(logits[i : i + 1], keys[i : i + 1], valid=7) for i in range(5)])
    np.testing.assert_array_equal(together, alone)
