"""Running log-sum-exp against sums of exponentials in float64; over shards: tests/parallel/test_sequence.py."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.logsumexp import running_logsumexp

IDS = [4] * 3 + [1] + [7] * 6


def test_running_logsumexp_is_that_of_each_document_and_continues_a_sum(x64):
    logits = 30 * jax.random.normal(jax.random.key(0), (1, len(IDS), 2, 3))
    before = jnp.asarray([[[1.0, -jnp.inf, 40.0]] * 2])
    z, log_decay = jax.jit(running_logsumexp)(logits, before, jnp.asarray([IDS]))
    expected, decays, start = [], [], 0
    for length in (3, 1, 6):
        document = np.asarray(logits[0, start : start + length])
        carried = np.exp(np.asarray(before[0])) if start == 0 else np.zeros((2, 3))
        sums = np.log(carried + np.cumsum(np.exp(document), 0))
        with np.errstate(divide="ignore"):
            previous = np.concatenate([np.log(carried)[None], sums[:-1]])
        expected.append(sums)
        decays.append(np.where(np.isinf(previous), 0, previous - sums))
        start += length
    np.testing.assert_allclose(z[0], np.concatenate(expected), rtol=1e-12)
    np.testing.assert_allclose(log_decay[0], np.concatenate(decays), rtol=1e-12, atol=1e-12)
