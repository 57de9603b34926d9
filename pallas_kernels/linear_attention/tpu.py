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

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHUNK = 128
DIMS = (64, 128, 256)
CHIPS = ("v4", "v5", "v6", "7x")
# exp(-128) is 0 in float32 and sums of 128 of them are finite, where those of -inf are not.
FLOOR = -128.0
MOST_HEADS = 8  # a grid step, for the sake of its memory


# The logical axes of what `forward` saves.
SAVED_AXES = (("batch", None, "heads", None, None), ("batch", "heads", None, None))


def declines(*, H: int | None, K: int | None, V: int | None, dtype, decay: str | None, chip: str) -> str | None:
    """Why the kernel does not run for these heads on this chip (`jax.Device.device_kind`), or None. What is None is not known
    and rules nothing out."""
    if not chip.startswith("TPU") or not any(name in chip for name in CHIPS):
        return f"the TPU kernel runs on TPU {', '.join(CHIPS)}, not on {chip or 'an unknown chip'}"
    if any(x is not None and x not in DIMS for x in (K, V)):
        return f"the TPU kernel has K and V in {DIMS}, not K={K}, V={V}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if None not in (H, K, V) and not _groups(H, K, V):
        return f"the TPU kernel needs heads that fill 128 lanes: an even number of them for K or V of 64, not H={H}"
    return None


def _groups(H: int, K: int, V: int) -> list[int]:
    """Numbers of heads that a grid step can take: blocks of whole lanes, or all there is."""
    whole = [n for n in range(1, H + 1) if H % n == 0 and ((n * K % 128 == 0 and n * V % 128 == 0) or n == H)]
    return [n for n in whole if n <= MOST_HEADS]


def _heads(H: int, K: int, V: int, limit: int) -> int:
    fitting = _groups(H, K, V)
    return max([n for n in fitting if n <= limit], default=fitting[0])


def _dot(x, y, contract: tuple[int, int]):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


NN, NT, TN = (1, 0), (1, 1), (0, 0)
BEFORE, AFTER = 0, 1


def _iota(shape: tuple[int, ...], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _call(body: Callable, name: str, grid, inputs: dict, outputs: dict, scratch: dict, interpret, **settings):
    """`pl.pallas_call` with refs by name; inputs and outputs are name -> (array or its shape, block spec)."""
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs):
        body(**dict(zip(names, refs, strict=True)), **settings)

    results = pl.pallas_call(
        kernel, grid=grid, name=name, interpret=interpret,
        in_specs=[spec for _, spec in inputs.values()], out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()], scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(*(array for array, _ in inputs.values()))  # fmt: skip
    return dict(zip(outputs, results, strict=True))


