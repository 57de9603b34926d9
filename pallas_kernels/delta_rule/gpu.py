"""The chunked delta rule on Hopper GPUs (Mosaic GPU): S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'),
o_t = scale q_t S_t.

Without decay or with one of every head, in chunks of 64 tokens. With S_ij = E_ij (k_i k_j^T) for i > j, E_ij the product of the
decays between two tokens, and the state h that enters a chunk, its tokens leave unsaid

    r = R (v - before * (k h)),   R = (I + S beta)^-1,

of which beta r is written: o = scale (before * (q h) + P beta r), h <- total h + (after * k)^T beta r, P_ij = E_ij (q_i k_j^T).
The cotangent of what is written is

    mu = T^T (P^T do + (after * k) dh),   T = (I + beta S)^-1,

and then dv = beta mu, dbeta = sum_v mu r. Four kernels:

- inverses: every chunk on its own, R and for training T. The inverse doubles its blocks: with X that of the blocks of s tokens
  and A_s the part of A that joins two of them, X - X A_s X is that of the blocks of 2s. Left factors are sums of two bfloat16
  numbers.
- forward: a warpgroup walks a head's chunks in order with 64 value channels of the state, transposed, in registers; so are u, r
  and what is written, which enter the next product from there. For training it also writes h and r of every chunk.
- backward, states: the same walk in reverse with the cotangent of the state, for mu and dh of every chunk.
- backward: every chunk and 64 of its key channels on its own, for dq, dk, dv, dbeta and the flow of the decays.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import (
    COLS,
    F32,
    ROWS,
    WGMMA,
    C,
    Call,
    by_column,
    by_row,
    decay_rows,
    declines,
    iota,
    load,
    padded,
    product_after,
    product_before,
    product_total,
    swizzled,
    times,
    value_blocks,
    walk_chunks,
    weights_between,
)
from pallas_kernels.gpu_channels import LEVELS, Levels, channels_of

__all__ = ["SAVED_AXES", "backward", "declines", "forward"]

# The logical axes of what `forward` saves.
SAVED_AXES = (("batch", None, "heads", None, None),) * 3


class _Inverse:
    """R = (I + S beta)^-1 of a chunk in a warpgroup's memory, from S [C, C] in registers.

    Args:
      memories: five tiles [C, C] of the dtype of R.
    """

    def __init__(self, call, scores, beta_rows_s, beta_columns_s, memories):
        self.call, self.scores, self.beta_rows_s = call, scores, beta_rows_s
        self.x_s, self.x_low_s, self.a_s, a_low_s, self.y_s = memories
        i, j = iota((C, C), 0), iota((C, C), 1)
        apart = i ^ j
        A = scores * by_column(load(beta_columns_s, COLS), (C, C))
        self._put(A, self.a_s, a_low_s)
        inverse = jnp.where(i == j, 1.0, jnp.where((apart == 1) & (i > j), -A, 0.0))
        size = 2
        while size < C:
            self._put(inverse, self.x_s, self.x_low_s)
            plgpu.commit_smem()
            half = call.dot((self.a_s, self.x_s), (a_low_s, self.x_s))
            # X holds blocks of `size` tokens alone, so masking A's product with it masks A.
            half = jnp.where((apart >= size) & (apart < 2 * size) & (i > j), half, 0.0)
            self.y_s[...] = half.astype(self.y_s.dtype)
            plgpu.commit_smem()
            inverse = inverse - call.dot((self.x_s, self.y_s), (self.x_low_s, self.y_s))
            size *= 2
        self._put(inverse, self.x_s, self.x_low_s)

    def _put(self, x, high_s, low_s):
        high = x.astype(high_s.dtype)
        high_s[...] = high
        low_s[...] = (x - high.astype(F32)).astype(high_s.dtype)

    def send(self, inverse_ref, transposed_ref=None):
        """Write R and, if asked for, T = I - beta R S."""
        if transposed_ref is not None:
            self.y_s[...] = self.scores.astype(self.y_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.x_s, inverse_ref)
        if transposed_ref is not None:
            identity = jnp.where(iota((C, C), 0) == iota((C, C), 1), 1.0, 0.0)
            product = self.call.dot((self.x_s, self.y_s), (self.x_low_s, self.y_s))
            self.a_s[...] = (identity - product * by_row(load(self.beta_rows_s, ROWS), (C, C))).astype(self.a_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.a_s, transposed_ref)
        plgpu.wait_smem_to_gmem(0)


def _inverses(call, k, beta, rows, *, both):
    """R, and T if both, [B, N, H, C, C] in k's dtype; of k [B, T, H, K], beta [B, H, N, C] and `decay_rows`."""
    B, T, H, K = k.shape
    dtype = k.dtype
    out_type = [jax.ShapeDtypeStruct((B, T // C, H, C, C), dtype)] * (1 + both)
    scratch = {name: swizzled((C, C), dtype) for name in ("x_s", "x_low_s", "a_s", "a_low_s", "y_s")}
    scratch |= {
        "k_s": swizzled((C, K), dtype),
        "beta_rows_s": plgpu.SMEM((C,), F32), "beta_columns_s": plgpu.SMEM((C,), F32),
        "full": plgpu.Barrier(num_arrivals=3 if rows is None else 5),
    }  # fmt: skip
    operands = [k, beta]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}

    def body(k_ref, beta_ref, *refs, k_s, x_s, x_low_s, a_s, a_low_s, y_s, beta_rows_s, beta_columns_s, full, rows_s=None,
             columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        h, n, b = (lax.axis_index(name) for name in ("h", "n", "b"))
        plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(n * C, C), h], k_s, full)
        for to in (beta_rows_s, beta_columns_s):
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], to, full)
        if rows is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(rows_ref.at[b, h if rows.shape[1] > 1 else 0, n], to, full)
        plgpu.barrier_wait(full)
        i, j = iota((C, C), 0), iota((C, C), 1)
        scores = times(call.dot((k_s, k_s.T)), weights_between((C, C), rows_s, columns_s, 0, 0))
        inverse = _Inverse(call, jnp.where(i > j, scores, 0.0), beta_rows_s, beta_columns_s, (x_s, x_low_s, a_s, a_low_s, y_s))
        inverse.send(*(ref.at[b, n, h] for ref in refs))

    grid = {"h": H, "n": T // C, "b": B}
    return call(body, "delta_rule_inverses", grid, operands, out_type, scratch, 1)


def _prepare_channels(call, q, k, beta, g, start, *, scale, inverses):
    """What a decay of every channel does within chunks, and R, T.

    Args:
      q, k: [B, T, H, K]; beta: [B, H, N, C]; g, start: of `channels_of`.
      inverses: 0 for neither R nor T, 1 for R, 2 for both.

    Returns:
      scale q and k times the decays up to each token; (k times those after it, the scores P [B, N, H, C, C], and the decays of
      whole chunks [B, N, H, K] float32 as powers of 2); the inverses asked for, [B, N, H, C, C].
    """
    B, T, H, K = q.shape
    N, tiles = T // C, range(K // C)
    dtype = q.dtype
    scratch = {name: [swizzled((C, C), dtype)] * len(tiles) for name in ("q_s", "k_s")}
    scratch |= {name: swizzled((C, C), dtype) for name in ("z_s", "z_keys_s", "more_s")}
    scratch |= {
        "sum_s": swizzled((C, C), jnp.float16), "total_s": plgpu.SMEM((K,), F32),
        "beta_rows_s": plgpu.SMEM((C,), F32), "beta_columns_s": plgpu.SMEM((C,), F32),
        "full": plgpu.Barrier(num_arrivals=2 * len(tiles) + 2 + 2 * (start is not None)),
    }  # fmt: skip
    operands = [q, k, g, beta]
    if start is not None:
        operands.append(start)
        scratch |= {"rows_s": plgpu.SMEM((C,), F32), "columns_s": plgpu.SMEM((C,), F32)}
    shape = jax.ShapeDtypeStruct
    pairs = shape((B, N, H, C, C), dtype)
    out_type = [shape(q.shape, dtype)] * 3 + [pairs, shape((B, N, H, K), F32)] + [pairs] * inverses

    def body(q_ref, k_ref, g_ref, beta_ref, *refs, q_s, k_s, z_s, z_keys_s, more_s, sum_s, total_s, beta_rows_s,
             beta_columns_s, full, rows_s=None, columns_s=None):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        q_read_ref, k_read_ref, k_write_ref, p_ref, total_ref, *inverse_refs = refs
        h, n, b = (lax.axis_index(name) for name in ("h", "n", "b"))
        tokens = pl.ds(n * C, C)
        columns = [pl.ds(tile * C, C) for tile in tiles]
        for tile in tiles:
            for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, columns[tile]], to[tile], full)
        for to in (beta_rows_s, beta_columns_s):
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], to, full)
        if start is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(start_ref.at[b, n], to, full)
        plgpu.barrier_wait(full)
        levels = Levels(call, dtype)
        starts = None if start is None else by_row(load(rows_s, ROWS), (C, C))
        scores = jnp.where(levels.i == levels.j, call.dot(*((q_s[tile], k_s[tile].T) for tile in tiles)), 0.0)
        found = (scores, jnp.zeros_like(scores)) if inverses else (scores,)
        for tile in tiles:
            g_c = plgpu.load(g_ref.at[b, tokens, h, columns[tile]], layout=WGMMA, optimized=False)
            sum_s[...] = g_c.astype(jnp.float16)
            lost = 0.0 if start is None else jnp.where(rows_s[C - 1] < 0, 0.0, -jnp.inf)
            total_s.at[columns[tile]][...] = jnp.sum(g_c, axis=0) + lost
            plgpu.commit_smem()

            def level(n, found, tile=tile):
                size = jnp.int32(1) << n
                [factor] = levels.factors([sum_s], size)
                keys = load(k_s[tile])
                z_s[...] = (jnp.where(levels.right(size), load(q_s[tile]), keys).astype(F32) * factor).astype(dtype)
                z_keys_s[...] = (keys.astype(F32) * factor).astype(dtype)
                plgpu.commit_smem()
                parted = levels.pairs(size)
                rows = (z_s, z_keys_s)[: len(found)]
                return tuple(x + jnp.where(parted, call.dot((z, z_keys_s.T)), 0.0) for x, z in zip(found, rows, strict=True))

            found = lax.fori_loop(0, LEVELS, level, found)
            [before], [after] = levels.before([sum_s]), levels.after([sum_s])
            if start is not None:
                before = jnp.where(starts < 0, before, 0.0)
                after = jnp.where(starts == rows_s[C - 1], after, 0.0)
            q_c, k_c = load(q_s[tile]).astype(F32), load(k_s[tile]).astype(F32)
            q_s[tile][...] = (q_c * (before * scale)).astype(dtype)
            z_s[...] = (k_c * before).astype(dtype)
            z_keys_s[...] = (k_c * after).astype(dtype)
            plgpu.commit_smem()
            for x_s, ref in ((q_s[tile], q_read_ref), (z_s, k_read_ref), (z_keys_s, k_write_ref)):
                plgpu.copy_smem_to_gmem(x_s, ref.at[b, tokens, h, columns[tile]])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if start is not None:
            together = starts == by_column(load(columns_s, COLS), (C, C))
            found = [jnp.where(together, x, 0.0) for x in found]
        more_s[...] = (found[0] * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(more_s, p_ref.at[b, n, h])
        plgpu.copy_smem_to_gmem(total_s, total_ref.at[b, n, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=bool(inverses))
        if inverses:
            inverse = _Inverse(call, found[1], beta_rows_s, beta_columns_s, (q_s[0], k_s[0], z_s, z_keys_s, more_s))
            inverse.send(*(ref.at[b, n, h] for ref in inverse_refs))

    grid = {"h": H, "n": N, "b": B}
    q_read, k_read, *channels = call(body, "delta_rule_channels_scores", grid, operands, out_type, scratch, 1)
    return q_read, k_read, channels[:3], channels[3:]


def _channel_memories(stages, K, dtype):
    """For k that is written, P and the decays of chunks."""
    return {
        "k_write_s": swizzled((stages, C, K), dtype), "p_s": swizzled((stages, C, C), dtype),
        "total_s": plgpu.SMEM((stages, K), F32),
    }  # fmt: skip


def _gate_refs(refs, rows, channels):
    """The refs of `rows` or `channels`, and those after them."""
    count = 1 if rows is not None else 0 if channels is None else len(channels)
    return refs[:count], refs[count:]


def _forward_walk(call, q, k, v, beta, inverse, state, *, scale, save, rows=None, channels=None):
    """Outputs, the final state [B, H, V, K] and, if saved, the states that enter the chunks [B, N, H, V, K] and their r
    [B, N, H, V, C] in v's dtype.

    Args:
      beta: [B, H, N, C]; inverse: R; state: [B, H, V, K] float32.
      rows: of `decay_rows`; or for a decay of every channel
      channels: of `_prepare_channels`, k that is written, P and the decays of chunks; then q and k are those that read.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    N = T // C
    dtype = q.dtype
    blocks = value_blocks(B * H, V)
    wgs = V // blocks // C
    stages = 2 if wgs > 1 or channels is not None else 3
    scratch = {
        "q_s": swizzled((stages, C, K), dtype), "k_s": swizzled((stages, C, K), dtype),
        "v_s": swizzled((stages, wgs, C, C), dtype), "inverse_s": swizzled((stages, C, C), dtype),
        "beta_s": plgpu.SMEM((stages, C), F32),
        "h_s": swizzled((wgs, C, K), dtype), "r_s": swizzled((wgs, C, C), dtype), "o_s": swizzled((wgs, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=4 + wgs + 2 * (rows is not None) + 3 * (channels is not None), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    operands = [q, k, v, beta, inverse, state]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((stages, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    elif channels is not None:
        operands += channels
        scratch |= _channel_memories(stages, K, dtype)
    shape = jax.ShapeDtypeStruct
    out_type = [shape(v.shape, v.dtype), shape((B, H, V, K), F32)]
    if save:
        out_type += [shape((B, N, H, V, K), dtype), shape((B, N, H, V, C), dtype)]

    def body(q_ref, k_ref, v_ref, beta_ref, inverse_ref, state_ref, *refs, q_s, k_s, v_s, inverse_s, beta_s, h_s, r_s, o_s,
             full, empty, done, rows_s=None, columns_s=None, k_write_s=None, p_s=None, total_s=None):
        gates, refs = _gate_refs(refs, rows, channels)
        o_ref, final_ref, *saved_refs = refs
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "v"))
        wg = lax.axis_index("wg")
        mine = pl.ds((block * wgs + wg) * C, C)

        def fetch(n, slot):
            tokens, bar = pl.ds(n * C, C), full.at[slot]
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], q_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h], k_s.at[slot], bar)
            for part in range(wgs):
                values = pl.ds((block * wgs + part) * C, C)
                plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, h, values], v_s.at[slot, part], bar)
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, n, h], inverse_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], beta_s.at[slot], bar)
            if rows is not None:
                of_head = gates[0].at[b, h if rows.shape[1] > 1 else 0, n]
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(of_head, to.at[slot], bar)
            elif channels is not None:
                k_write_ref, p_ref, total_ref = gates
                plgpu.copy_gmem_to_smem(k_write_ref.at[b, tokens, h], k_write_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(p_ref.at[b, n, h], p_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(total_ref.at[b, n, h], total_s.at[slot], bar)

        def step(n, slot, state):
            q_c, k_c = q_s.at[slot], k_s.at[slot]
            of_row, of_column = (None, None) if rows is None else (rows_s.at[slot], columns_s.at[slot])
            beta_c = by_column(load(beta_s.at[slot], COLS), (C, C))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            low = state.astype(dtype)
            h_s.at[wg][...] = low
            read = call.dot((low, k_c.T))
            if rows is not None:
                read = read * by_column(product_before(of_column, COLS), (C, C))
            u = load(v_s.at[slot, wg].T).astype(F32) - read
            r = call.dot((u.astype(dtype), inverse_s.at[slot].T))
            r_s.at[wg][...] = r.astype(dtype)
            plgpu.commit_smem()
            if save:
                h_ref, r_ref = saved_refs
                plgpu.copy_smem_to_gmem(h_s.at[wg], h_ref.at[b, n, h, mine])
                plgpu.copy_smem_to_gmem(r_s.at[wg], r_ref.at[b, n, h, mine])
            written = r * beta_c
            if rows is not None:
                written = written * by_column(product_after(of_column, COLS), (C, C))
                state = state * product_total(of_column)
            k_write = k_c
            if channels is not None:
                k_write = k_write_s.at[slot]
                state = state * by_column(jnp.exp2(load(total_s.at[slot], COLS)), state.shape)
            state = call.dot((written.astype(dtype), k_write), init=state)
            o = call.dot((q_c, h_s.at[wg].T))
            if channels is None:
                scores = times(call.dot((q_c, k_c.T)), weights_between((C, C), of_row, of_column, 0, 0)) * (scale * beta_c)
                o = o * scale
            else:
                scores = load(p_s.at[slot]).astype(F32) * beta_c
            if rows is not None:
                o = o * by_row(product_before(of_row, ROWS), (C, C))
            o = call.dot((scores.astype(dtype), r_s.at[wg].T), init=o)
            o_s.at[wg][...] = o.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[wg], o_ref.at[b, pl.ds(n * C, C), h, mine])
            return state

        state = plgpu.load(state_ref.at[b, h, mine], layout=WGMMA, optimized=False)
        state = walk_chunks(fetch, step, state, count=jnp.int32(N), wg=wg, wgs=wgs, full=full, empty=empty)
        final_ref.at[b, h, mine][...] = state
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "v": blocks}
    name = "delta_rule_forward" if channels is None else "delta_rule_channels_forward"
    return call(body, name, grid, operands, out_type, scratch, wgs)


def _backward_walk(call, q, k, do, beta, inverse, d_state, *, scale, rows=None, channels=None):
    """The cotangent of the state that enters token 0 [B, H, V, K], mu of every chunk [B, N, H, V, C] and the cotangents of the
    states that leave the chunks [B, N, H, V, K], both in q's dtype.

    Args:
      do: [B, T, H, V]; inverse: T; d_state: [B, H, V, K] float32, of the final one.
      beta, rows, channels: as for `_forward_walk`.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N = T // C
    dtype = q.dtype
    blocks = value_blocks(B * H, V)
    wgs = V // blocks // C
    stages = 2 if wgs > 1 or channels is not None else 3
    scratch = {
        "q_s": swizzled((stages, C, K), dtype), "k_s": swizzled((stages, C, K), dtype),
        "do_s": swizzled((stages, wgs, C, C), dtype), "inverse_s": swizzled((stages, C, C), dtype),
        "beta_s": plgpu.SMEM((stages, C), F32),
        "dh_s": swizzled((wgs, C, K), dtype), "mu_s": swizzled((wgs, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=4 + wgs + 2 * (rows is not None) + 3 * (channels is not None), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    operands = [q, k, do, beta, inverse, d_state]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((stages, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    if channels is None:
        scratch["p_s"] = swizzled((wgs, C, C), dtype)
    else:
        operands += channels
        scratch |= _channel_memories(stages, K, dtype)
    shape = jax.ShapeDtypeStruct
    out_type = [shape((B, H, V, K), F32), shape((B, N, H, V, C), dtype), shape((B, N, H, V, K), dtype)]

    def body(q_ref, k_ref, do_ref, beta_ref, inverse_ref, final_ref, *refs, q_s, k_s, do_s, inverse_s, beta_s, dh_s, mu_s, p_s,
             full, empty, done, rows_s=None, columns_s=None, k_write_s=None, total_s=None):
        gates, (d_state_ref, mu_ref, dh_ref) = _gate_refs(refs, rows, channels)
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "v"))
        wg = lax.axis_index("wg")
        mine = pl.ds((block * wgs + wg) * C, C)

        def fetch(n, slot):
            at, bar = N - 1 - n, full.at[slot]
            tokens = pl.ds(at * C, C)
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], q_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h], k_s.at[slot], bar)
            for part in range(wgs):
                values = pl.ds((block * wgs + part) * C, C)
                plgpu.copy_gmem_to_smem(do_ref.at[b, tokens, h, values], do_s.at[slot, part], bar)
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, at, h], inverse_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, at], beta_s.at[slot], bar)
            if rows is not None:
                of_head = gates[0].at[b, h if rows.shape[1] > 1 else 0, at]
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(of_head, to.at[slot], bar)
            elif channels is not None:
                k_write_ref, p_ref, total_ref = gates
                plgpu.copy_gmem_to_smem(k_write_ref.at[b, tokens, h], k_write_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(p_ref.at[b, at, h], p_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(total_ref.at[b, at, h], total_s.at[slot], bar)

        def step(n, slot, dh):
            at = N - 1 - n
            q_c, k_c = q_s.at[slot], k_s.at[slot]
            of_row, of_column = (None, None) if rows is None else (rows_s.at[slot], columns_s.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            low = dh.astype(dtype)
            dh_s.at[wg][...] = low
            if channels is None:
                scores_s, k_write = p_s.at[wg], k_c
                scores = times(call.dot((q_c, k_c.T)), weights_between((C, C), of_row, of_column, 0, 0)) * scale
                scores_s[...] = scores.astype(dtype)
            else:
                scores_s, k_write = p_s.at[slot], k_write_s.at[slot]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dh_s.at[wg], dh_ref.at[b, at, h, mine])
            d_written = call.dot((low, k_write.T))
            if rows is not None:
                d_written = d_written * by_column(product_after(of_column, COLS), (C, C))
            do_c = load(do_s.at[slot, wg].T)
            d_written = call.dot((do_c, scores_s), init=d_written)
            mu = call.dot((d_written.astype(dtype), inverse_s.at[slot]))
            mu_s.at[wg][...] = mu.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mu_s.at[wg], mu_ref.at[b, at, h, mine])
            d_read = mu * by_column(-load(beta_s.at[slot], COLS), (C, C))
            d_out = do_c if channels is not None else do_c.astype(F32) * scale
            if rows is not None:
                before = by_column(product_before(of_column, COLS), (C, C))
                d_read, d_out = d_read * before, d_out * before
                dh = dh * product_total(of_column)
            elif channels is not None:
                dh = dh * by_column(jnp.exp2(load(total_s.at[slot], COLS)), dh.shape)
            dh = call.dot((d_out.astype(dtype), q_c), init=dh)
            return call.dot((d_read.astype(dtype), k_c), init=dh)

        dh = plgpu.load(final_ref.at[b, h, mine], layout=WGMMA, optimized=False)
        dh = walk_chunks(fetch, step, dh, count=jnp.int32(N), wg=wg, wgs=wgs, full=full, empty=empty)
        d_state_ref.at[b, h, mine][...] = dh
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "v": blocks}
    name = "delta_rule_backward_states" if channels is None else "delta_rule_channels_backward_states"
    return call(body, name, grid, operands, out_type, scratch, wgs)


