"""The chunked delta rule on TPUs: S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = scale q_t S_t.

Without decay (DeltaNet), with one of every head (Gated DeltaNet) or of every channel of K (Kimi Delta Attention). The grid is
(batch, groups of heads, chunks of C tokens), the last walked in order with the states h of a group in VMEM, transposed. With
the products of decays up to a token, after it, over the chunk, and between tokens i and j (E_ij, i >= j):

    A_ij = beta_i sum_c E_ijc k_ic k_jc for i > j,   T = (I + A)^-1,
    u = v - (before * k) h,   written = T (beta * u),
    o = scale ((before * q) h + P written),   h <- total h + (after * k)^T written,   P_ij = sum_c E_ijc q_ic k_jc.

Decays of channels: P and A come from the binary tree of `pallas_kernels.tpu_channels`, whose factors serve both.

Blocks of 8 tokens on the diagonal of A, side by side in one register, are inverted row by row. From there the inverse doubles
its blocks: with X the inverse of the blocks of s tokens and A_s the part of A that joins two of them, X - X A_s X is that of
the blocks of 2s. Two matrix products depend on one another at each of log2(C / 8) levels, so several heads go through every
stage side by side, which hides their latency.

Where keys are similar, what tokens write alternates in sign and outputs are small sums of large numbers. So in bfloat16 A_s, X
and the T of `written`, and in the forward P and `written`, enter products as sums of two bfloat16 numbers.

Backward: the same grid in reverse with the cotangents of the states in VMEM. A step makes A, T and `written` again from the
entering state and then, from d_written = P^T do + (after * k) dh and d_u = T^T d_written,

    dA = -d_u written^T,  dv = beta d_u,  and what A, P, u, o and h give q, k, beta and h.

dg is the reverse sum over the chunk of q dq + k dk_read - k dk_write (keys read as queries do, in A and u, and are written;
summed over channels for one decay of a head), plus what the leaving state and its cotangent have in common. These sums cancel
but for pairs with the decay between them, so what meets the state enters as the product that the gradients are made of, with
its roundings.

Per token and head, K = V = C = 128, bf16: forward 6 K V + C (6 K + 4 V) + 2 / 3 C^2 for an inverse that does no work twice =
273k FLOPs on 1,032 bytes; the inverse as it is made takes 22 C^2, numbers of
two parts elsewhere 6 C V + 2 K V more.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import (
    LANES,
    NN,
    NT,
    TILE,
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


def forward(scale, q, k, v, beta, log_decay, reset, state, *, save: bool, chunk: int | None = None, interpret=False):
    """Outputs, final state and what `backward` needs.

    Args:
      scale: multiplies q.
      q, k: [B, T, H, K]; v: [B, T, H, V], bfloat16 or float32.
      beta: [B, T, H, 1], float32.
      log_decay: None, [B, T, H, 1] or [B, T, H, K], float32, <= 0.
      reset: None or bool [B, T]: the state that such a token would continue is dropped.
      state: [B, H, K, V] float32, enters token 0.
      save: also return the states that enter the chunks.
      chunk: C, a power of two from 16 on; None for what suits the matrix units and the memory.
      interpret: as for `pl.pallas_call`.

    Returns:
      o [B, T, H, V] in v's dtype; the final state, float32; the states that enter the chunks [B, N, H', V, K] in q's dtype, or
      None: H', as heads of 64 channels may need one more to fill the lanes.
    """
    vector = log_decay is not None and log_decay.shape[-1] > 1
    layout = Layout(q, v, _heads(q, v, vector=vector, backward=False), chunk or _chunk(q, vector))
    shape = jax.ShapeDtypeStruct
    entering = layout.transposed(state)
    outputs = {
        "o": (shape((layout.B, layout.chunks * layout.C, layout.H * layout.V), v.dtype), layout.token_spec(layout.V)),
        "final": layout.states(shape(entering.shape, jnp.float32)),
    }
    if save:
        outputs["saved"] = layout.states_of_chunks(shape((layout.B, layout.chunks, *entering.shape[1:]), q.dtype))
    inputs = prepared(layout, q, k, v, log_decay, reset)
    inputs |= {"beta": layout.rows(layout.padded(beta)[..., 0]), "state": layout.states(entering)}
    results = call(
        _forward_step, "delta_rule_forward", layout.grid, inputs, outputs,
        _scratch(layout, vector=vector, backward=False), interpret, scale=scale, n=layout.n,
    )  # fmt: skip
    return layout.unpadded(results["o"]), layout.state_of(results["final"]), results.get("saved")


def backward(scale, q, k, v, beta, log_decay, reset, saved, do, d_final, *, chunk: int | None = None, interpret=False):
    """Gradients from the cotangents of o and of the final state.

    Args:
      scale, q, k, v, beta, log_decay, reset: as given to `forward`.
      saved: as it returned it.
      do: [B, T, H, V]; d_final: [B, H, K, V] float32.

    Returns:
      dq, dk, dv in the dtypes of q, k, v; dbeta, float32; dlog_decay, float32 or None; the gradient of the initial state,
      float32.
    """
    vector = log_decay is not None and log_decay.shape[-1] > 1
    layout = Layout(q, v, _heads(q, v, vector=vector, backward=True), chunk or _chunk(q, vector), reverse=True)
    shape, padded = jax.ShapeDtypeStruct, layout.chunks * layout.C
    d_leaving = layout.transposed(d_final)
    inputs = prepared(layout, q, k, v, log_decay, reset) | {
        "beta": layout.rows(layout.padded(beta)[..., 0]), "do": layout.tokens(do),
        "entering": layout.states_of_chunks(saved), "d_final": layout.states(d_leaving),
    }  # fmt: skip

    def like(x):
        return shape((layout.B, padded, layout.H * x.shape[-1]), x.dtype), layout.token_spec(x.shape[-1])

    rows = shape((layout.B, layout.H // layout.n, layout.chunks, layout.n, layout.C), jnp.float32), layout.row_spec()
    outputs = {"dq": like(q), "dk": like(k), "dv": like(v), "dbeta": rows}
    outputs["d_state"] = layout.states(shape(d_leaving.shape, jnp.float32))
    scratch = _scratch(layout, vector=vector, backward=True)
    if vector:
        outputs["dg"] = like(log_decay)
    elif log_decay is not None:
        outputs["flow"] = rows
    results = call(
        _backward_step, "delta_rule_backward", layout.grid, inputs, outputs, scratch, interpret, scale=scale, n=layout.n
    )  # fmt: skip

    def of_rows(x):
        return layout.unpadded(x.transpose(0, 2, 4, 1, 3).reshape(layout.B, padded, layout.H))

    dq, dk, dv = (layout.unpadded(results[name]) for name in ("dq", "dk", "dv"))
    dg = None
    if vector:
        dg = layout.unpadded(results["dg"])
    elif log_decay is not None:
        dg = of_rows(lax.cumsum(results["flow"], axis=4, reverse=True))
    return dq, dk, dv, of_rows(results["dbeta"]), dg, layout.state_of(results["d_state"])


def _chunk(q, vector: bool) -> int:
    """Tokens a chunk: with decays of channels 256 of them in float32 leave memory for half."""
    return CHUNK // 2 if vector and q.shape[-1] * q.dtype.itemsize > 512 else CHUNK


def _heads(q, v, *, vector: bool, backward: bool) -> int:
    """How many go side by side: four of 128 channels in bfloat16, and as many of others as fit the memory of v4."""
    K, V = q.shape[3], v.shape[3]
    if vector and backward:
        most = 4 if max(K, V, LANES) * q.dtype.itemsize <= 256 else 1
    else:
        most = max(1, min(4, 4 * 512 // ((K + V) * q.dtype.itemsize)))
    return heads_a_step(q, v, most, vector=vector)


def _scratch(layout: Layout, *, vector: bool, backward: bool) -> dict:
    """The states, and what decays of channels need."""
    channels = Channels.scratch(layout, keys=True, backward=backward) if vector else {}
    return channels | {"carry": pltpu.VMEM((layout.n, layout.V, layout.K), jnp.float32)}


class _Chunk:
    """What forward and backward make of one head's tokens and the state that enters, up to the inverse and from it."""

    def __init__(self, refs, head: int, n: int, h, masks: Masks):
        self.q, self.k, self.v = (head_of(refs[name], head, n) for name in ("q", "k", "v"))
        self.beta = refs["beta"][0, 0, 0, head : head + 1].T
        self.h = h.astype(self.q.dtype)
        self.decay = (_Channels if "g" in refs else _Shared)(refs, head, n, masks, self)
        self.A = self.beta * self.decay.key_scores

    def write(self, inverse):
        """What the tokens write into the state."""
        self.T = inverse.astype(self.q.dtype)
        self.u = self.v - self.decay.key_read
        self.written = _product(_parts(inverse, self.T.dtype), [(self.beta * self.u).astype(self.T.dtype)])
        self.written_low = self.written.astype(self.T.dtype)


