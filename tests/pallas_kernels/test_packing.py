"""Kernels on packed and split rows: a document in a row of several gets what it gets alone, and a row in two parts what it gets
whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import kernels
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.linear_attention import linear_attention
from pallas_kernels.delta_rule import tpu as delta_rule_tpu
from pallas_kernels.linear_attention import tpu as linear_attention_tpu
from tests.pallas_kernels import delta_rule as of_delta_rule
from tests.pallas_kernels import interpreters
from tests.pallas_kernels import linear_attention as of_linear_attention

OPS = {
    "linear_attention": (lambda q, k, v, g, **rest: linear_attention(q, k, v, g[..., 0], **rest), of_linear_attention),
    "delta_rule": (lambda q, k, v, beta, g, **rest: delta_rule(q, k, v, beta[..., 0], g[..., 0], **rest), of_delta_rule),
}
# Where documents start, two of one length, whose gradients are compiled once, and a last one of few tokens.
T, SECOND, LAST = 75, 35, 70


def inputs_of(name, platform):
    dtype = "float32" if platform == "tpu" else "bfloat16"
    inputs, _, state, *_ = OPS[name][1].arrays("scalar", T, 2, 64, 64, B=1, dtype=dtype)
    return of_linear_attention.mild(inputs), state


def assert_close(got, expected, platform):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    of_gate = got.shape[-1] == 1  # a sum over channels, whose roundings cancel less than its terms do
    assert error < (5e-6 if platform == "tpu" else 0.01 if of_gate else 0.007), error


@pytest.fixture(params=["tpu", pytest.param("gpu", marks=pytest.mark.slow), pytest.param("gpu here", marks=pytest.mark.gpu)])
def platform(request, monkeypatch):
    """That kernels run on: by an interpreter, or in the lane `gpu` on the GPU that is there."""
    for module in (delta_rule_tpu, linear_attention_tpu):
        monkeypatch.setattr(module, "CHUNK", 16)
    if request.param == "tpu":
        with kernels.interpreted("tpu", "TPU v5 lite"):
            yield "tpu"
    else:
        with interpreters.hopper(interpret=request.param == "gpu"):
            yield "gpu"


@pytest.mark.parametrize("name", OPS)
def test_a_packed_document_gets_what_it_gets_alone(name, platform):
    op, inputs, state = OPS[name][0], *inputs_of(name, platform)
    ids = jnp.asarray(np.searchsorted([SECOND, LAST], np.arange(T), side="right"))[None]

    def loss(inputs, state, ids, weight):
        o, final = op(*inputs, initial_state=state, segment_ids=ids, form="kernel")
        return jnp.sum(weight * o.astype(jnp.float32)), (o, final)

    weight = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 2, 64)), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (o, final)), (d_inputs, d_state) = gradient(inputs, state, ids, weight)
    for start, stop in ((0, SECOND), (SECOND, LAST), (LAST, T)):
        part = [x[:, start:stop] for x in inputs]
        entering = state if start == 0 else jnp.zeros_like(state)
        (_, (o_alone, final_alone)), (d_alone, d_state_alone) = gradient(
            part, entering, jnp.zeros((1, stop - start), int), weight[:, start:stop]
        )
        assert_close(o[:, start:stop], o_alone, platform)
        for got, expected in zip(d_inputs, d_alone, strict=True):
            assert_close(got[:, start:stop], expected, platform)
        if start == 0:
            assert_close(d_state, d_state_alone, platform)
    assert_close(final, final_alone, platform)


@pytest.mark.parametrize("name", OPS)
def test_a_row_in_two_parts_gets_what_it_gets_whole(name, platform):
    op, inputs, state = OPS[name][0], *inputs_of(name, platform)
    o, final = op(*inputs, initial_state=state, form="kernel")
    first, middle = op(*(x[:, :SECOND] for x in inputs), initial_state=state, form="kernel")
    second, last = op(*(x[:, SECOND:] for x in inputs), initial_state=middle, form="kernel")
    assert_close(jnp.concatenate([first, second], axis=1), o, platform)
    assert_close(last, final, platform)
