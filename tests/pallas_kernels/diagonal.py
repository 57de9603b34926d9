"""What the tests of the diagonal recurrence's kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.diagonal import _recurrent, diagonal_recurrence


def arrays(B, T, D, seed=0):
    """Factors from 0 to 1, what is added, the cotangent of h, a state and the cotangent of the last h."""
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.choice([0.0, 1e-30, 0.5, 0.9, 1.0], size=(B, T, D)), jnp.float32)
    b, do = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    return a, b, do, *(jnp.asarray(rng.normal(size=(B, D)), jnp.float32) for _ in range(2))


def reference(a, b, do, state, d_final):
    (h, _), pull = jax.vjp(_recurrent, a, b, state)
    return h, *pull((do, d_final))


def assert_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=5e-6)


def op(form, *, shared=False):
    """Outputs and gradients of the op in a form, with documents, on channels of two axes."""
    rng = np.random.default_rng(0)
    log_a = jnp.asarray(-rng.exponential(size=(4, 8) if shared else (2, 48, 4, 8)), jnp.float32)
    b, state = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 48, 4, 8), (2, 4, 8)))
    ids = jnp.asarray(np.sort(rng.integers(5, size=(2, 48)), axis=1))

    def loss(log_a, b, state):
        h, final = diagonal_recurrence(log_a, b, initial_state=state, segment_ids=ids, form=form)
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.sin(final)), h

    return jax.jit(jax.value_and_grad(loss, range(3), has_aux=True))(log_a, b, state)
