"""Diagonal linear recurrences on TPUs: h_t = a_t h_{t-1} + b_t, each channel by itself, and their gradient.

The grid is (batch, blocks of channels, chunks of tokens), the last walked in order with h of one token in VMEM. Eight tokens
fill a register: three steps of a parallel scan within it (Hillis and Steele), each a product and a sum with what lies 1, 2 and
4 tokens before, then what the token before the eight left. Backward walks in reverse,

    dh_t = do_t + a_{t+1} dh_{t+1},  da_t = dh_t h_{t-1},  db_t = dh_t,

and makes da in the same pass. Every factor is a product of decays: nothing is divided.

Per token and channel, float32: forward 12 bytes and 2 FLOPs (9 as scanned), backward 20 bytes: memory alone bounds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import CHIPS, call, iota

CHUNK = 256  # tokens
WIDTHS = (512, 256, 128)  # channels of a block
TILE = 8


def declines(*, dtype, chip: str) -> str | None:
    """Why the kernel does not run on numbers of this dtype on this chip (`jax.Device.device_kind`), or None."""
    if not chip.startswith("TPU") or not any(name in chip for name in CHIPS):
        return f"the TPU kernel runs on TPU {', '.join(CHIPS)}, not on {chip or 'an unknown chip'}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


class _Layout:
    """Tokens in chunks and channels in blocks, both padded."""

    def __init__(self, shape: tuple[int, int, int], *, reverse: bool):
        self.B, self.T, self.D = shape
        self.C = min(CHUNK, -(-self.T // TILE) * TILE)
        self.chunks = -(-self.T // self.C)
        padded = -(-self.D // 128) * 128
        self.W = next(width for width in WIDTHS if padded % width == 0)
        self.grid = (self.B, padded // self.W, self.chunks)
        self.padded = (self.B, self.chunks * self.C, padded)
        self.at = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)

    def tokens(self, x=None, fill=0.0):
        """[B, T, D] padded with `fill`; None for the shape of a result."""
        spec = pl.BlockSpec((1, self.C, self.W), lambda b, d, t: (b, self.at(t), d))
        if x is None:
            return jax.ShapeDtypeStruct(self.padded, jnp.float32), spec
        after = ((0, 0), (0, self.padded[1] - self.T), (0, self.padded[2] - self.D))
        return jnp.pad(x, after, constant_values=fill), spec

    def tile_before(self, x):
        """The tile of tokens before each chunk, of padded [B, T, D]; the first tile for the first chunk."""
        tiles = self.C // TILE
        return x, pl.BlockSpec((1, TILE, self.W), lambda b, d, t: (b, jnp.maximum(self.at(t) * tiles - 1, 0), d))

    def state(self, x=None):
        """[B, D], the same in every chunk; None for the shape of a result."""
        spec = pl.BlockSpec((1, 1, self.W), lambda b, d, t: (b, 0, d))
        if x is None:
            return jax.ShapeDtypeStruct((self.B, 1, self.padded[2]), jnp.float32), spec
        return jnp.pad(x, ((0, 0), (0, self.padded[2] - self.D)))[:, None], spec

    def scratch(self) -> dict:
        return {"carry": pltpu.VMEM((1, self.W), jnp.float32)}


def forward(a, b, state, *, interpret=False):
    """h of every token.

    Args:
      a, b: [B, T, D] float32; state: [B, D] float32, the h before token 0.
      interpret: as for `pl.pallas_call`.

    Returns:
      h [B, T, D] float32.
    """
    layout = _Layout(b.shape, reverse=False)
    inputs = {"a": layout.tokens(a), "b": layout.tokens(b), "state": layout.state(state)}
    outputs = {"h": layout.tokens()}
    results = call(_forward_step, "diagonal_forward", layout.grid, inputs, outputs, layout.scratch(), interpret)
    return results["h"][:, : layout.T, : layout.D]


def backward(a, h, do, state, d_final, *, interpret=False):
    """Gradients from the cotangent of h.

    Args:
      a, state: as given to `forward`; h: what it returned; do: [B, T, D] float32.
      d_final: [B, D] float32, added to the cotangent of the last h.

    Returns:
      da and db [B, T, D], and the gradient of the state [B, D], float32.
    """
    layout = _Layout(h.shape, reverse=True)
    # Padding passes the last token's cotangent on.
    inputs = {"a": layout.tokens(a, 1.0), "h": layout.tokens(h), "do": layout.tokens(do)}
    inputs |= {"tile_before": layout.tile_before(inputs["h"][0])}
    inputs |= {"state": layout.state(state), "d_final": layout.state(d_final)}
    outputs = {"da": layout.tokens(), "db": layout.tokens(), "d_state": layout.state()}
    results = call(_backward_step, "diagonal_backward", layout.grid, inputs, outputs, layout.scratch(), interpret)
    da, db = (results[name][:, : layout.T, : layout.D] for name in ("da", "db"))
    return da, db, results["d_state"][:, 0, : layout.D]


def _shifted(x, s: int, fill: float):
    """Rows of a tile s further down, or up for negative s, with `fill` where none come from."""
    row = iota(x.shape, 0)
    return jnp.where((row >= s) if s > 0 else (row < TILE + s), pltpu.roll(x, s % TILE, 0), fill)


def _scan(a, b, direction: int):
    """Products of a and the recurrence from zeros over the rows of a tile, downwards (1) or upwards (-1)."""
    for s in (1, 2, 4):
        b = a * _shifted(b, direction * s, 0.0) + b
        a = a * _shifted(a, direction * s, 1.0)
    return a, b


def _forward_step(a, b, state, h, carry):
    """One chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = state[0]

    before = carry[...]
    for start in range(0, a.shape[1], TILE):
        rows = pl.ds(start, TILE)
        product, found = _scan(a[0, rows], b[0, rows], 1)
        found = product * before + found
        h[0, rows] = found
        before = found[TILE - 1 :]
    carry[...] = before


def _backward_step(a, h, do, tile_before, state, d_final, da, db, d_state, carry):
    """One chunk; the last chunk comes first. What is carried is a dh of the token after."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        carry[...] = d_final[0]

    later = carry[...]
    entering = jnp.where(step == pl.num_programs(2) - 1, state[0], tile_before[0, pl.ds(TILE - 1, 1)])
    row = iota((TILE, a.shape[2]), 0)
    for start in reversed(range(0, a.shape[1], TILE)):
        rows = pl.ds(start, TILE)
        factors, hidden = a[0, rows], h[0, rows]
        # The last row's factor is part of what is carried.
        product, found = _scan(_shifted(factors, -1, 1.0), do[0, rows], -1)
        found = product * later + found
        db[0, rows] = found
        previous = h[0, pl.ds(start - 1, 1)] if start else entering
        da[0, rows] = found * jnp.where(row == 0, previous, pltpu.roll(hidden, 1, 0))
        later = (factors * found)[:1]
    carry[...] = later

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state[0] = later
