"""What is particular to the short convolution; the rest is in test_ops.py."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.convolution import short_convolution
from pallas_kernels import aot


def test_newest_input_meets_the_last_tap_and_the_state_holds_the_last_inputs():
    x = jnp.asarray([[[1.0], [2.0], [3.0]]])
    y, state = short_convolution(x, jnp.asarray([[100.0], [10.0], [1.0]]))
    np.testing.assert_array_equal(y[0, :, 0], [1, 12, 123])
    np.testing.assert_array_equal(state[0, :, 0], [2, 3])
    y, state = short_convolution(x[:, :1], jnp.asarray([[100.0], [10.0], [1.0]]), jnp.asarray([0.5]), state=state)
    np.testing.assert_array_equal(y[0, :, 0], [231.5])
    np.testing.assert_array_equal(state[0, :, 0], [3, 1])


def test_a_width_of_one_has_an_empty_state():
    y, state = short_convolution(jnp.ones((2, 3, 4)), jnp.full((1, 4), 3.0), segment_ids=jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_array_equal(y, jnp.full((2, 3, 4), 3.0))
    assert state.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((3, 2))}, "x must be"),
        ({"weight": jnp.zeros((4, 3))}, "weight must be"),
        ({"bias": jnp.zeros(3)}, "bias must be"),
        ({"state": jnp.zeros((1, 4, 2))}, "state must be"),
        ({"segment_ids": jnp.zeros((1, 4), jnp.int32)}, "segment_ids must be"),
        ({"activation": "relu"}, 'choose None or "silu"'),
    ],
)
def test_errors_name_the_argument(change, message):
    arrays = {"x": jnp.zeros((1, 3, 2)), "weight": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match=message):
        short_convolution(**{**arrays, **change})


def compiled_case(direction: str, resets: bool):
    """The convolution and its activation on 2 x 4096 tokens of 2048 channels, for `pallas_kernels.aot.report`."""
    x, taps = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 4096, 2048), (4, 2048)))
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32) if resets else None

    def forward(x, taps, ids):
        return short_convolution(x, taps, segment_ids=ids, activation="silu")[0]

    if direction == "forward":
        return forward, (x, taps, ids)
    return lambda x, taps, ids, dy: jax.vjp(lambda *args: forward(*args, ids), x, taps)[1](dy), (x, taps, ids, x)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu")
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("direction", "arrays", "most"), [("forward", 2, 1.01), ("backward", 3, 3.1)])
def test_bytes_of_the_compiled_convolution(direction, arrays, most, resets):
    """XLA reads the inputs once and writes the activated outputs once, so a kernel would gain nothing forward."""
    case = {"direction": direction, "resets": resets}
    found = aot.report("v5e", "tests.ops.test_convolution_op:compiled_case", case, schedules=False)["hbm_bytes"]
    least = arrays * 2 * 4096 * 2048 * 2
    assert least <= found <= most * least
