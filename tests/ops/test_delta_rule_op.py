"""What is particular to the delta rules: the inverse, transitions, memory, accuracy, shapes, errors."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.ops import delta_rule as module
from jaxlm.ops.chunks import GROUPS
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule, unit_triangular_inverse
from jaxlm.ops.linear_attention import linear_attention
from tests.ops.test_linear_attention_op import every_equation

KINDS = ("none", "scalar", "vector", "gates", "dplr")


def inputs(kind, T, B=2, H=2, K=4, V=6, seed=0, decays=(0.0, -0.01, -0.3, -2.0, -80.0)):
    """Similar unit keys; steps up to twice the error."""
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(B, 1, H, K)) + 0.3 * rng.normal(size=(B, T, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": rng.normal(size=(B, T, H, K)), "k": k, "v": rng.normal(size=(B, T, H, V))}
    if kind == "dplr":
        arrays |= {"a": -k, "b": k * rng.random((B, T, H, K)), "k": rng.normal(size=(B, T, H, K))}
    else:
        arrays["beta"] = rng.random((B, T, H, K)) if kind == "gates" else 2 * rng.random((B, T, H))
    if kind == "gates":
        arrays["write"] = rng.random((B, T, H, V))
    if kind != "none":
        arrays["log_decay"] = rng.choice(decays, size=(B, T, H) if kind == "scalar" else (B, T, H, K))
    state = rng.normal(size=(B, H, K, V))
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}, jnp.asarray(state, jnp.float32)


def op_of(kind):
    return dplr_delta_rule if kind == "dplr" else delta_rule


def gradient(kind, chunk_size=64, form="chunked"):
    def loss(arrays, state):
        o, final = op_of(kind)(**arrays, initial_state=state, form=form, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_inverse_of_equal_keys_is_exact(size):
    """A = all ones below the diagonal: the inverse has entries 1 and -1, powers of A have up to 1e36."""
    a = jnp.tril(jnp.ones((size, size)), -1)
    expected = np.eye(size) - np.eye(size, k=-1)
    np.testing.assert_array_equal(unit_triangular_inverse(a), expected)


def test_inverse_of_similar_keys():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(3, 1, 16)) + rng.normal(size=(3, 64, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    a = np.tril(k @ k.swapaxes(1, 2), -1)
    np.testing.assert_allclose(unit_triangular_inverse(jnp.asarray(a, jnp.float32)), np.linalg.inv(np.eye(64) + a), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reset_at", [None, 5, 0])
def test_transition_is_what_the_op_makes_of_the_identity(kind, reset_at):
    arrays, _ = inputs(kind, T=13)
    B, T, H, K = arrays["q"].shape
    reset = None if reset_at is None else jnp.zeros((B, T), bool).at[:, reset_at].set(True)
    wide = {n: x[..., None] if n in ("beta", "log_decay") and x.ndim == 3 else x for n, x in arrays.items()}
    names = ("q", "k", "v", "a", "b", "log_decay") if kind == "dplr" else ("q", "k", "v", "beta", "write", "log_decay")
    transition = module._transition_dplr if kind == "dplr" else module._transition
    got = transition(4, tuple(wide.get(name) for name in names), reset)
    if reset_at is not None:
        assert not np.any(got)
        return
    silent = {**arrays, "v": jnp.zeros((B, T, H, K))}
    if kind == "gates":
        silent["write"] = jnp.zeros((B, T, H, K))
    identity = jnp.broadcast_to(jnp.eye(K), (B, H, K, K))
    _, wanted = op_of(kind)(**silent, initial_state=identity, form="recurrent")
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_without_erasing_the_rule_is_linear_attention():
    arrays, state = inputs("gates", T=11)
    arrays["beta"] *= 0
    got = delta_rule(**arrays, initial_state=state, chunk_size=4)
    wanted = linear_attention(arrays["q"], arrays["k"], arrays["write"] * arrays["v"], arrays["log_decay"], initial_state=state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, wanted)


def test_a_full_step_replaces_what_the_key_held():
    """beta = 1 and one unit key: the state under it is the newest value, whatever came before."""
    rng = np.random.default_rng(0)
    k = jnp.zeros((1, 6, 1, 3)).at[..., 1].set(1.0)
    v = jnp.asarray(rng.normal(size=(1, 6, 1, 2)), jnp.float32)
    o, state = delta_rule(k, k, v, jnp.ones((1, 6, 1)), scale=1.0, chunk_size=4)
    np.testing.assert_allclose(o, v, atol=1e-6)
    np.testing.assert_allclose(state[0, 0], np.outer([0, 1, 0], v[0, -1, 0]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_holds_no_state_a_token_and_keeps_its_inputs(kind):
    B, T, H, K, V, C = 1, 256, 2, 16, 16, 16
    arrays, state = inputs(kind, T, B, H, K, V)
    jaxpr = jax.make_jaxpr(gradient(kind, C))(arrays, state)
    largest = max(math.prod(x.aval.shape) for e in every_equation(jaxpr.jaxpr) for x in e.outvars)
    assert largest <= B * T * H * max(K, V, C)
    op = partial(op_of(kind), form="chunked", chunk_size=C)
    _, pullback = jax.vjp(lambda arrays, state: op(**arrays, initial_state=state), arrays, state)
    kept = sum(x.size for x in jax.tree.leaves(pullback) if x.ndim > 0)
    assert kept <= sum(x.size for x in arrays.values()) + GROUPS * state.size


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_gradient_is_linear_and_a_few_times_the_inputs(kind):
    used = []
    for T in (1024, 2048):
        arrays, state = inputs(kind, T, B=2, H=4, K=64, V=64)
        temporary = gradient(kind).lower(arrays, state).compile().memory_analysis().temp_size_in_bytes
        used.append(temporary / sum(x.nbytes for x in arrays.values()))
    assert used[1] < 4
    assert used[1] < 1.1 * used[0]


@pytest.mark.parametrize("kind", ["scalar", "vector", "dplr"])
def test_float32_accuracy_beside_strong_decays(kind):
    arrays, state = inputs(kind, T=128, B=1)
    if kind != "dplr":
        arrays["beta"] = arrays["beta"] / 2
    got = gradient(kind)(arrays, state)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (arrays, state))
        wanted = gradient(kind, form="recurrent")(*exact)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        assert np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)) < 1e-5


@settings(max_examples=4, deadline=None)
@given(T=st.integers(1, 40), C=st.sampled_from([1, 4, 64]), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_shapes(T, C, kind, seed):
    arrays, state = inputs(kind, T, B=1, K=3, V=2, seed=seed)
    ids = jnp.asarray(np.random.default_rng(seed).integers(0, 2, size=(1, T)))
    op = partial(op_of(kind), initial_state=state, segment_ids=ids, chunk_size=C)
    run = jax.jit(lambda arrays: [op(**arrays, form=form) for form in ("chunked", "recurrent")])
    for x, y in zip(*run(arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * max(1, np.abs(y).max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 4, 1, 3))}, "k must have the shape of q"),
        ({"v": jnp.zeros((1, 5, 2, 3))}, "v must be"),
        ({"beta": jnp.zeros((1, 4))}, "beta must be"),
        ({"beta": jnp.zeros((1, 4, 2, 3))}, "write goes with an erase gate"),
        ({"write": jnp.zeros((1, 4, 2, 3))}, "write goes with an erase gate"),
        ({"beta": jnp.zeros((1, 4, 2, 3)), "write": jnp.zeros((1, 4, 2, 2))}, "write must be"),
        ({"log_decay": jnp.zeros((1, 4))}, "log_decay must be"),
        ({"log_decay": jnp.ones((1, 4, 2))}, "log_decay must be <= 0, got 1"),
        ({"initial_state": jnp.zeros((1, 2, 5, 3))}, "initial_state must be"),
        ({"segment_ids": jnp.zeros((1, 4))}, "segment_ids must be integers"),
        ({"chunk_size": 48}, "chunk_size must be a power of two"),
        ({"form": "kernel"}, "no Pallas kernel for cpu"),
    ],
)
def test_errors_name_the_argument(change, message):
    arrays = {name: jnp.zeros((1, 4, 2, 3)) for name in ("q", "k", "v")} | {"beta": jnp.zeros((1, 4, 2))}
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**arrays, **change})
    wide = {name: jnp.zeros((1, 4, 2, 3)) for name in ("q", "k", "v", "a", "b")}
    with pytest.raises(ValueError, match="log_decay must be"):
        dplr_delta_rule(**wide, log_decay=jnp.zeros((1, 4, 2)))