def _send_values(part, tiles, V, mu_s, r_s, beta_rows, out_s, sums_s, dv_ref, dbeta_ref):
    """dv and dbeta of a chunk, shared out among the tiles of its key channels."""
    for start in range(0, V, C):
        @pl.when(part == start // C % tiles)
        def _(start=start):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s[...] = (load(mu_s.at[pl.ds(start, C)].T).astype(F32) * beta_rows).astype(out_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, dv_ref.at[pl.ds(0, C), pl.ds(start, C)])

    @pl.when(part == 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dbeta = 0.0
        for start in range(0, V, C):
            values = pl.ds(start, C)
            dbeta = dbeta + jnp.sum(load(mu_s.at[values].T).astype(F32) * load(r_s.at[values].T).astype(F32), axis=1)
        sums_s[...] = dbeta
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_s, dbeta_ref)
    plgpu.wait_smem_to_gmem(0)


def _gradients(call, q, k, do, beta, rows, h, r, mu, dh, *, scale):
    """Gradients of every chunk, by 64 of its key channels.

    Args:
      q, k: [B, T, H, K]; do: [B, T, H, V]; beta: [B, H, N, C]; rows: of `decay_rows`.
      h, dh: [B, N, H, V, K], the states that enter and the cotangents of those that leave; r, mu: [B, N, H, V, C].

    Returns:
      dq, dk, dv; dbeta [B, H, N, C]; with rows also, [B, H, N, K / C, C], the flow of the decays, and numbers whose sum is what
      the leaving state and its cotangent have in common.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N, tiles = T // C, K // C
    dtype = q.dtype
    scratch = {name: swizzled((C, C), dtype) for name in ("q_s", "k_s", "d_pairs_s")}
    scratch |= {"do_s": swizzled((C, V), dtype)} | {name: swizzled((V, C), dtype) for name in ("r_s", "mu_s", "h_s", "dh_s")}
    scratch |= {name: plgpu.SMEM((C,), F32) for name in ("beta_rows_s", "beta_columns_s", "sums_s", "common_s")}
    scratch["full"] = plgpu.Barrier(num_arrivals=9 if rows is None else 11)
    operands = [q, k, do, beta, h, r, mu, dh]
    shape = jax.ShapeDtypeStruct
    out_type = [shape(x.shape, dtype) for x in (q, k, do)] + [shape((B, H, N, C), F32)]
    if rows is not None:
        operands.append(rows)
        out_type += [shape((B, H, N, tiles, C), F32)] * 2
        scratch |= {name: plgpu.SMEM((rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}

    def body(q_ref, k_ref, do_ref, beta_ref, h_ref, r_ref, mu_ref, dh_ref, *refs, q_s, k_s, d_pairs_s, do_s, r_s, mu_s,
             h_s, dh_s, beta_rows_s, beta_columns_s, sums_s, common_s, full, rows_s=None, columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        dq_ref, dk_ref, dv_ref, dbeta_ref, *refs = refs
        hd, part = lax.div(lax.axis_index("h"), tiles), lax.rem(lax.axis_index("h"), tiles)
        n, b = lax.axis_index("n"), lax.axis_index("b")
        tokens, keys = pl.ds(n * C, C), pl.ds(part * C, C)
        plgpu.copy_gmem_to_smem(do_ref.at[b, tokens, hd], do_s, full)
        for ref, to in ((r_ref, r_s), (mu_ref, mu_s)):
            plgpu.copy_gmem_to_smem(ref.at[b, n, hd], to, full)
        for ref, to in ((q_ref, q_s), (k_ref, k_s)):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, hd, keys], to, full)
        for ref, to in ((h_ref, h_s), (dh_ref, dh_s)):
            plgpu.copy_gmem_to_smem(ref.at[b, n, hd, pl.ds(0, V), keys], to, full)
        for to in (beta_rows_s, beta_columns_s):
            plgpu.copy_gmem_to_smem(beta_ref.at[b, hd, n], to, full)
        if rows is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(rows_ref.at[b, hd if rows.shape[1] > 1 else 0, n], to, full)
        plgpu.barrier_wait(full)

        weights = weights_between((C, C), rows_s, columns_s, 0, 0)
        weights = weights * by_column(load(beta_columns_s, COLS), (C, C))
        beta_rows = by_row(load(beta_rows_s, ROWS), (C, C))
        before = 1.0 if rows is None else by_row(product_before(rows_s, ROWS), (C, C))
        d_pairs_s[...] = (call.dot((do_s, r_s)) * weights * scale).astype(dtype)  # of queries and keys
        plgpu.commit_smem()
        dq = call.dot((do_s, h_s)) * (before * scale)
        dq = call.dot((d_pairs_s, k_s), init=dq)
        dk_written = call.dot((r_s.T, dh_s)) * beta_rows
        if rows is not None:
            dk_written = dk_written * by_row(product_after(rows_s, ROWS), (C, C))
            flow = jnp.sum(dq * load(q_s).astype(F32), axis=1)
            common = jnp.sum(dk_written * load(k_s).astype(F32), axis=1)
            for start in range(0, V, C):
                values = pl.ds(start, C)
                both = load(h_s.at[values]).astype(F32) * load(dh_s.at[values]).astype(F32)
                common = common + product_total(columns_s) * jnp.sum(both, axis=1)
            common_s[...] = common
        dk_written = call.dot((d_pairs_s.T, q_s), init=dk_written)
        d_keys = call.dot((mu_s.T, r_s)) * jnp.where(iota((C, C), 0) > iota((C, C), 1), weights, 0.0) * -beta_rows
        q_s[...] = dq.astype(dtype)
        d_pairs_s[...] = d_keys.astype(dtype)  # of keys and keys
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_ref.at[b, tokens, hd, keys])
        dk_read = call.dot((mu_s.T, h_s)) * (before * -beta_rows)
        dk_read = call.dot((d_pairs_s, k_s), init=dk_read)
        dk_written = call.dot((d_pairs_s.T, k_s), init=dk_written)
        if rows is not None:
            sums_s[...] = flow + jnp.sum((dk_read - dk_written) * load(k_s).astype(F32), axis=1)
        k_s[...] = (dk_read + dk_written).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[b, tokens, hd, keys])
        if rows is not None:
            for ref, x in zip(refs, (sums_s, common_s), strict=True):
                plgpu.copy_smem_to_gmem(x, ref.at[b, hd, n, part])

        _send_values(part, tiles, V, mu_s, r_s, beta_rows, d_pairs_s, sums_s, dv_ref.at[b, tokens, hd], dbeta_ref.at[b, hd, n])

    grid = {"h": H * tiles, "n": N, "b": B}
    return call(body, "delta_rule_backward", grid, operands, out_type, scratch, 1)


def _gradients_channels(call, q, k, do, beta, g, start, h, r, mu, dh, *, scale):
    """Gradients of every chunk, by 64 of its key channels, for a decay of every channel.

    Args:
      q, k: [B, T, H, K]; do: [B, T, H, V]; beta: [B, H, N, C]; g, start: of `channels_of`; h, r, mu, dh: as for `_gradients`.

    Returns:
      dq, dk, dv; dbeta [B, H, N, C]; and dg [B, T, H, K] float32.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N, tiles = T // C, K // C
    dtype = q.dtype
    scratch = {name: swizzled((C, C), dtype) for name in ("q_s", "k_s")}
    scratch |= {"do_s": swizzled((C, V), dtype)} | {name: swizzled((V, C), dtype) for name in ("r_s", "mu_s")}
    # Tiles for the levels, and after those the states.
    scratch |= {name: swizzled((max(V, 2 * C), C), dtype) for name in ("h_s", "dh_s")}
    scratch |= {name: plgpu.SMEM((C,), F32) for name in ("beta_rows_s", "beta_columns_s", "dbeta_s")}
    scratch |= {
        "sum_s": swizzled((C, C), jnp.float16), "full": plgpu.Barrier(num_arrivals=7 + 2 * (start is not None)),
        "fetched": plgpu.Barrier(num_arrivals=2),
    }  # fmt: skip
    operands = [q, k, do, beta, g, h, r, mu, dh]
    shape = jax.ShapeDtypeStruct
    out_type = [shape(x.shape, dtype) for x in (q, k, do)] + [shape((B, H, N, C), F32), shape(g.shape, F32)]
    if start is not None:
        operands.append(start)
        scratch |= {"rows_s": plgpu.SMEM((C,), F32), "columns_s": plgpu.SMEM((C,), F32)}

    def body(q_ref, k_ref, do_ref, beta_ref, g_ref, h_ref, r_ref, mu_ref, dh_ref, *refs, q_s, k_s, do_s, r_s, mu_s, h_s, dh_s,
             sum_s, beta_rows_s, beta_columns_s, dbeta_s, full, fetched, rows_s=None, columns_s=None):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        dq_ref, dk_ref, dv_ref, dbeta_ref, dg_ref = refs
        hd, part = lax.div(lax.axis_index("h"), tiles), lax.rem(lax.axis_index("h"), tiles)
        n, b = lax.axis_index("n"), lax.axis_index("b")
        tokens, keys = pl.ds(n * C, C), pl.ds(part * C, C)
        states = [x.at[pl.ds(0, V)] for x in (h_s, dh_s)]
        plgpu.copy_gmem_to_smem(do_ref.at[b, tokens, hd], do_s, full)
        for ref, to in ((r_ref, r_s), (mu_ref, mu_s)):
            plgpu.copy_gmem_to_smem(ref.at[b, n, hd], to, full)
        for ref, to in ((q_ref, q_s), (k_ref, k_s)):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, hd, keys], to, full)

        def fetch_states():
            for ref, to in zip((h_ref, dh_ref), states, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, n, hd, pl.ds(0, V), keys], to, fetched)

        for to in (beta_rows_s, beta_columns_s):
            plgpu.copy_gmem_to_smem(beta_ref.at[b, hd, n], to, full)
        if start is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(start_ref.at[b, n], to, full)
        levels = Levels(call, dtype)
        i, j = levels.i, levels.j
        g_c = plgpu.load(g_ref.at[b, tokens, hd, keys], layout=WGMMA, optimized=False)
        sum_s[...] = g_c.astype(jnp.float16)
        total = jnp.exp2(jnp.sum(g_c, axis=0))
        plgpu.commit_smem()
        plgpu.barrier_wait(full)
        beta_rows = by_row(load(beta_rows_s, ROWS), (C, C))
        starts = together = None
        if start is not None:
            starts = by_row(load(rows_s, ROWS), (C, C))
            together = starts == by_column(load(columns_s, COLS), (C, C))
        # Rows are the later or the earlier token of a pair: the cotangents of its scores, either way round.
        z_s, z_keys_s, pairs_s, key_pairs_s = (x.at[pl.ds(at, C)] for x in (h_s, dh_s) for at in (0, C))
        beta_columns = by_column(load(beta_columns_s, COLS), (C, C))
        pairs = jnp.where(i >= j, call.dot((do_s, r_s)) * beta_columns, call.dot((r_s.T, do_s.T)) * beta_rows) * scale
        pairs = pairs if together is None else jnp.where(together, pairs, 0.0)
        pairs_s[...] = pairs.astype(dtype)
        own = by_row(jnp.sum(jnp.where(i == j, pairs, 0.0), axis=1), (C, C))
        # Keys are written, and read as queries are.
        dq, dk_written = own * load(k_s).astype(F32), own * load(q_s).astype(F32)
        key_pairs = jnp.where(i > j, call.dot((mu_s.T, r_s)), call.dot((r_s.T, mu_s))) * (-beta_rows * beta_columns)
        key_pairs = key_pairs if together is None else jnp.where(together, key_pairs, 0.0)
        key_pairs_s[...] = key_pairs.astype(dtype)

        def level(n, gradients):
            dq, dk_read, dk_written = gradients
            size = jnp.int32(1) << n
            right, partners = levels.right(size), levels.partners(size)
            [factor] = levels.factors([sum_s], size)
            k_c = load(k_s)
            z_s[...] = (jnp.where(right, load(q_s), k_c).astype(F32) * factor).astype(dtype)
            z_keys_s[...] = (k_c.astype(F32) * factor).astype(dtype)
            plgpu.commit_smem()
            d_mixed = factor * call.dot((load(pairs_s) * partners, z_s))
            dq, dk_written = jnp.where(right, dq + d_mixed, dq), jnp.where(right, dk_written, dk_written + d_mixed)
            d_keys = factor * call.dot((load(key_pairs_s) * partners, z_keys_s))
            return dq, jnp.where(right, dk_read + d_keys, dk_read), jnp.where(right, dk_written, dk_written + d_keys)

        dq, dk_read, dk_written = lax.fori_loop(0, LEVELS, level, (dq, jnp.zeros_like(dq), dk_written))
        plgpu.commit_smem()
        fetch_states()
        [before], [after] = levels.before([sum_s]), levels.after([sum_s])
        if start is not None:
            before = jnp.where(starts < 0, before, 0.0)
            after = jnp.where(starts == rows_s[C - 1], after, 0.0)
            total = total * jnp.where(rows_s[C - 1] < 0, 1.0, 0.0)
        plgpu.barrier_wait(fetched)
        h_c, dh_c = states
        dq = dq + before * scale * call.dot((do_s, h_c))
        dk_read = dk_read - before * beta_rows * call.dot((mu_s.T, h_c))
        dk_later = after * beta_rows * call.dot((r_s.T, dh_c))
        dk_written = dk_written + dk_later
        # What the leaving state and its cotangent have in common.
        common = jnp.sum(dk_later * load(k_s).astype(F32), axis=0)
        for value in range(0, V, C):
            values = pl.ds(value, C)
            common = common + total * jnp.sum(load(h_s.at[values]).astype(F32) * load(dh_s.at[values]).astype(F32), axis=0)
        # Sums of the flow over the tokens from each on.
        flow = load(q_s).astype(F32) * dq + load(k_s).astype(F32) * (dk_read - dk_written)
        z_s[...] = flow.astype(dtype)
        q_s[...] = dq.astype(dtype)
        k_s[...] = (dk_read + dk_written).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_ref.at[b, tokens, hd, keys])
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[b, tokens, hd, keys])
        dg = call.dot((jnp.where(i <= j, 1.0, 0.0).astype(dtype), z_s)) + by_column(common, (C, C))
        if start is not None:
            dg = jnp.where(starts == i.astype(F32), 0.0, dg)
        dg_ref.at[b, tokens, hd, keys][...] = dg
        plgpu.commit_smem()
        _send_values(part, tiles, V, mu_s, r_s, beta_rows, z_s, dbeta_s, dv_ref.at[b, tokens, hd], dbeta_ref.at[b, hd, n])

    grid = {"h": H * tiles, "n": N, "b": B}
    return call(body, "delta_rule_channels_backward", grid, operands, out_type, scratch, 1)