class _Cotangents:
    """What the backward makes of one head's tokens, in stages that all heads go through side by side. The cotangent of x is
    called x here: o, h, written, u, v, A, and what of those of queries and keys comes from within the chunk."""

    def __init__(self, scale, chunk: _Chunk, do, dh):
        self.scale, self.chunk, self.o, self.h = scale, chunk, do, dh
        decay, dtype = chunk.decay, chunk.q.dtype
        self.h_low = dh.astype(dtype)
        # What meets states, as products take it: dg is a difference of sums that cancel, so both have the same roundings.
        self.q_reads, self.k_reads, self.k_writes = decay.at_states(scale, chunk)
        scores = (scale * decay.query_scores).astype(dtype)
        self.written = dot(scores, do, TN) + dot(self.k_writes, self.h_low, NT)

    def pull_through_inverse(self):
        chunk = self.chunk
        self.u = dot(chunk.T, self.written.astype(chunk.T.dtype), TN)
        self.v = chunk.beta * self.u
        self.u_low, self.v_low = (x.astype(chunk.T.dtype) for x in (self.u, self.v))

    def pull_through_scores(self):
        chunk = self.chunk
        self.A = -dot(self.u_low, chunk.written_low, NT)
        self.q_within, self.k_written, self.k_within = chunk.decay.pullback(self.scale, chunk, self.o, self.A, self.v_low)
        self.from_state = dot(jnp.concatenate([self.o, self.v_low]), chunk.h, NN)
        self.to_state = dot(chunk.written_low, self.h_low, NN)


