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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu
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

# The logical axes of what `forward` saves.
SAVED_AXES = (("batch", None, "heads", None, None),) * 3


def declines(*, H: int | None, K: int | None, V: int | None, dtype, decay: str | None, chip: str) -> str | None:
    """Why the kernel does not run for these heads on this chip (`jax.Device.device_kind`), or None. What is None is not known
    and rules nothing out."""
    if decay == "vector":
        return "the GPU kernel of the delta rule takes one decay of a head or none, not one of every channel"
    return gpu.declines(H=H, K=K, V=V, dtype=dtype, decay=decay, chip=chip)


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
        apart = i ^ j
        scores = times(call.dot((k_s, k_s.T)), weights_between((C, C), rows_s, columns_s, 0, 0))
        scores = jnp.where(i > j, scores, 0.0)
        A = scores * by_column(load(beta_columns_s, COLS), (C, C))
        high = A.astype(dtype)
        a_s[...] = high
        a_low_s[...] = (A - high.astype(F32)).astype(dtype)
        inverse = jnp.where(i == j, 1.0, jnp.where((apart == 1) & (i > j), -A, 0.0))

        def put(x):
            high = x.astype(dtype)
            x_s[...] = high
            x_low_s[...] = (x - high.astype(F32)).astype(dtype)

        size = 2
        while size < C:
            put(inverse)
            plgpu.commit_smem()
            half = call.dot((a_s, x_s), (a_low_s, x_s))
            # X holds blocks of `size` tokens alone, so masking A's product with it masks A.
            y_s[...] = jnp.where((apart >= size) & (apart < 2 * size) & (i > j), half, 0.0).astype(dtype)
            plgpu.commit_smem()
            inverse = inverse - call.dot((x_s, y_s), (x_low_s, y_s))
            size *= 2
        put(inverse)
        if both:
            y_s[...] = scores.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, refs[0].at[b, n, h])
        if both:
            other = call.dot((x_s, y_s), (x_low_s, y_s)) * by_row(load(beta_rows_s, ROWS), (C, C))
            a_s[...] = (jnp.where(i == j, 1.0, 0.0) - other).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(a_s, refs[1].at[b, n, h])
        plgpu.wait_smem_to_gmem(0)

    grid = {"h": H, "n": T // C, "b": B}
    return call(body, "delta_rule_inverses", grid, operands, out_type, scratch, 1)


def _forward_walk(call, q, k, v, beta, rows, inverse, state, *, scale, save):
    """Outputs, the final state [B, H, V, K] and, if saved, the states that enter the chunks [B, N, H, V, K] and their r
    [B, N, H, V, C] in v's dtype.

    Args:
      beta: [B, H, N, C]; rows: of `decay_rows`; inverse: R; state: [B, H, V, K] float32.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    N = T // C
    dtype = q.dtype
    blocks = value_blocks(B * H, V)
    wgs = V // blocks // C
    stages = 2 if wgs > 1 else 3
    scratch = {
        "q_s": swizzled((stages, C, K), dtype), "k_s": swizzled((stages, C, K), dtype),
        "v_s": swizzled((stages, wgs, C, C), dtype), "inverse_s": swizzled((stages, C, C), dtype),
        "beta_s": plgpu.SMEM((stages, C), F32),
        "h_s": swizzled((wgs, C, K), dtype), "r_s": swizzled((wgs, C, C), dtype), "o_s": swizzled((wgs, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=4 + wgs + (0 if rows is None else 2), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    operands = [q, k, v, beta, inverse, state]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((stages, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    shape = jax.ShapeDtypeStruct
    out_type = [shape(v.shape, v.dtype), shape((B, H, V, K), F32)]
    if save:
        out_type += [shape((B, N, H, V, K), dtype), shape((B, N, H, V, C), dtype)]

    def body(q_ref, k_ref, v_ref, beta_ref, inverse_ref, state_ref, *refs, q_s, k_s, v_s, inverse_s, beta_s, h_s, r_s, o_s,
             full, empty, done, rows_s=None, columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
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
                of_head = rows_ref.at[b, h if rows.shape[1] > 1 else 0, n]
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(of_head, to.at[slot], bar)

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
            state = call.dot((written.astype(dtype), k_c), init=state)
            scores = times(call.dot((q_c, k_c.T)), weights_between((C, C), of_row, of_column, 0, 0)) * (scale * beta_c)
            o = call.dot((q_c, h_s.at[wg].T)) * scale
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
    return call(body, "delta_rule_forward", grid, operands, out_type, scratch, wgs)


def _backward_walk(call, q, k, do, beta, rows, inverse, d_state, *, scale):
    """The cotangent of the state that enters token 0 [B, H, V, K], mu of every chunk [B, N, H, V, C] and the cotangents of the
    states that leave the chunks [B, N, H, V, K], both in q's dtype.

    Args:
      do: [B, T, H, V]; beta: [B, H, N, C]; rows: of `decay_rows`; inverse: T; d_state: [B, H, V, K] float32, of the final one.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N = T // C
    dtype = q.dtype
    blocks = value_blocks(B * H, V)
    wgs = V // blocks // C
    stages = 2 if wgs > 1 else 3
    scratch = {
        "q_s": swizzled((stages, C, K), dtype), "k_s": swizzled((stages, C, K), dtype),
        "do_s": swizzled((stages, wgs, C, C), dtype), "inverse_s": swizzled((stages, C, C), dtype),
        "beta_s": plgpu.SMEM((stages, C), F32),
        "dh_s": swizzled((wgs, C, K), dtype), "mu_s": swizzled((wgs, C, C), dtype), "p_s": swizzled((wgs, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=4 + wgs + (0 if rows is None else 2), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    operands = [q, k, do, beta, inverse, d_state]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((stages, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    shape = jax.ShapeDtypeStruct
    out_type = [shape((B, H, V, K), F32), shape((B, N, H, V, C), dtype), shape((B, N, H, V, K), dtype)]

    def body(q_ref, k_ref, do_ref, beta_ref, inverse_ref, final_ref, *refs, q_s, k_s, do_s, inverse_s, beta_s, dh_s, mu_s, p_s,
             full, empty, done, rows_s=None, columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        d_state_ref, mu_ref, dh_ref = refs
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
                of_head = rows_ref.at[b, h if rows.shape[1] > 1 else 0, at]
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(of_head, to.at[slot], bar)

        def step(n, slot, dh):
            at = N - 1 - n
            q_c, k_c = q_s.at[slot], k_s.at[slot]
            of_row, of_column = (None, None) if rows is None else (rows_s.at[slot], columns_s.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            low = dh.astype(dtype)
            dh_s.at[wg][...] = low
            scores = times(call.dot((q_c, k_c.T)), weights_between((C, C), of_row, of_column, 0, 0)) * scale
            p_s.at[wg][...] = scores.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dh_s.at[wg], dh_ref.at[b, at, h, mine])
            d_written = call.dot((low, k_c.T))
            if rows is not None:
                d_written = d_written * by_column(product_after(of_column, COLS), (C, C))
            do_c = load(do_s.at[slot, wg].T)
            d_written = call.dot((do_c, p_s.at[wg]), init=d_written)
            mu = call.dot((d_written.astype(dtype), inverse_s.at[slot]))
            mu_s.at[wg][...] = mu.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mu_s.at[wg], mu_ref.at[b, at, h, mine])
            d_read = mu * by_column(-load(beta_s.at[slot], COLS), (C, C))
            d_out = do_c.astype(F32) * scale
            if rows is not None:
                before = by_column(product_before(of_column, COLS), (C, C))
                d_read, d_out = d_read * before, d_out * before
                dh = dh * product_total(of_column)
            dh = call.dot((d_out.astype(dtype), q_c), init=dh)
            return call.dot((d_read.astype(dtype), k_c), init=dh)

        dh = plgpu.load(final_ref.at[b, h, mine], layout=WGMMA, optimized=False)
        dh = walk_chunks(fetch, step, dh, count=jnp.int32(N), wg=wg, wgs=wgs, full=full, empty=empty)
        d_state_ref.at[b, h, mine][...] = dh
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "v": blocks}
    return call(body, "delta_rule_backward_states", grid, operands, out_type, scratch, wgs)


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

        # The value channels are shared out among the tiles of key channels.
        for start in range(0, V, C):
            @pl.when(part == start // C % tiles)
            def _(start=start):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                d_pairs_s[...] = (load(mu_s.at[pl.ds(start, C)].T).astype(F32) * beta_rows).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(d_pairs_s, dv_ref.at[b, tokens, hd, pl.ds(start, C)])

        @pl.when(part == 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dbeta = 0.0
            for start in range(0, V, C):
                values = pl.ds(start, C)
                dbeta = dbeta + jnp.sum(load(mu_s.at[values].T).astype(F32) * load(r_s.at[values].T).astype(F32), axis=1)
            sums_s[...] = dbeta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_s, dbeta_ref.at[b, hd, n])
        plgpu.wait_smem_to_gmem(0)

    grid = {"h": H * tiles, "n": N, "b": B}
    return call(body, "delta_rule_backward", grid, operands, out_type, scratch, 1)


def _gates(beta, log_decay, reset, length):
    """beta [B, H, N, C] and `decay_rows`, of tokens padded to `length`."""
    beta = padded(beta[..., 0], C).swapaxes(1, 2)
    return beta.reshape(*beta.shape[:2], -1, C), decay_rows(log_decay, reset, length, C)


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
    beta, rows = _gates(beta, log_decay, reset, q.shape[1])
    inverse, *transposed = _inverses(call, k, beta, rows, both=save)
    o, final, *saved = _forward_walk(call, q, k, v, beta, rows, inverse, jnp.swapaxes(state, -1, -2), scale=scale, save=save)
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
    beta, rows = _gates(beta, log_decay, reset, q.shape[1])
    h, r, inverse = saved
    d_state, mu, dh = _backward_walk(call, q, k, do, beta, rows, inverse, jnp.swapaxes(d_final, -1, -2), scale=scale)
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