def _gates(beta, length):
    """[B, H, N, C] of tokens padded to `length`."""
    beta = jnp.pad(beta[..., 0], ((0, 0), (0, length - beta.shape[1]), (0, 0))).swapaxes(1, 2)
    return beta.reshape(*beta.shape[:2], -1, C)


def forward(scale, q, k, v, beta, log_decay, reset, state, *, save: bool, interpret=False):
    """Outputs, final state and what `backward` needs.

    Args:
      scale: multiplies q.
      q, k: [B, T, H, K]; v: [B, T, H, V]; bfloat16.
      beta: [B, T, H, 1], float32.
      log_decay: None or [B, T, H, 1], float32, <= 0. Factors below exp(-128) count as exp(-128), which is 0.
      reset: None or bool [B, T]: the state that such a token would continue is dropped.
      state: [B, H, K, V] float32, enters token 0.
      save: whether `backward` will be called.
      interpret: run by the interpreter: True, or its `InterpretGPUParams`.

    Returns:
      o [B, T, H, V] in v's dtype; the final state, float32; what `backward` needs, None unless save.
    """
    call, length = Call(interpret), q.shape[1]
    q, k, v = (padded(x, C) for x in (q, k, v))
    beta = _gates(beta, q.shape[1])
    walk = partial(_forward_walk, call, state=jnp.swapaxes(state, -1, -2), scale=scale, save=save)
    if log_decay is not None and log_decay.shape[-1] > 1:
        gates = channels_of(log_decay, reset, q.shape[1])
        q, k, channels, (inverse, *transposed) = _prepare_channels(call, q, k, beta, *gates, scale=scale, inverses=1 + save)
        o, final, *saved = walk(q, k, v, beta, inverse, channels=channels)
    else:
        rows = decay_rows(log_decay, reset, q.shape[1], C)
        inverse, *transposed = _inverses(call, k, beta, rows, both=save)
        o, final, *saved = walk(q, k, v, beta, inverse, rows=rows)
    return o[:, :length], jnp.swapaxes(final, -1, -2), (*saved, *transposed) if save else None


