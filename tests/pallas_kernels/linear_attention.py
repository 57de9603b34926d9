"""Inputs of linear attention that are hard for its kernels, and what the recurrent form makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.linear_attention import _run
from tests.pallas_kernels import interpreters

DECAYS = np.array([0.0, -1e-7, -0.01, -0.3, -2.0, -20.0, -80.0, -np.inf])
NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "d state")
KINDS = ("none", "scalar", "vector")
# rms of the difference over rms of the reference
TOLERANCES = {
    "float32": dict.fromkeys(NAMES, 2e-5),
    "bfloat16": {"o": 0.005, "final state": 0.005, "dq": 0.01, "dk": 0.01, "dv": 0.01, "dg": 0.02, "d state": 0.01},
}


def arrays(kind, T, H, K, V, *, B=2, dtype="float32", seed=0):
    """Similar keys, decays from exactly 0 to -80 and -inf in one chunk, resets at token 0 too, a state and cotangents."""
    rng = np.random.default_rng(seed)

    def similar(width):
        return (rng.normal(size=(B, 1, H, width)) + 0.3 * rng.normal(size=(B, T, H, width))) / np.sqrt(width)

    low = [jnp.asarray(x, dtype) for x in (similar(K), similar(K), rng.normal(size=(B, T, H, V)))]
    often = [0.25, 0.1, 0.3, 0.25, 0.04, 0.02, 0.02, 0.02]
    g = None
    if kind != "none":
        g = jnp.asarray(rng.choice(DECAYS, p=often, size=(B, T, H, 1 if kind == "scalar" else K)), jnp.float32)
    reset = jnp.asarray(rng.random((B, T)) < 0.06).at[0, 0].set(True)
    state, d_final = (jnp.asarray(rng.normal(size=(B, H, K, V)), jnp.float32) for _ in range(2))
    return (*low, g), reset, state, jnp.asarray(rng.normal(size=(B, T, H, V)), dtype), d_final


def mild(inputs):
    """With decays that leave something of a state after hundreds of tokens."""
    *rest, g = inputs
    return *rest, None if g is None else jnp.maximum(g, -80) / 1000


def steep(inputs):
    """With decays whose sums over a chunk are thousands, and then small ones; the first, too, for the initial state's sake."""
    *rest, g = inputs
    t = jnp.arange(g.shape[1])[:, None, None]
    return *rest, jnp.where((t > 0) & (t < 100), -80.0, jnp.maximum(g, -0.3))


def of_both_dtypes(cases, dtypes):
    """Kernels of a decay a channel are large: of several chunks in float32, and in bfloat16 of one, but in the slow lane."""
    slow = lambda dtype, case: (dtype, *case[:2]) == ("bfloat16", "vector", 37)  # noqa: E731
    return [
        pytest.param(dtype, case, marks=pytest.mark.slow if slow(dtype, case) else (), id=f"{dtype}-{case}")
        for dtype in dtypes
        for case in cases
    ]


@jax.jit
def reference(inputs, reset, state, do, d_final):
    """The same of the recurrent form in float32, on the same values."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    scale = inputs[0].shape[-1] ** -0.5
    (o, final), pull = jax.vjp(lambda inputs, state: _run(scale, "recurrent", 16, inputs, reset, state), inputs, state)
    d_inputs, d_state = pull((do.astype(jnp.float32), d_final))
    return o, final, *d_inputs, d_state


def assert_close(got, expected, dtype):
    """Outputs and gradients of linear attention."""
    assert_all_close(got, expected, NAMES, TOLERANCES[dtype])


def assert_all_close(got, expected, names, tolerances):
    """The rms of differences over that of what is expected, within the tolerances by name."""
    for name, x, y in zip(names, got, expected, strict=True):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape, name
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not y.any():  # a reset at the first token leaves the initial state no gradient
            np.testing.assert_array_equal(x, y, name)
            continue
        error = np.sqrt(np.mean((x - y) ** 2)) / np.sqrt(np.mean(y**2))
        assert error < tolerances[name], (name, error)


def assert_rounded(run, inputs, reset, state, do, d_final):
    """Kernels make the same bits of inputs as of those in bfloat16, and return them in the dtypes of the inputs."""
    low = [x.astype(jnp.bfloat16) for x in (*inputs[:3], do)]
    got = run(inputs, reset, state, do, d_final)
    expected = run((*low[:3], *inputs[3:]), reset, state, low[3], d_final)
    assert [x.dtype for x in expected[:5]] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    assert [x.dtype for x in got[:5]] == [x.dtype for x in (inputs[2], state, *inputs[:3])]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y.astype(x.dtype))


def assert_joins_in_float32(op, module, inputs, names, tolerances, monkeypatch, *, interpret):
    """The GPU kernel of an op joins where the setting of jax allows bfloat16 products, in what is traced already too, and is
    within tolerances of the recurrent form of rounded q, k and v, gradients too.

    Args:
      op: of q, k, v, gates [B, T, H], segment_ids and form.
      module: that of the kernel.
      inputs: q, k, v, gates [B, T, H, 1].
      names: of outputs, state and gradients of inputs; tolerances: by name.
    """
    B, T = inputs[0].shape[:2]
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(4, size=(B, T)), axis=1))
    calls = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **rest: calls.append(args[1].dtype) or forward(*args, **rest))

    def of(inputs, form):
        q, k, v, *gates = inputs
        o, state = op(q, k, v, *(x[..., 0] for x in gates), segment_ids=ids, form=form)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state)), (o, state)

    both = jax.jit(jax.value_and_grad(of, has_aux=True), static_argnums=1)
    low = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in inputs[:3]]
    expected = both((*low, *inputs[3:]), "recurrent")
    with interpreters.hopper(interpret):
        both(inputs, "auto")
        assert not calls
        with jax.default_matmul_precision("bfloat16"):
            got = both(inputs, "auto")
        assert calls == [jnp.float32]
        both(inputs, "auto")
        assert len(calls) == 1
    got, expected = ((*out, *gradients) for (_, out), gradients in (got, expected))
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float32)}
    assert_all_close(got, expected, names, tolerances)
