"""Rotary position embedding, and positions inside packed rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.ops.segments import positions_in_runs, resets


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, base: float = 10_000.0, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """RoPE in the half-split layout of Llama (Su et al. 2021, arXiv 2104.09864), angles in float32.

    Channel m of the first half is paired with channel m of the second; the pair turns by `position * base^(-2m/R)` where
    `R = fraction * K` channels are rotated and the others pass through.

    Raises:
      ValueError: if the number of rotated channels is odd.
    """
    rotated = round(x.shape[-1] * fraction)
    if rotated % 2:
        raise ValueError(f"rotary embedding needs an even number of channels, got {fraction} of {x.shape[-1]} = {rotated}")
    half = rotated // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x, [half, rotated], axis=-1)
    first32, second32 = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first32 * cos - second32 * sin, second32 * cos + first32 * sin)
    return jnp.concatenate([turned[0].astype(x.dtype), turned[1].astype(x.dtype), rest], axis=-1)


def positions_in_segments(
    segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int], start: Int[Array, B] | None = None
) -> Int[Array, "B T"]:
    """Position of every token in its document: counted from 0 where the id changes, from `start` in the row's first run."""
    start = jnp.zeros(shape[0], jnp.int32) if start is None else start
    positions = positions_in_runs(None if segment_ids is None else resets(segment_ids), start, shape[1])
    return jnp.broadcast_to(positions, shape)