class _Shared(Shared):
    """One decay for all channels of K, or none: scores of queries and keys with keys, what both read from the entering state,
    and the gradients of the scores."""

    def __init__(self, refs, head: int, n: int, masks: Masks, chunk: _Chunk):
        super().__init__(refs, head, masks)
        weights = self.weights
        self.seen = jnp.where(masks.seen, jnp.float32(1), 0) if weights is None else weights
        self.strict = jnp.where(masks.apart == 0, 0, self.seen)
        # Queries and keys meet the keys and the state together.
        both = jnp.concatenate([chunk.q, chunk.k])
        scores, reads = dot(both, chunk.k, NT), dot(both, chunk.h, NT)
        self.unweighted, self.key_scores = scores[: masks.size], scores[masks.size :] * self.strict
        self.query_read, self.key_read = (times(self.before, x) for x in (reads[: masks.size], reads[masks.size :]))

    @property
    def query_scores(self):
        return self.unweighted * self.seen

    def at_states(self, scale, chunk: _Chunk):
        """Queries and keys as they read the entering state, keys as they are written into the leaving one."""
        q = scaled(chunk.q, times(self.before, jnp.float32(scale)))
        return q, scaled(chunk.k, self.before), scaled(chunk.k, self.after)

    def write(self, k, written):
        """What leaves with the state."""
        return _product(_parts(times(self.after, written), k.dtype), [k], TN)

    def pullback(self, scale, chunk: _Chunk, do, d_A, dv):
        """What the cotangents do written^T and beta d_A give queries, keys as what is written, and keys as what reads."""
        size, dtype = self.masks.size, chunk.q.dtype
        d_keys = (chunk.beta * d_A * self.strict).astype(dtype)
        d_scores = (scale * dot(do, chunk.written_low, NT) * self.seen).astype(dtype)
        within = dot(jnp.concatenate([d_scores, d_keys]), chunk.k, NN)
        return within[:size], dot(d_keys, chunk.k, TN) + dot(d_scores, chunk.q, TN), within[size:]