class _Layout:
    """Arrays as the kernels take them: tokens padded to whole chunks, heads along lanes in groups of n."""

    def __init__(self, q, v, heads: int, chunk: int | None, *, reverse: bool = False):
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.n, self.dtype = v.shape[-1], heads, q.dtype
        self.C = chunk or CHUNK
        self.chunks = -(-self.T // self.C)
        self.grid = (self.B, self.H // heads, self.chunks)
        self.at = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)

    def tokens(self, x):
        """[B, T, H, X] and a block of one chunk and n heads."""
        x = self.padded(x).reshape(self.B, -1, self.H * x.shape[-1])
        return x, self.token_spec(x.shape[-1] // self.H)

    def token_spec(self, width: int):
        return pl.BlockSpec((1, self.C, self.n * width), lambda b, g, t: (b, self.at(t), g))

    def padded(self, x):
        return jnp.pad(x, ((0, 0), (0, self.chunks * self.C - self.T), *[(0, 0)] * (x.ndim - 2)))

    def rows(self, x):
        """[B, T', H]: a row [1, C] of every head. Columns would fill a lane of 128."""
        return x.reshape(self.B, self.chunks, self.C, -1, self.n).transpose(0, 3, 1, 4, 2), self.row_spec()

    def row_spec(self):
        return pl.BlockSpec((1, 1, 1, self.n, self.C), lambda b, g, t: (b, g, self.at(t), 0, 0))

    def shared_row(self, x):
        """[B, N, 1, C]: one row [1, C] for all heads."""
        return x, pl.BlockSpec((1, 1, 1, self.C), lambda b, g, t: (b, self.at(t), 0, 0))

    def states(self, x):
        """[B, H, V, K], the same block in every chunk."""
        return x, pl.BlockSpec((1, self.n, self.V, self.K), lambda b, g, t: (b, g, 0, 0))

    def states_of_chunks(self, x):
        """[B, N, H, V, K]."""
        return x, pl.BlockSpec((1, 1, self.n, self.V, self.K), lambda b, g, t: (b, self.at(t), g, 0, 0))

    def scratch(self, vector: bool, *, backward: bool) -> dict:
        """The states, and where the tree of a vector decay keeps its sums."""
        memory = {"carry": pltpu.VMEM((self.n, self.V, self.K), jnp.float32)}
        if vector:
            levels = self.C.bit_length() - 1
            tokens = (self.n, levels, self.C, self.K)
            memory |= {
                "sums": pltpu.VMEM((self.n, levels - 2, 2, self.C, self.K), jnp.float32), "z": pltpu.VMEM(tokens, self.dtype),
                "table": pltpu.VMEM((self.n * self.C, self.C), jnp.float32),
            }  # fmt: skip
        if vector and backward:
            memory |= {
                "factor": pltpu.VMEM(tokens, jnp.float32), "d_qk": pltpu.VMEM((self.n, 2, self.C, self.K), jnp.float32),
                "d_table": pltpu.VMEM((self.n, self.C, self.C), jnp.float32),
            }  # fmt: skip
        return memory

    def unpadded(self, x):
        return x[:, : self.T].reshape(self.B, self.T, self.H, -1)


def _prepared(layout: _Layout, q, k, v, log_decay, reset) -> dict:
    """The inputs that forward and backward have in common."""
    inputs = {"q": layout.tokens(q), "k": layout.tokens(k), "v": layout.tokens(v)}
    if log_decay is not None:
        g = layout.padded(log_decay)
        if g.shape[-1] == 1:
            g = jnp.maximum(g, FLOOR)
            if reset is not None:
                # What a reset drops needs no decay, and sums over it stay small.
                g = jnp.where(layout.padded(reset)[..., None, None], 0.0, g)
            sums = jnp.cumsum(g.reshape(layout.B, layout.chunks, layout.C, layout.H), axis=2).reshape(g.shape[:3])
            inputs["b"] = layout.rows(sums)
        else:
            inputs["g"] = layout.tokens(g)
    if reset is not None:
        in_chunks = layout.padded(reset).reshape(layout.B, layout.chunks, layout.C)
        starts = lax.cummax(jnp.where(in_chunks, jnp.arange(layout.C), -1), axis=2)
        inputs["start"] = layout.shared_row(starts[:, :, None].astype(jnp.float32))
    return inputs


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
    layout = _Layout(q, v, _heads(q.shape[2], q.shape[3], v.shape[3], 1 if vector else 2), chunk)
    shape = jax.ShapeDtypeStruct
    entering = jnp.swapaxes(state, -1, -2)
    outputs = {
        "o": (shape((layout.B, layout.chunks * layout.C, layout.H * layout.V), v.dtype), layout.token_spec(layout.V)),
        "final": layout.states(shape(entering.shape, jnp.float32)),
    }
    if save:
        saved = shape((layout.B, layout.chunks, *entering.shape[1:]), q.dtype)
        outputs["saved"] = layout.states_of_chunks(saved)
    results = _call(
        _forward_step, "linear_attention_forward", layout.grid,
        _prepared(layout, q, k, v, log_decay, reset) | {"state": layout.states(entering)}, outputs,
        layout.scratch(vector, backward=False), interpret,
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
    layout = _Layout(q, v, _heads(q.shape[2], q.shape[3], v.shape[3], 1 if kind == "vector" else 2), chunk, reverse=True)
    shape, padded = jax.ShapeDtypeStruct, layout.chunks * layout.C
    entering, final_state = saved
    d_leaving = jnp.swapaxes(d_final, -1, -2)
    inputs = _prepared(layout, q, k, v, log_decay, reset) | {
        "do": layout.tokens(do), "entering": layout.states_of_chunks(entering), "d_final": layout.states(d_leaving),
    }  # fmt: skip

    def like(x):
        return shape((layout.B, padded, layout.H * x.shape[-1]), x.dtype), layout.token_spec(x.shape[-1])

    outputs = {"dq": like(q), "dk": like(k), "dv": like(v), "d_state": layout.states(shape(d_leaving.shape, jnp.float32))}
    scratch = layout.scratch(kind == "vector", backward=True)
    if kind != "none":
        common = jnp.sum(final_state * d_final, axis=-1).reshape(layout.B, -1, layout.n, layout.K)
        inputs["common"] = common, pl.BlockSpec((1, 1, layout.n, layout.K), lambda b, g, t: (b, g, 0, 0))
        scratch["left"] = pltpu.VMEM((layout.n, layout.K), jnp.float32)
    if kind == "vector":
        outputs["dg"] = like(log_decay)
    elif kind == "scalar":
        rows = (layout.B, layout.H // layout.n, layout.chunks, layout.n, layout.C)
        outputs["flow"] = shape(rows, jnp.float32), layout.row_spec()
    results = _call(
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


def _forward_step(q, k, v, state, o, final, carry, saved=None, *, scale, n, **rest):
    """One chunk of n heads."""
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        carry[...] = state[0]

    masks = _Masks(q.shape[1], rest.get("start"))
    for head in range(n):
        qh, kh, vh = (_head(x, head, n) for x in (q, k, v))
        h = carry[head]
        if saved is not None:
            saved[0, 0, head] = h.astype(saved.dtype)
        weigh = _decay(rest, head, n, q, k, rest, masks)
        scores = weigh.scores(qh, kh)
        inner = _dot(scores.astype(vh.dtype), vh, NN)
        outer = weigh.read(qh, h.astype(qh.dtype))
        o[0, :, pl.ds(head * vh.shape[-1], vh.shape[-1])] = (scale * (inner + outer)).astype(o.dtype)
        carry[head] = _times(weigh.total, h) + _dot(vh, _scaled(kh, weigh.after), TN)

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

    masks = _Masks(q.shape[1], rest.get("start"))
    for head in range(n):
        qh, kh, vh, doh = (_head(x, head, n) for x in (q, k, v, do))
        h, dh = entering[0, 0, head], carry[head]
        dtype, keys, values = qh.dtype, qh.shape[-1], vh.shape[-1]
        dh_low = dh.astype(dtype)
        weigh = _decay(rest, head, n, q, k, rest, masks)
        scores, dqh, dkh = weigh.pullback(scale, qh, kh, vh, doh)
        dqh = dqh + scale * _times(weigh.before, _dot(doh, h, NN))
        dkh = dkh + _times(weigh.after, _dot(vh, dh_low, NN))
        dvh = _dot(_scaled(kh, weigh.after), dh_low, NT) + _dot(scores, doh, TN)
        dh = _times(weigh.total, dh) + _dot(doh, _scaled(qh, _times(weigh.before, jnp.float32(scale))), TN)
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
                is_last = _iota(row.shape, 1) == row.shape[1] - 1
                flow[0, 0, 0, head : head + 1] = jnp.where(is_last, row + jnp.sum(before_it), row)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state[0] = carry[...]


def _head(ref, head: int, n: int):
    width = ref.shape[-1] // n
    return ref[0, :, pl.ds(head * width, width)]


class _Masks:
    """Which tokens of a chunk see which, for all heads alike. A token's `start` is the index of the newest reset up to it, -1
    before any: equal for tokens of one document."""

    def __init__(self, size: int, start=None):
        self.size = size
        i, j = _iota((size, size), 0), _iota((size, size), 1)
        self.causal = self.seen = i >= j
        self.apart = i ^ j
        self.together = self.first = self.last = None
        if start is not None:
            row = start[0, 0]
            column = row.T
            self.together = column == row
            self.seen = self.causal & self.together
            self.first = column < 0  # tokens that read the entering state [C, 1]
            self.last = column == column[size - 1 :]  # tokens that write the leaving one

    def at_level(self, s: int):
        """Pairs that part at a block of 2s tokens."""
        return (self.apart >= s) & (self.apart < 2 * s) & self.causal

    def with_resets(self, before, after, total):
        """Products of decays up to each token, after it, and over the chunk, which a reset makes zero."""
        if self.first is None:
            return before, after, total
        one = jnp.float32(1)
        before, after, total = (one if x is None else x for x in (before, after, total))
        return (
            jnp.where(self.first, before, 0),
            jnp.where(self.last, after, 0),
            jnp.where(self.first[self.size - 1 :], total, 0),
        )


class _Shared:
    """One decay for all channels of K, or none."""

    def __init__(self, refs: dict, head: int, masks: _Masks):
        self.masks = masks
        self.weights = self.before = self.after = self.total = None
        if "b" in refs:
            row = refs["b"][0, 0, 0, head : head + 1]
            column = row.T
            last = column[masks.size - 1 :]
            self.weights = jnp.exp(jnp.where(masks.seen, column - row, -jnp.inf))
            self.before, self.after, self.total = jnp.exp(column), jnp.exp(last - column), jnp.exp(last)
        self.before, self.after, self.total = masks.with_resets(self.before, self.after, self.total)

    def scores(self, q, k):
        """P without its scale."""
        scores = _dot(q, k, NT)
        return jnp.where(self.masks.seen, scores, 0) if self.weights is None else scores * self.weights

    def read(self, q, h):
        """What the entering state [V, K] says to q, without the scale."""
        return _times(self.before, _dot(q, h, NT))

    def pullback(self, scale, q, k, v, do):
        """P, and what its cotangent do v^T gives q and k."""
        weights = jnp.where(self.masks.seen, jnp.float32(scale), 0) if self.weights is None else scale * self.weights
        scores, d_scores = (_dot(q, k, NT) * weights).astype(q.dtype), (_dot(do, v, NT) * weights).astype(q.dtype)
        return scores, _dot(d_scores, k, NN), _dot(d_scores, q, TN)


class _Channels:
    """A decay for every channel of K; `scores` or `pullback` goes before the rest, which needs the sums it leaves.

    A level of the tree is one array z [C, K]: the queries of right halves and the keys of left halves, scaled by the factors
    of their halves. z z^T has the level's scores where i lies right and j left, and the matrix of d_scores and its transpose
    times z has the gradients of both.

    What passes from one step to the next does so through memory (`scratch`), in pieces of a few rows: registers hold a
    piece at a time.
    """

    NEAR = (1, 2, 4)  # levels within 8 tokens, a tile of registers

    def __init__(self, refs: dict, head: int, n: int, q, k, scratch: dict, masks: _Masks):
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
        row = _iota((2, 8, width), 1)
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
        near = jnp.where(self.masks.apart == 0, _dot(q, k, NT), 0)
        for slot, s in enumerate(self.NEAR):
            near = jnp.where(self.masks.at_level(s), _dot(self.z[slot], self.z[slot], NT), near)
        self.table[...] = near

    def _far_scores(self, s: int, slot: int):
        """Scores of the pairs that part at blocks of 2s tokens."""
        rights = [slice(start + s, start + 2 * s) for start in range(0, self.size, 2 * s)]
        parts = _dot(_joined([self.z[slot, right] for right in rights]), self.z[slot], NT)
        lane = _iota((s, self.size), 1)
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
        return _dot(_scaled(q, self.before), h, NT)

    def pullback(self, scale, q, k, v, do):
        # What meets z: the cotangent of a pair's score, for its query and for its key.
        both = jnp.where(self.masks.causal, _dot(do, v, NT), _dot(v, do, NT))
        if self.masks.together is not None:
            both = jnp.where(self.masks.together, both, 0)
        self.d_table[...] = scale * both
        self._near()
        self._near_scores(q, k)
        own = jnp.where(self.masks.apart == 0, self.d_table[...], 0).astype(q.dtype)
        dq, dk = _dot(own, k, NN), _dot(own, q, NN)
        row = _iota(dq.shape, 0)
        for slot, s in enumerate(self.NEAR):
            both = self._d_level(self.d_table[...], self.masks.apart, s)
            d_mixed = self.factor[slot] * _dot(both, self.z[slot], NN)
            right = row // s % 2 == 1
            dq, dk = jnp.where(right, dq + d_mixed, dq), jnp.where(right, dk, dk + d_mixed)
        self.d_qk[0], self.d_qk[1] = dq, dk
        for s, slot in self._far():
            self._far_scores(s, slot)
            for start in range(0, self.size, 2 * s):
                block = pl.ds(start, 2 * s)
                both = self._d_level(self.d_table[block], self.masks.apart[start : start + 2 * s], s)
                d_mixed = self.factor[slot, block] * _dot(both, self.z[slot], NN)
                self.d_qk[1, pl.ds(start, s)] += d_mixed[:s]
                self.d_qk[0, pl.ds(start + s, s)] += d_mixed[s:]
        return self._seen(scale * self.table[...]).astype(q.dtype), self.d_qk[0], self.d_qk[1]

    def _d_level(self, both, apart, s: int):
        return jnp.where((apart >= s) & (apart < 2 * s), both, 0).astype(self.z.dtype)


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _decay(refs: dict, head: int, n: int, q, k, scratch: dict, masks: _Masks) -> _Shared | _Channels:
    return _Channels(refs, head, n, q, k, scratch, masks) if "g" in refs else _Shared(refs, head, masks)


def _times(factor, x):
    return x if factor is None else factor * x


def _scaled(x, factor):
    """In the dtype of x, which a matrix product is to take."""
    return x if factor is None else (x * factor).astype(x.dtype)


def _from_row(x, s: int, row: int):
    """In tiles [N, 8, K], every row's block of 2s rows filled with the block's row of that number."""
    parts = [x[:, at : at + 1] for at in range(row, 8, 2 * s)]
    width = 2 * s
    return jnp.concatenate([jnp.broadcast_to(part, (x.shape[0], width, x.shape[2])) for part in parts], axis=1)


def _sum_from(x):
    """Sums over the rows of x [C, K] from each on."""
    size, width = x.shape
    row = _iota((8, width), 0)[None]
    tiles = x.reshape(size // 8, 8, width)
    for s in (1, 2, 4):
        # Every left half gets the sum of its right half, which stands in that half's first row.
        tiles = jnp.where(row // s % 2 == 0, tiles + _from_row(tiles, s, s), tiles)
    rest, parts = jnp.zeros((1, width), x.dtype), []
    for tile in reversed(range(size // 8)):
        parts.append(tiles[tile] + rest)
        rest = parts[-1][:1]
    return jnp.concatenate(parts[::-1])