def backward(scale, q, k, v, beta, log_decay, reset, saved, do, d_final, *, interpret=False):
    """Gradients of `forward`.

    Args:
      scale, q, k, v, beta, log_decay, reset, interpret: as for `forward`; saved: what it returned.
      do: [B, T, H, V]; d_final: [B, H, K, V] float32.

    Returns:
      dq, dk, dv in their dtypes; dbeta, float32; dlog_decay, float32 or None; the gradient of the initial state, float32.
    """
    call, length = Call(interpret), q.shape[1]
    q, k, do = (padded(x, C) for x in (q, k, do))
    beta = _gates(beta, q.shape[1])
    h, r, inverse = saved
    walk = partial(_backward_walk, call, do=do, beta=beta, inverse=inverse, d_state=jnp.swapaxes(d_final, -1, -2), scale=scale)
    if log_decay is not None and log_decay.shape[-1] > 1:
        g, start = channels_of(log_decay, reset, q.shape[1])
        q_read, k_read, channels, _ = _prepare_channels(call, q, k, beta, g, start, scale=scale, inverses=0)
        d_state, mu, dh = walk(q_read, k_read, channels=channels)
        dq, dk, dv, dbeta, dg = _gradients_channels(call, q, k, do, beta, g, start, h, r, mu, dh, scale=scale)
        dbeta = dbeta.reshape(*dbeta.shape[:2], -1)[..., :length].swapaxes(1, 2)[..., None]
        return *(x[:, :length] for x in (dq, dk, dv)), dbeta, dg[:, :length], jnp.swapaxes(d_state, -1, -2)
    rows = decay_rows(log_decay, reset, q.shape[1], C)
    d_state, mu, dh = walk(q, k, rows=rows)
    dq, dk, dv, dbeta, *sums = _gradients(call, q, k, do, beta, rows, h, r, mu, dh, scale=scale)

    def of_tokens(x):
        return x.reshape(*x.shape[:2], -1)[..., :length].swapaxes(1, 2)[..., None]

    dg = None
    if log_decay is not None:
        flow, common = (jnp.sum(x, axis=3) for x in sums)
        dg = jnp.sum(jnp.where(jnp.tri(C, dtype=bool), flow[..., None], 0.0), axis=-2) + jnp.sum(common, -1, keepdims=True)
        dg = of_tokens(dg)
        if reset is not None:
            dg = jnp.where(reset[..., None, None], 0.0, dg)
    return dq[:, :length], dk[:, :length], dv[:, :length], of_tokens(dbeta), dg, jnp.swapaxes(d_state, -1, -2)