class _Channels(Channels):
    """The same for a decay of every channel."""

    def __init__(self, refs, head: int, n: int, masks: Masks, chunk: _Chunk):
        super().__init__(refs, head, n, masks)
        self.query_scores, self.key_scores = self.scores()
        reads = dot(jnp.concatenate([self.q_reading, self.k_reading]).astype(chunk.q.dtype), chunk.h, NT)
        self.query_read, self.key_read = reads[: masks.size], reads[masks.size :]

    def at_states(self, scale, chunk: _Chunk):
        return tuple(x.astype(chunk.q.dtype) for x in (scale * self.q_reading, self.k_reading, self.k_written))

    def write(self, k, written):
        return _product(_parts(written, k.dtype), [self.k_written.astype(k.dtype)], TN)

    def pullback(self, scale, chunk: _Chunk, do, d_A, dv):
        written, causal = chunk.written_low, self.masks.causal
        d_scores = scale * jnp.where(causal, dot(do, written, NT), dot(written, do, NT))
        return self.gradients(d_scores, -jnp.where(causal, dot(dv, written, NT), dot(written, dv, NT)))


def _parts(x, dtype):
    """Numbers of the dtype whose sum stands for float32 x in products: two of bfloat16."""
    high = x.astype(dtype)
    return (high,) if dtype == jnp.float32 else (high, (x - high).astype(dtype))


def _product(x, y, contract=NN):
    """x y, given by their `_parts`: the sum of the products of these, but for that of both small ones."""
    pairs = [(x[0], part) for part in y] + [(part, y[0]) for part in x[1:]]
    return reduce(add, (dot(x, y, contract) for x, y in pairs))


def _inverses(lower: list, masks: Masks, dtype) -> list:
    """(I + A)^-1 of strictly lower triangular matrices, side by side."""
    found, s = _inverses_of_tiles(lower, masks, dtype), TILE
    while s < masks.size:
        found = _doubled(lower, found, s, masks, dtype)
        s *= 2
    return found


