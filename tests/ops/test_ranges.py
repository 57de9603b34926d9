"""Gates out of their range: an error wherever their values are known, constants under jit and in scans included."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan
from jaxlm.ops.fast_weights import memora, moneta, ttt_linear, yaad
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import log_linear_attention
from jaxlm.ops.ranges import check_range

B, T, H, K = 1, 4, 2, 3


def full(value, *shape):
    return jnp.full(shape, value, jnp.float32)


wide, scalar = partial(full, 0.5, B, T, H, K), partial(full, 0.5, B, T, H)
QKV = {name: wide() for name in ("q", "k", "v")}
MIRAS = {
    **QKV, "rate": wide(), "weights": {"w_in": full(0.5, H, K, 2), "w_out": full(0.5, H, 2, K)},
    "norm_scale": full(1, H, K), "norm_bias": full(0, H, K), "log_decay": -wide(), "chunk_size": 2,
}  # fmt: skip
TTT = {
    **QKV, "token_scale": full(1, 2), "weights": {"w": full(0.5, H, K, K), "b": full(0, H, K)}, "chunk_size": 2,
    "norm_scale": full(1, H, K), "norm_bias": full(0, H, K),
}  # fmt: skip
SELECTIVE = {"u": full(1, B, T, H), "dt": full(1, B, T, H), "a": full(-1, H, K), "b": full(1, B, T, K), "c": full(1, B, T, K)}
# But for rounding: 1 + 2 eps.
ON_THE_CIRCLE = jnp.stack([full(1 + 2.0**-22, H, K), full(0, H, K)], axis=1)
SSM = {"u": full(1, B, T, H), "a": full(0.7, H, 2, K), "c": full(1, H, 2, K)}

# A line per gate: op, its arrays, the gate, a value at its border, one beyond, and what the error says.
GATES = {
    "linear": (linear_attention, QKV, "log_decay", 0 * scalar(), scalar(), "log_decay must be <= 0, got 0.5: .*logsigmoid"),
    "linear, vector": (linear_attention, QKV, "log_decay", 0 * wide(), wide(), "log_decay must be <= 0, got 0.5"),
    "delta": (delta_rule, {**QKV, "beta": scalar()}, "log_decay", 0 * scalar(), scalar(), "log_decay must be <= 0, got 0.5"),
    "beta": (delta_rule, QKV, "beta", 4 * scalar(), 5 * scalar(), r"beta must be in \[0, 2\], got 2.5: .*sigmoid"),
    "beta below": (delta_rule, QKV, "beta", 0 * scalar(), -scalar(), r"beta must be in \[0, 2\], got -0.5"),
    "erase": (delta_rule, {**QKV, "write": wide()}, "beta", 4 * wide(), 5 * wide(), r"beta must be in \[0, 2\], got 2.5"),
    "write": (delta_rule, {**QKV, "beta": wide()}, "write", 0 * wide(), -wide(), r"write must be in \[0, 2\], got -0.5"),
    "dplr": (
        dplr_delta_rule, {**QKV, "a": wide(), "b": wide()}, "log_decay", 0 * wide(), wide(), "log_decay must be <= 0, got 0.5"
    ),
    "diagonal": (
        diagonal_recurrence, {"b": wide()}, "log_a", 0 * full(1, H, K), full(0.5, H, K), "log_a must be <= 0, got 0.5"
    ),
    "diagonal, complex": (
        diagonal_recurrence, {"b": wide() + 0j}, "log_a", 0 * full(1, H, K) + 3j, full(0.5, H, K) + 3j,
        "log_a must be <= 0, got 0.5",
    ),
    "ssm": (
        diagonal_ssm, SSM, "a", ON_THE_CIRCLE, full(0.75, H, 2, K),
        r"the modulus of a must be in \[0, 1\], got 1.06: .*exp\(dt \* rate\)",
    ),
    "dt": (selective_scan, SELECTIVE, "dt", full(0, B, T, H), full(-0.5, B, T, H), "dt must be >= 0, got -0.5: .*softplus"),
    "a": (selective_scan, SELECTIVE, "a", full(0, H, K), full(0.5, H, K), r"a must be <= 0, got 0.5: .*-exp\(x\)"),
    "log-linear": (
        log_linear_attention, {**QKV, "level_scales": full(1, B, T, H, 3)}, "log_decay", 0 * scalar(), scalar(),
        "log_decay must be <= 0, got 0.5",
    ),
    "moneta": (moneta, MIRAS, "log_decay", 0 * wide(), wide(), "log_decay must be <= 0, got 0.5"),
    "yaad": (yaad, {**MIRAS, "threshold": scalar()}, "log_decay", 0 * wide(), wide(), "log_decay must be <= 0, got 0.5"),
    "threshold": (yaad, MIRAS, "threshold", scalar(), -scalar(), "threshold must be >= 0, got -0.5"),
    "rate": (ttt_linear, TTT, "rate", 0 * scalar(), -scalar(), r"rate must be >= 0, got -0.5: .*sigmoid\(x\)"),
    "rate a channel": (moneta, MIRAS, "rate", 0 * wide(), -wide(), "rate must be >= 0, got -0.5"),
    "memora": (memora, MIRAS, "log_decay", 0 * wide(), wide(), "log_decay must be <= 0, got 0.5"),
}  # fmt: skip


WAYS = {
    "eager": lambda call: call(),
    "jit": lambda call: jax.jit(call)(),
    "scan": lambda call: jax.tree.map(lambda x: x[-1], jax.lax.scan(lambda carry, _: (carry, call()), 0.0, length=2)[1]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", GATES)
def test_known_gates_out_of_range_are_named_with_value_and_remedy(case, way):
    op, arrays, name, _, beyond, message = GATES[case]
    with pytest.raises(ValueError, match=message):
        WAYS[way](lambda: op(**{**arrays, name: beyond}))


@pytest.mark.parametrize("case", GATES)
def test_known_gates_at_the_border_run_as_constants_of_a_trace(case):
    """Shapes alone: what a constant needs from the check is decided while tracing."""
    op, arrays, name, border, _, _ = GATES[case]
    o, _ = jax.eval_shape(lambda: op(**{**arrays, name: border}))
    assert o.shape[:2] == (B, T)


@pytest.mark.parametrize("case", GATES)
def test_gates_that_are_not_known_pass(case):
    op, arrays, name, _, beyond, _ = GATES[case]
    jax.eval_shape(lambda gate: op(**{**arrays, name: gate}), beyond)


@pytest.mark.parametrize("way", WAYS)
def test_constants_give_the_numbers_of_arguments(way):
    gate = np.asarray(-np.random.default_rng(0).random((B, T, H)), np.float32)
    wanted = jax.jit(lambda gate: linear_attention(**QKV, log_decay=gate))(gate)[0]
    got = WAYS[way](lambda: linear_attention(**QKV, log_decay=gate))[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_nothing_and_no_elements_are_in_every_range():
    check_range("x", None, 0, 1, "")
    check_range("x", jnp.zeros((0, 3)), 1, math.inf, "")
