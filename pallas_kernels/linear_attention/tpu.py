"""Chunked linear attention on TPUs: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, and its gradient.

Forward: the grid is (batch, groups of heads, chunks of C tokens), the last walked in order with the states of a group in
VMEM. A step reads q, k, v (and g) once and writes o once:

    o = scale (before * (q h) + P v),   h <- total h + k^T (after * v),   P = (q k^T) * weights,

with `before`, `after` and `total` the products of the decays up to a token, after it, and over the chunk. For training it
also writes the states that enter the chunks, in the dtype of q: K V / C numbers a token.

Backward: the same grid in reverse order with the cotangents of the states in VMEM. A step reads q, k, v, g, do and the
entering state once and writes dq, dk, dv and, for a decay, the flow q dq - k dk, whose reverse sum over the chunk plus what
the leaving state and its cotangent have in common is dg.

Scalar decays: cumulative sums over chunks are made outside (a row of 4 bytes a token and head) and weights are exp(b_i - b_j).
Vector decays: scores factorise over a binary tree of blocks (as in `jaxlm.ops.linear_attention`): the pair (i, j) parts at
one block of 2s tokens with i in its right half and j in its left, and the exponents are sums of g from j to the end of the
left half and from the start of the right half to i, never differences: any decay is safe, and no factor that enters row i
belongs to a later token. Every level is one matrix product of all tokens, of which the pairs of that level are kept.

Per token and head, K = V = 128, C = 128, bf16: forward 4 K V + 2 C (K + V) = 131k FLOPs on 1,028 bytes (vector: 1,536),
backward 328k on 2,312 (3,584): at most 142 FLOPs a byte, below what any TPU needs to be busy (240 on v5e), so memory bounds
a perfect kernel; what the compiler schedules is more than that: docs/kernels.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import (
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

__all__ = ["CHUNK", "SAVED_AXES", "backward", "declines", "forward"]

CHUNK = 128  # suits the matrix units
BEFORE, AFTER = 0, 1

# The logical axes of what `forward` saves.
SAVED_AXES = (("batch", None, "heads", None, None), ("batch", "heads", None, None))


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
      o [B, T, H, V] in v's dtype; the final state, float32; the states that enter the chunks [B, N, H, V, K] in q's dtype with
      the final state, or None.
    """
    vector = log_decay is not None and log_decay.shape[-1] > 1
    layout = Layout(q, v, heads_a_step(q.shape[2], q.shape[3], v.shape[3], 1 if vector else 2), chunk or CHUNK)
    shape = jax.ShapeDtypeStruct
    entering = jnp.swapaxes(state, -1, -2)
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
    final_state = jnp.swapaxes(results["final"], -1, -2)
    return layout.unpadded(results["o"]), final_state, (results["saved"], final_state) if save else None


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
    heads = heads_a_step(q.shape[2], q.shape[3], v.shape[3], 1 if kind == "vector" else 2)
    layout = Layout(q, v, heads, chunk or CHUNK, reverse=True)
    shape, padded = jax.ShapeDtypeStruct, layout.chunks * layout.C
    entering, final_state = saved
    d_leaving = jnp.swapaxes(d_final, -1, -2)
    inputs = prepared(layout, q, k, v, log_decay, reset) | {
        "do": layout.tokens(do), "entering": layout.states_of_chunks(entering), "d_final": layout.states(d_leaving),
    }  # fmt: skip

    def like(x):
        return shape((layout.B, padded, layout.H * x.shape[-1]), x.dtype), layout.token_spec(x.shape[-1])

    outputs = {"dq": like(q), "dk": like(k), "dv": like(v), "d_state": layout.states(shape(d_leaving.shape, jnp.float32))}
    scratch = _scratch(layout, vector=kind == "vector", backward=True)
    if kind != "none":
        common = jnp.sum(final_state * d_final, axis=-1).reshape(layout.B, -1, layout.n, layout.K)
        inputs["common"] = common, pl.BlockSpec((1, 1, layout.n, layout.K), lambda b, g, t: (b, g, 0, 0))
        scratch["left"] = pltpu.VMEM((layout.n, layout.K), jnp.float32)
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
    return dq, dk, dv, dg, jnp.swapaxes(results["d_state"], -1, -2)


