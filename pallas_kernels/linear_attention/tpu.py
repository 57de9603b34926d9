"""Chunked linear attention on TPUs: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, and its gradient.

Forward: the grid is (batch, groups of heads, chunks of C tokens), the last walked in order with the states of a group in
VMEM. A step reads q, k, v (and g) once and writes o once:

    o = scale (before * (q h) + P v),   h <- total h + k^T (after * v),   P = (q k^T) * weights,

with `before`, `after` and `total` the products of the decays up to a token, after it, and over the chunk. For training it
also writes the states that enter the chunks, in the dtype of q: K V / C numbers a token.

Backward: the same grid in reverse order with the cotangents of the states in VMEM. A step reads q, k, v, g, do and the
entering state once and writes dq, dk, dv and, for a decay, the flow q dq - k dk, whose reverse sum over the chunk plus what
the leaving state and its cotangent have in common is dg.

Scalar decays: cumulative sums over chunks are made outside (a row of 4 bytes a token and head, in float32 two, so that their
differences keep its digits) and weights are exp(b_i - b_j).
Vector decays: scores factorise over a binary tree of blocks (as in `jaxlm.ops.linear_attention`): the pair (i, j) parts at
one block of 2s tokens with i in its right half and j in its left, and the exponents are sums of g from j to the end of the
left half and from the start of the right half to i, never differences: any decay is safe, and no factor that enters row i
belongs to a later token. Every level is one matrix product, of which the pairs of that level are kept (`Channels`).

Per token and head, K = V = 128, C = 128, bf16: forward 4 K V + 2 C (K + V) = 131k FLOPs on 1,028 bytes (vector: 1,536),
backward 328k on 1,800 (2,816), besides 256 for the states written and as many read: at most 182 FLOPs a byte, below what any
TPU needs to be busy (240 on v5e), so memory bounds a perfect kernel; what the compiler schedules is more: docs/kernels.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import (
    LANES,
    NN,
    NT,
    TN,
    Layout,
    Masks,
    Shared,
    call,
    declines,
    dot,
    head_of,
    heads_a_step,
    iota,
    prepared,
    scaled,
    times,
)
from pallas_kernels.tpu_channels import Channels, sums_from

__all__ = ["CHUNK", "SAVED_AXES", "backward", "declines", "forward"]

CHUNK = 128  # suits the matrix units

# The logical axes of what `forward` saves.
SAVED_AXES = ("batch", None, "heads", None, None)


def forward(scale, q, k, v, log_decay, reset, state, *, save: bool, chunk: int | None = None, interpret=False):
    """Outputs, final state and what `backward` needs.

    Args:
      scale: multiplies q.
      q, k: [B, T, H, K]; v: [B, T, H, V], bfloat16 or float32.
      log_decay: None, [B, T, H, 1] or [B, T, H, K], float32, <= 0.
      reset: None or bool [B, T]: the state that such a token would continue is dropped.
      state: [B, H, K, V] float32, enters token 0.
      save: also return the states that enter the chunks.
      chunk: C, a power of two from 16 on; None for 128, which suits the matrix units.
      interpret: as for `pl.pallas_call`.

    Returns:
      o [B, T, H, V] in v's dtype; the final state, float32; the states that enter the chunks [B, N, H', V, K] in q's dtype, or
      None: H', as heads of 64 channels may need one more to fill the lanes.
    """
    vector = log_decay is not None and log_decay.shape[-1] > 1
    layout = Layout(q, v, _heads(q, v, vector=vector, backward=False), chunk or CHUNK)
    shape = jax.ShapeDtypeStruct
    entering = layout.transposed(state)
    outputs = {
        "o": (shape((layout.B, layout.chunks * layout.C, layout.H * layout.V), v.dtype), layout.token_spec(layout.V)),
        "final": layout.states(shape(entering.shape, jnp.float32)),
    }
    if save:
        saved = shape((layout.B, layout.chunks, *entering.shape[1:]), q.dtype)
        outputs["saved"] = layout.states_of_chunks(saved)
    results = call(
        _forward_step, "linear_attention_forward", layout.grid,
        prepared(layout, q, k, v, log_decay, reset) | {"state": layout.states(entering)}, outputs,
        _scratch(layout, vector=vector, backward=False), interpret,
        scale=scale, n=layout.n,
    )  # fmt: skip
    final_state = layout.state_of(results["final"])
    return layout.unpadded(results["o"]), final_state, results.get("saved")


def backward(scale, q, k, v, log_decay, reset, saved, do, d_final, *, chunk: int | None = None, interpret=False):
    """Gradients from the cotangents of o and of the final state.

    Args:
      scale, q, k, v, log_decay, reset: as given to `forward`.
      saved: as it returned it.
      do: [B, T, H, V]; d_final: [B, H, K, V] float32.

    Returns:
      dq, dk, dv in the dtypes of q, k, v; dlog_decay float32 or None; the gradient of the initial state, float32.
    """
    kind = "none" if log_decay is None else "vector" if log_decay.shape[-1] > 1 else "scalar"
    layout = Layout(q, v, _heads(q, v, vector=kind == "vector", backward=True), chunk or CHUNK, reverse=True)
    shape, padded = jax.ShapeDtypeStruct, layout.chunks * layout.C
    d_leaving = layout.transposed(d_final)
    inputs = prepared(layout, q, k, v, log_decay, reset) | {
        "do": layout.tokens(do), "entering": layout.states_of_chunks(saved), "d_final": layout.states(d_leaving),
    }  # fmt: skip

    def like(x):
        return shape((layout.B, padded, layout.H * x.shape[-1]), x.dtype), layout.token_spec(x.shape[-1])

    outputs = {"dq": like(q), "dk": like(k), "dv": like(v), "d_state": layout.states(shape(d_leaving.shape, jnp.float32))}
    scratch = _scratch(layout, vector=kind == "vector", backward=True)
    if kind == "vector":
        outputs["dg"] = like(log_decay)
    elif kind == "scalar":
        rows = (layout.B, layout.H // layout.n, layout.chunks, layout.n, layout.C)
        outputs["flow"] = shape(rows, jnp.float32), layout.row_spec()
    results = call(
        _backward_step, "linear_attention_backward", layout.grid, inputs, outputs, scratch, interpret,
        scale=scale, n=layout.n,
    )  # fmt: skip
    dg = None
    if kind == "vector":
        dg = layout.unpadded(results["dg"])
    elif kind == "scalar":
        sums = lax.cumsum(results["flow"], axis=4, reverse=True)
        dg = layout.unpadded(sums.transpose(0, 2, 4, 1, 3).reshape(layout.B, padded, layout.H))
    dq, dk, dv = (layout.unpadded(results[name]) for name in ("dq", "dk", "dv"))
    return dq, dk, dv, dg, layout.state_of(results["d_state"])


def _heads(q, v, *, vector: bool, backward: bool) -> int:
    """How many go side by side, which hides latencies: as many as fit the memory of v4, of 128 channels in bfloat16 eight."""
    K, V = (max(x.shape[3], LANES) for x in (q, v))
    room = 2048 if vector and backward and K > LANES else 4096  # the tables of its decays are of K
    return heads_a_step(q, v, max(1, room // ((K + V) * q.dtype.itemsize)), vector=vector)


def _scratch(layout: Layout, *, vector: bool, backward: bool) -> dict:
    """The states, and what decays of channels need."""
    channels = Channels.scratch(layout, keys=False, backward=backward) if vector else {}
    return channels | {"carry": pltpu.VMEM((layout.n, layout.V, layout.K), jnp.float32)}


def _forward_step(q, k, v, state, o, final, carry, saved=None, *, scale, n, **rest):
    """One chunk of n heads."""
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        carry[...] = state[0]

    masks = Masks(q.shape[1], rest.get("start"))
    for head in range(n):
        qh, kh, vh = (head_of(x, head, n) for x in (q, k, v))
        h = carry[head]
        if saved is not None:
            saved[0, 0, head] = h.astype(saved.dtype)
        weigh = _decay(rest | {"q": q, "k": k}, head, n, masks)
        scores = weigh.scores(qh, kh)
        inner = dot(scores.astype(vh.dtype), vh, NN)
        outer = weigh.read(qh, h.astype(qh.dtype))
        o[0, :, pl.ds(head * vh.shape[-1], vh.shape[-1])] = (scale * (inner + outer)).astype(o.dtype)
        carry[head] = times(weigh.total, h) + dot(vh, weigh.written(kh), TN)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        final[0] = carry[...]


def _backward_step(q, k, v, do, entering, d_final, dq, dk, dv, d_state, carry, dg=None, flow=None, *, scale, n, **rest):
    """One chunk of n heads; the last chunk comes first."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        carry[...] = d_final[0]

    masks = Masks(q.shape[1], rest.get("start"))
    for head in range(n):
        qh, kh, vh, doh = (head_of(x, head, n) for x in (q, k, v, do))
        h, dh = entering[0, 0, head], carry[head]
        dtype, keys, values = qh.dtype, qh.shape[-1], vh.shape[-1]
        dh_low = dh.astype(dtype)
        weigh = _decay(rest | {"q": q, "k": k}, head, n, masks)
        scores, dqh, dkh = weigh.pullback(scale, qh, kh, vh, doh)
        dqh = dqh + scale * times(weigh.before, dot(doh, h, NN))
        dk_later = times(weigh.after, dot(vh, dh_low, NN))
        dkh = dkh + dk_later
        dvh = dot(weigh.written(kh), dh_low, NT) + dot(scores, doh, TN)
        carry[head] = times(weigh.total, dh) + dot(doh, weigh.reading(qh, scale), TN)
        dq[0, :, pl.ds(head * keys, keys)] = dqh.astype(dq.dtype)
        dk[0, :, pl.ds(head * keys, keys)] = dkh.astype(dk.dtype)
        dv[0, :, pl.ds(head * values, values)] = dvh.astype(dv.dtype)
        if dg is None and flow is None:
            continue
        # What the leaving state and its cotangent have in common: of the very numbers that the flow takes off again.
        common = weigh.total * jnp.sum(h * dh, axis=0, keepdims=True) + jnp.sum(kh * dk_later, axis=0, keepdims=True)
        flowed = qh * dqh - kh * dkh
        if dg is not None:
            dg[0, :, pl.ds(head * keys, keys)] = sums_from(flowed) + common
        else:
            row = jnp.sum(flowed, axis=1, keepdims=True).T
            is_last = iota(row.shape, 1) == row.shape[1] - 1
            flow[0, 0, 0, head : head + 1] = jnp.where(is_last, row + jnp.sum(common), row)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state[0] = carry[...]


class _Shared(Shared):
    """One decay for all channels of K, or none."""

    def written(self, k):
        """Keys as they are written into the leaving state."""
        return scaled(k, self.after)

    def reading(self, q, scale):
        """Queries as they read the entering one, with the scale."""
        return scaled(q, times(self.before, jnp.float32(scale)))


class _Channels(Channels):
    """As `_Shared` for a decay of every channel."""

    def scores(self, q, k):
        return super().scores()[0]

    def read(self, q, h):
        return dot(self.q_reading.astype(q.dtype), h, NT)

    def written(self, k):
        return self.k_written.astype(k.dtype)

    def reading(self, q, scale):
        return (scale * self.q_reading).astype(q.dtype)

    def pullback(self, scale, q, k, v, do):
        scores = (scale * self.scores(q, k)).astype(q.dtype)
        d_scores = scale * jnp.where(self.masks.causal, dot(do, v, NT), dot(v, do, NT))
        return scores, *self.gradients(d_scores)


def _decay(refs: dict, head: int, n: int, masks: Masks) -> _Shared | _Channels:
    return _Channels(refs, head, n, masks) if "g" in refs else _Shared(refs, head, masks)
