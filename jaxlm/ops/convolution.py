"""Short causal depthwise convolution: each channel mixes its own last few inputs."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.ops.segments import check_segment_ids, resets
from jaxlm.parallel import sequence


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y_t = activation(sum_j weight[j] x_{t-W+1+j} + bias), so weight[W-1] meets the newest input.

    The causal depthwise convolution in front of many recurrent mixers (H3, arXiv 2212.14052; Mamba, arXiv 2312.00752).
    Sums are float32 or finer.

    Args:
      x: inputs.
      weight: taps, oldest input first.
      bias: added before the activation.
      state: the W-1 inputs before token 0, oldest first; None stands for zeros.
      segment_ids: inputs of other runs count as zero; `state` belongs to the first run of the row.
      activation: None or "silu".

    Returns:
      y in x's dtype, and the last W-1 inputs of the last run, zeros where that is shorter.

    Raises:
      ValueError: on shapes that do not fit or an unknown activation.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, D], got {x.shape}")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != channels:
        raise ValueError(f"weight must be [W, D] with W >= 1 and D = {channels} as in x, got {weight.shape}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [D] = ({channels},), got {bias.shape}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation={activation!r} is not there; choose None or "silu"')
    past = weight.shape[0] - 1
    if state is not None and state.shape != (batch, past, channels):
        raise ValueError(f"state must be [B, W-1, D] = {(batch, past, channels)}, got {state.shape}")
    check_segment_ids(segment_ids, (batch, length))

    if state is None:
        state = jnp.zeros((batch, past, channels), x.dtype)
    state = state.astype(x.dtype)
    reset = None if segment_ids is None else resets(segment_ids)
    if past and sequence.split(length):
        # The channels of convolutions follow the heads of their mixer.
        sizes = {"batch": batch, sequence.AXIS: length, "heads": channels}
        tokens = None if reset is None else ("batch", sequence.AXIS)
        return sequence.shard_map(
            partial(_over_shards, activation), sizes,
            (("batch", sequence.AXIS, "heads"), (None, "heads"), None if bias is None else ("heads",),
             ("batch", None, "heads"), tokens),
            (("batch", sequence.AXIS, "heads"), ("batch", None, "heads")), x, weight, bias, state, reset,
        )  # fmt: skip
    none_before = None if reset is None else jnp.zeros((batch, past), bool)
    return _convolve(activation, x, weight, bias, state, reset, none_before)


def _over_shards(activation, x, weight, bias, state, reset):
    """The inputs before a shard are the end of the shard before."""
    resets_before = None
    if reset is not None:
        resets_before = sequence.halo(reset, jnp.zeros((x.shape[0], state.shape[1]), bool))
    y, state = _convolve(activation, x, weight, bias, sequence.halo(x, state), reset, resets_before)
    return y, sequence.from_last(state)


def _convolve(activation, x, weight, bias, before, reset, resets_before):
    """`before` are the W-1 inputs before token 0, `resets_before` where runs begin among them."""
    past, length = before.shape[1], x.shape[1]
    inputs = jnp.concatenate([before, x], axis=1)
    runs = None
    if reset is not None:
        # Of these arrays alone: under a mesh, `run_index` would split their axis, whose length is no sequence's.
        runs = lax.cumsum(jnp.concatenate([resets_before, reset], axis=1).astype(jnp.int32), axis=1)

    precise = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((), precise) if bias is None else bias.astype(precise)
    for j in range(past + 1):
        tap = inputs[:, j : j + length]
        if runs is not None and j < past:
            tap = jnp.where((runs[:, j : j + length] == runs[:, past:])[..., None], tap, 0)
        y = y + tap.astype(precise) * weight[j].astype(precise)
    if activation == "silu":
        y = jax.nn.silu(y)

    new_state = inputs[:, length:]
    if runs is not None:
        new_state = jnp.where((runs[:, length:] == runs[:, -1:])[..., None], new_state, 0)
    return y.astype(x.dtype), new_state