def _scratch(layout: Layout, *, vector: bool, backward: bool) -> dict:
    """The states, and where the tree of a vector decay keeps its sums."""
    memory = {"carry": pltpu.VMEM((layout.n, layout.V, layout.K), jnp.float32)}
    if vector:
        levels = layout.C.bit_length() - 1
        tokens = (layout.n, levels, layout.C, layout.K)
        sums = (layout.n, levels - 2, 2, layout.C, layout.K)
        memory |= {
            "sums": pltpu.VMEM(sums, jnp.float32), "z": pltpu.VMEM(tokens, layout.dtype),
            "table": pltpu.VMEM((layout.n * layout.C, layout.C), jnp.float32),
        }  # fmt: skip
    if vector and backward:
        memory |= {
            "factor": pltpu.VMEM(tokens, jnp.float32), "d_table": pltpu.VMEM((layout.n, layout.C, layout.C), jnp.float32),
            "d_qk": pltpu.VMEM((layout.n, 2, layout.C, layout.K), jnp.float32),
        }  # fmt: skip
    return memory


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
        weigh = _decay(rest, head, n, q, k, rest, masks)
        scores = weigh.scores(qh, kh)
        inner = dot(scores.astype(vh.dtype), vh, NN)
        outer = weigh.read(qh, h.astype(qh.dtype))
        o[0, :, pl.ds(head * vh.shape[-1], vh.shape[-1])] = (scale * (inner + outer)).astype(o.dtype)
        carry[head] = times(weigh.total, h) + dot(vh, scaled(kh, weigh.after), TN)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        final[0] = carry[...]