def _inverses_of_tiles(lower: list, masks: Masks, dtype) -> list:
    """Those of the blocks of a tile's rows on the diagonals.

    All blocks of a matrix stand side by side in one tile [8, C]. There every row of the inverse, once it is found, is taken
    from the rows below it, times their entries of A.
    """
    size, rows = masks.size, TILE - 1
    on_diagonal = masks.apart < TILE
    packed = [jnp.sum(jnp.where(on_diagonal, A, 0).reshape(-1, TILE, size), axis=0) for A in lower]
    row, place = iota((TILE, size), 0), iota((TILE, size), 1) % TILE
    # Each column of a block on all lanes of the block: products with ones, for every head and row at once.
    columns = jnp.concatenate([jnp.where(place == r, tile, 0) for tile in packed for r in range(rows)])
    ones = jnp.where(on_diagonal, jnp.float32(1), 0).astype(dtype)
    columns = _product(_parts(columns, dtype), [ones]).reshape(-1, rows, TILE, size)
    found = []
    for head in range(len(lower)):
        X = jnp.where(row == place, jnp.float32(1), 0)
        for r in range(rows):
            X = X - columns[head, r] * X[r : r + 1]
        found.append(jnp.where(on_diagonal, jnp.concatenate([X] * (size // TILE)), 0))
    return found


def _doubled(lower: list, found: list, s: int, masks: Masks, dtype) -> list:
    """Blocks of s to blocks of 2s, of which the rows of right halves change."""
    size = masks.size
    rights = [slice(start + s, start + 2 * s) for start in range(0, size, 2 * s)]

    def of_rights(x):
        return jnp.concatenate([x[right] for right in rights]) if len(rights) > 1 else x[rights[0]]

    level = of_rights(jnp.where(masks.at_level(s), 1, 0)) != 0
    halves = [
        _product(_parts(jnp.where(level, of_rights(A), 0), dtype), _parts(X, dtype)) for A, X in zip(lower, found, strict=True)
    ]
    zeros = jnp.zeros((s, size), jnp.float32)

    def spread(x):
        parts = []
        for m in range(len(rights)):
            parts += [zeros, x[m * s : (m + 1) * s]]
        return jnp.concatenate(parts)

    # Of X alone both parts: rounding it would double the inverse's errors.
    changes = [_product(_parts(of_rights(X), dtype), [spread(Y).astype(dtype)]) for X, Y in zip(found, halves, strict=True)]
    return [X - spread(change) for X, change in zip(found, changes, strict=True)]


def _forward_step(o, final, carry, state, *, scale, n, saved=None, **refs):
    """One chunk of n heads."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = state[0]

    masks = Masks(refs["q"].shape[1], refs.get("start"))
    chunks = [_Chunk(refs, head, n, carry[head], masks) for head in range(n)]
    if saved is not None:
        for head, chunk in enumerate(chunks):
            saved[0, 0, head] = chunk.h.astype(saved.dtype)
    dtype = chunks[0].q.dtype
    for chunk, inverse in zip(chunks, _inverses([chunk.A for chunk in chunks], masks, dtype), strict=True):
        chunk.write(inverse)
    for head, chunk in enumerate(chunks):
        width = chunk.v.shape[-1]
        inner = _product(_parts(chunk.decay.query_scores, dtype), _parts(chunk.written, dtype))
        o[0, :, pl.ds(head * width, width)] = (scale * (inner + chunk.decay.query_read)).astype(o.dtype)
        carry[head] = times(chunk.decay.total, carry[head]) + chunk.decay.write(chunk.k, chunk.written)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[0] = carry[...]


def _backward_step(do, entering, d_final, dq, dk, dv, dbeta, d_state, carry, *, scale, n, flow=None, dg=None, **refs):
    """One chunk of n heads; the last chunk comes first."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        carry[...] = d_final[0]

    masks = Masks(refs["q"].shape[1], refs.get("start"))
    chunks = [_Chunk(refs, head, n, entering[0, 0, head], masks) for head in range(n)]
    dtype = chunks[0].q.dtype
    for c, inverse in zip(chunks, _inverses([c.A for c in chunks], masks, dtype), strict=True):
        c.write(inverse)
    cotangents = [_Cotangents(scale, c, head_of(do, head, n), carry[head]) for head, c in enumerate(chunks)]
    for one in cotangents:
        one.pull_through_inverse()
    for one in cotangents:
        one.pull_through_scores()
    for head, (c, d) in enumerate(zip(chunks, cotangents, strict=True)):
        before, after, total = c.decay.before, c.decay.after, c.decay.total
        size, keys, values = *c.k.shape, c.v.shape[-1]
        dqh = d.q_within + scale * times(before, d.from_state[:size])
        dkh = d.k_within - times(before, d.from_state[size:]) + d.k_written + times(after, d.to_state)
        reads = jnp.concatenate([d.q_reads, d.k_reads])
        carry[head] = times(total, d.h) + dot(jnp.concatenate([d.o, -d.v_low]), reads, TN)
        dq[0, :, pl.ds(head * keys, keys)] = dqh.astype(dq.dtype)
        dk[0, :, pl.ds(head * keys, keys)] = dkh.astype(dk.dtype)
        dv[0, :, pl.ds(head * values, values)] = d.v.astype(dv.dtype)
        d_beta = jnp.sum(d.A * c.decay.key_scores, axis=1, keepdims=True) + jnp.sum(d.u * c.u, axis=1, keepdims=True)
        dbeta[0, 0, 0, head : head + 1] = d_beta.T
        if flow is not None or dg is not None:
            written = d.k_writes * d.to_state
            flowed = c.q * d.q_within + c.k * (d.k_within - d.k_written)
            flowed += d.q_reads * d.from_state[:size] - d.k_reads * d.from_state[size:] - written
            # All tokens' decays are in what remains of the entering state; a write misses those up to its own token.
            leaving = times(total, c.h * d.h)
            if dg is not None:
                leaving = jnp.sum(leaving, axis=0, keepdims=True) + jnp.sum(written, axis=0, keepdims=True)
                dg[0, :, pl.ds(head * keys, keys)] = sums_from(flowed) + leaving
            else:
                row = jnp.sum(flowed, axis=1, keepdims=True).T
                is_last = iota(row.shape, 1) == row.shape[1] - 1
                flow[0, 0, 0, head : head + 1] = jnp.where(is_last, row + (jnp.sum(leaving) + jnp.sum(written)), row)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_state[0] = carry[...]