def _backward_step(
    q, k, v, do, entering, d_final, dq, dk, dv, d_state, carry, common=None, left=None, dg=None, flow=None,
    *, scale, n, **rest,
):
    """One chunk of n heads; the last chunk comes first."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        carry[...] = d_final[0]
        if left is not None:
            left[...] = common[0, 0]

    masks = Masks(q.shape[1], rest.get("start"))
    for head in range(n):
        qh, kh, vh, doh = (head_of(x, head, n) for x in (q, k, v, do))
        h, dh = entering[0, 0, head], carry[head]
        dtype, keys, values = qh.dtype, qh.shape[-1], vh.shape[-1]
        dh_low = dh.astype(dtype)
        weigh = _decay(rest, head, n, q, k, rest, masks)
        scores, dqh, dkh = weigh.pullback(scale, qh, kh, vh, doh)
        dqh = dqh + scale * times(weigh.before, dot(doh, h, NN))
        dkh = dkh + times(weigh.after, dot(vh, dh_low, NN))
        dvh = dot(scaled(kh, weigh.after), dh_low, NT) + dot(scores, doh, TN)
        dh = times(weigh.total, dh) + dot(doh, scaled(qh, times(weigh.before, jnp.float32(scale))), TN)
        carry[head] = dh
        dq[0, :, pl.ds(head * keys, keys)] = dqh.astype(dq.dtype)
        dk[0, :, pl.ds(head * keys, keys)] = dkh.astype(dk.dtype)
        dv[0, :, pl.ds(head * values, values)] = dvh.astype(dv.dtype)
        if left is not None:
            flowed = qh * dqh - kh * dkh
            before_it = left[head : head + 1]
            left[head : head + 1] = jnp.sum(h * dh, axis=0, keepdims=True)
            if dg is not None:
                dg[0, :, pl.ds(head * keys, keys)] = _sum_from(flowed) + before_it
            else:
                row = jnp.sum(flowed, axis=1, keepdims=True).T
                is_last = iota(row.shape, 1) == row.shape[1] - 1
                flow[0, 0, 0, head : head + 1] = jnp.where(is_last, row + jnp.sum(before_it), row)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state[0] = carry[...]


class _Channels:
    """A decay for every channel of K; `scores` or `pullback` goes before the rest, which needs the sums it leaves.

    A level of the tree is one array z [C, K]: the queries of right halves and the keys of left halves, scaled by the factors
    of their halves. z z^T has the level's scores where i lies right and j left, and the matrix of d_scores and its transpose
    times z has the gradients of both.

    What passes from one step to the next does so through memory (`scratch`), in pieces of a few rows: registers hold a
    piece at a time.
    """

    NEAR = (1, 2, 4)  # levels within 8 tokens, a tile of registers

    def __init__(self, refs: dict, head: int, n: int, q, k, scratch: dict, masks: Masks):
        width = q.shape[-1] // n
        self.q, self.k, self.g, self.channels = q, k, refs["g"], pl.ds(head * width, width)
        self.masks, self.size = masks, masks.size
        self.sums, self.z = scratch["sums"].at[head], scratch["z"].at[head]
        # The tables of all heads are one below the other, as a masked store takes slices alone.
        self.tables, self.head = scratch["table"], head
        self.table = self.tables.at[pl.ds(head * self.size, self.size)]
        if "factor" in scratch:
            self.factor, self.d_table, self.d_qk = (scratch[name].at[head] for name in ("factor", "d_table", "d_qk"))
        else:
            self.factor = None

    def _set(self, slot: int, rows, mixed, sums):
        factor = jnp.exp(sums)
        self.z[slot, rows] = (mixed * factor).astype(self.z.dtype)
        if self.factor is not None:
            self.factor[slot, rows] = factor

    def _near(self):
        """Every level within tiles, in slots 0, 1, 2; leaves the sums over tiles up to and after every token."""
        width = self.channels.size
        row = iota((2, 8, width), 1)
        for start in range(0, self.size, 16):
            rows = pl.ds(start, 16)
            q, k, before = (x[0, rows, self.channels].reshape(2, 8, width) for x in (self.q, self.k, self.g))
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)
            after = jnp.zeros_like(before)
            for slot, s in enumerate(self.NEAR):
                right = row // s % 2 == 1
                mixed, sums = jnp.where(right, q, k), jnp.where(right, before, after)
                self._set(slot, rows, mixed.reshape(16, width), sums.reshape(16, width))
                left_total, right_total = _from_row(before, s, s - 1), _from_row(before, s, 2 * s - 1)
                before, after = jnp.where(right, before + left_total, before), jnp.where(right, after, after + right_total)
            self.sums[0, BEFORE, rows], self.sums[0, AFTER, rows] = before.reshape(16, width), after.reshape(16, width)

    def _far(self):
        """The other levels: yields (s, slot), then doubles the blocks."""
        slot = len(self.NEAR)
        # Every sum is written once, so that no read has to come early: where the newest of each tile of 8 rows lies.
        newest = {side: dict.fromkeys(range(0, self.size, 8), 0) for side in (BEFORE, AFTER)}

        def read(side, start, stop):
            return [self.sums[newest[side][row], side, pl.ds(row, 8)] for row in range(start, stop, 8)]

        s = 8
        while s < self.size:
            for start in range(0, self.size, 2 * s):
                middle, stop = start + s, start + 2 * s
                mixed = [x[0, pl.ds(at, s), self.channels] for x, at in ((self.k, start), (self.q, middle))]
                sums = jnp.concatenate(read(AFTER, start, middle) + read(BEFORE, middle, stop))
                self._set(slot, pl.ds(start, 2 * s), jnp.concatenate(mixed), sums)
            yield s, slot
            written = slot - len(self.NEAR) + 1
            for start in range(0, self.size, 2 * s):
                middle, stop = start + s, start + 2 * s
                left_total, right_total = read(BEFORE, middle - 8, middle)[0][7:], read(BEFORE, stop - 8, stop)[0][7:]
                for side, rows, more in ((AFTER, (start, middle), right_total), (BEFORE, (middle, stop), left_total)):
                    for row, old in zip(range(*rows, 8), read(side, *rows), strict=True):
                        self.sums[written, side, pl.ds(row, 8)] = old + more
                for side, rows in ((AFTER, (start, middle)), (BEFORE, (middle, stop))):
                    newest[side] |= dict.fromkeys(range(*rows, 8), written)
            s, slot = 2 * s, slot + 1
        before, after = (jnp.exp(jnp.concatenate(read(side, 0, self.size))) for side in (BEFORE, AFTER))
        self.before, self.after, self.total = self.masks.with_resets(before, after, before[self.size - 1 :])

    def _near_scores(self, q, k):
        near = jnp.where(self.masks.apart == 0, dot(q, k, NT), 0)
        for slot, s in enumerate(self.NEAR):
            near = jnp.where(self.masks.at_level(s), dot(self.z[slot], self.z[slot], NT), near)
        self.table[...] = near

    def _far_scores(self, s: int, slot: int):
        """Scores of the pairs that part at blocks of 2s tokens."""
        rights = [slice(start + s, start + 2 * s) for start in range(0, self.size, 2 * s)]
        parts = dot(_joined([self.z[slot, right] for right in rights]), self.z[slot], NT)
        lane = iota((s, self.size), 1)
        for m, right in enumerate(rights):
            # To the left of the block's left half stand pairs of later levels, which fill them in after this one.
            mask = lane < right.start
            rows = pl.ds(self.head * self.size + right.start, s)
            pltpu.store(self.tables.at[rows], parts[m * s : (m + 1) * s], mask=mask)

    def _seen(self, scores):
        return scores if self.masks.together is None else jnp.where(self.masks.together, scores, 0)

    def scores(self, q, k):
        self._near()
        self._near_scores(q, k)
        for s, slot in self._far():
            self._far_scores(s, slot)
        return self._seen(self.table[...])

    def read(self, q, h):
        return dot(scaled(q, self.before), h, NT)

    def pullback(self, scale, q, k, v, do):
        # What meets z: the cotangent of a pair's score, for its query and for its key.
        both = jnp.where(self.masks.causal, dot(do, v, NT), dot(v, do, NT))
        if self.masks.together is not None:
            both = jnp.where(self.masks.together, both, 0)
        self.d_table[...] = scale * both
        self._near()
        self._near_scores(q, k)
        own = jnp.where(self.masks.apart == 0, self.d_table[...], 0).astype(q.dtype)
        dq, dk = dot(own, k, NN), dot(own, q, NN)
        row = iota(dq.shape, 0)
        for slot, s in enumerate(self.NEAR):
            both = self._d_level(self.d_table[...], self.masks.apart, s)
            d_mixed = self.factor[slot] * dot(both, self.z[slot], NN)
            right = row // s % 2 == 1
            dq, dk = jnp.where(right, dq + d_mixed, dq), jnp.where(right, dk, dk + d_mixed)
        self.d_qk[0], self.d_qk[1] = dq, dk
        for s, slot in self._far():
            self._far_scores(s, slot)
            for start in range(0, self.size, 2 * s):
                block = pl.ds(start, 2 * s)
                both = self._d_level(self.d_table[block], self.masks.apart[start : start + 2 * s], s)
                d_mixed = self.factor[slot, block] * dot(both, self.z[slot], NN)
                self.d_qk[1, pl.ds(start, s)] += d_mixed[:s]
                self.d_qk[0, pl.ds(start + s, s)] += d_mixed[s:]
        return self._seen(scale * self.table[...]).astype(q.dtype), self.d_qk[0], self.d_qk[1]

    def _d_level(self, both, apart, s: int):
        return jnp.where((apart >= s) & (apart < 2 * s), both, 0).astype(self.z.dtype)


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _decay(refs: dict, head: int, n: int, q, k, scratch: dict, masks: Masks) -> Shared | _Channels:
    return _Channels(refs, head, n, q, k, scratch, masks) if "g" in refs else Shared(refs, head, masks)


def _from_row(x, s: int, row: int):
    """In tiles [N, 8, K], every row's block of 2s rows filled with the block's row of that number."""
    parts = [x[:, at : at + 1] for at in range(row, 8, 2 * s)]
    width = 2 * s
    return jnp.concatenate([jnp.broadcast_to(part, (x.shape[0], width, x.shape[2])) for part in parts], axis=1)


def _sum_from(x):
    """Sums over the rows of x [C, K] from each on."""
    size, width = x.shape
    row = iota((8, width), 0)[None]
    tiles = x.reshape(size // 8, 8, width)
    for s in (1, 2, 4):
        # Every left half gets the sum of its right half, which stands in that half's first row.
        tiles = jnp.where(row // s % 2 == 0, tiles + _from_row(tiles, s, s), tiles)
    rest, parts = jnp.zeros((1, width), x.dtype), []
    for tile in reversed(range(size // 8)):
        parts.append(tiles[tile] + rest)
        rest = parts[-1][:1]
    return jnp.concatenate(parts[::-1])
