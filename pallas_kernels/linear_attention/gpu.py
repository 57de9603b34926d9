"""Chunked linear attention on Hopper GPUs (Mosaic GPU): S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.

Without decay or with one of every head, three kernels:

- forward: a warpgroup walks a head's chunks of 64 tokens in order with 64 value channels of the state, transposed, in
  registers, and where blocks are few or K is 256 another one makes the outputs. q, k and v come by the copy engine one to
  three chunks ahead. Scores weighed by exp(b_i - b_j) and the state's part of the output add up in one accumulator. For
  training it also writes the state that enters every second chunk, in bfloat16.
- backward, states: the same walk in reverse with the cotangent of the state.
- backward: every pair of chunks on its own, from the state that enters it and the cotangent of the one that leaves it; two
  warpgroups take 64 tokens each, as queries for dq and as keys for dk and dv.

Where rows and heads are too few to fill the chip, time is split into segments: a first walk finds what each adds to the state,
the states that enter them follow, and a second walk starts from those.

What decays do within chunks comes as rows of sums, 4 bytes a token and head; dg is the reverse sum over a pair of chunks of the
rows of q dq - k dk, plus what the state that leaves and its cotangent have in common.

With a decay of every channel of K, also three:

- scores: every chunk of 64 tokens on its own. Scores factorise over a binary tree of blocks (as in
  `jaxlm.ops.linear_attention`): a level is one array z, the queries of right halves and the keys of left halves, scaled by
  products of decays within their halves, and z z^T holds its scores. Exponents are sums of log decays over ranges, made by
  matrix products with zeros and ones, and never differences: any decay is safe. It writes the scores, and q and k times the
  decays up to and after every token, which training keeps, so that
- forward, and in reverse backward states, walk the chunks without any decay but the chunk's own; in reverse it also makes dv.
- backward: every chunk and 64 of its channels on its own, for dq, dk and dg, level by level as above: the gradient of all
  pairs of a level is one product of their cotangents, either way round, with z.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu
from pallas_kernels.gpu import (
    COLS,
    F32,
    FLOOR,
    ROWS,
    C,
    Call,
    as_given,
    by_column,
    by_row,
    cumulative_sums,
    decay_rows,
    declines,
    divided,
    load,
    load_state,
    of_memory,
    over_values,
    product_after,
    product_before,
    product_total,
    rounded,
    store_state,
    swizzled,
    times,
    value_tiles,
    walk_chunks,
    warpgroups,
    weights_between,
)
from pallas_kernels.gpu_channels import LEVELS, Levels, channels_of, of_chunk, powers, unknown_zero

__all__ = ["SAVED_AXES", "backward", "declines", "forward"]

PAIR = 2 * C  # tokens a chunk of the gradients, and between saved states
FEWEST = 4  # pairs of chunks of a segment of time

# The first logical axes of every array that `forward` saves.
SAVED_AXES = ("batch", None, "heads")


def _walk(call, x, y, rows, state, segments, *, scale, q=None, emit=False, reverse=False):
    """Walk the chunks with the state h [V, K]: h <- total h + (weights y)^T x; forwards with the factors after each token, or
    backwards with those up to it, times the scale. Where a block has 64 value channels, another warpgroup makes the outputs.

    Args:
      x: [B, T, H, K]; y: [B, T, H, V].
      rows: of `decay_rows`, for chunks of C.
      state: [B, S, H, K, V] float32, entering each of S segments of whole pairs of chunks.
      q: also return o = scale q h + P y.
      emit: also return the state at every pair of chunks [B, N / 2, H, V, K] in x's dtype, before it takes part.

    Returns:
      the states that leave the segments, o or None, states or None.
    """
    B, T, H, K = x.shape
    V = y.shape[-1]
    pairs = T // PAIR
    each = -(-pairs // segments)
    wgs = warpgroups(B * H * segments, K, V)
    blocks = V // C // wgs
    stages = 4 if q is None or K + wgs * C < 256 else 3 if K < 256 else 2
    dtype = x.dtype
    follows = q is not None and wgs == 1
    threads = wgs + follows
    out_type = [jax.ShapeDtypeStruct(state.shape, F32)]
    scratch = {
        "x_s": swizzled((stages, C, K), dtype), "y_s": swizzled((stages, wgs, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=1 + wgs + (q is not None) + (0 if rows is None else 1 + (q is not None)),
                              num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=threads, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=threads),
    }  # fmt: skip
    operands = [x, y, state]
    if rows is not None:
        operands.append(rows)
        # Twice: a memory is read in one layout.
        scratch["columns_s"] = plgpu.SMEM((stages, rows.shape[3], C), F32)
        if q is not None:
            scratch["rows_s"] = plgpu.SMEM((stages, rows.shape[3], C), F32)
    if q is not None:
        operands.append(q)
        out_type.append(jax.ShapeDtypeStruct((B, T, H, V), y.dtype))
        scratch |= {"q_s": swizzled((stages, C, K), dtype), "o_s": swizzled((wgs, C, C), y.dtype)}
    if emit:
        out_type.append(jax.ShapeDtypeStruct((B, pairs, H, V, K), dtype))
    if emit or q is not None:
        scratch["h_s"] = swizzled((2 if follows else wgs, C, K), dtype)
    if follows:
        scratch |= {name: plgpu.Barrier(num_barriers=2) for name in ("written", "followed")}

    def body(x_ref, y_ref, state_ref, *refs, x_s, y_s, full, empty, done, written=None, followed=None, columns_s=None,
             rows_s=None, q_s=None, o_s=None, h_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        q_ref = refs.pop(0) if q is not None else None
        final_ref = refs.pop(0)
        o_ref = refs.pop(0) if q is not None else None
        h_ref = refs.pop(0) if emit else None
        b, h, s, block = (lax.axis_index(name) for name in ("b", "h", "s", "v"))
        wg = lax.axis_index("wg")
        first, last = 2 * s * each, 2 * jnp.minimum((s + 1) * each, pairs)
        count = jnp.maximum(last - first, 0)
        part = wg * (wgs - 1)  # one that follows has none of its own
        values = [(block * wgs + i) * C for i in range(wgs)]
        mine = pl.ds((block * wgs + part) * C, C)

        def chunk(n):
            return last - 1 - n if reverse else first + n

        def fetch(n, slot):
            at = chunk(n)
            tokens, bar = pl.ds(at * C, C), full.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, h], x_s.at[slot], bar)
            for i in range(wgs):
                plgpu.copy_gmem_to_smem(y_ref.at[b, tokens, h, pl.ds(values[i], C)], y_s.at[slot, i], bar)
            if rows is not None:
                of_head = rows_ref.at[b, h if rows.shape[1] > 1 else 0, at]
                if q is not None:
                    plgpu.copy_gmem_to_smem(of_head, rows_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(of_head, columns_s.at[slot], bar)
            if q is not None:
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], q_s.at[slot], bar)

        def outputs(n, slot):
            q_c, x_c, y_c = q_s.at[slot], x_s.at[slot], y_s.at[slot, part]
            turn = lax.rem(n, 2)
            of_row, of_column = (None, None) if rows is None else (rows_s.at[slot], columns_s.at[slot])
            scores = times(call.dot((q_c, x_c.T)), weights_between((C, C), of_row, of_column, 0, 0)) * scale
            if follows:
                plgpu.barrier_wait(written.at[turn])
            o = call.dot((q_c, h_s.at[turn if follows else wg].T)) * scale
            if follows:
                pl.when(n + 2 < count)(lambda: plgpu.barrier_arrive(followed.at[turn]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if rows is not None:
                o = o * by_row(product_before(of_row, ROWS), o.shape)
            o = call.dot((scores.astype(dtype), y_c), init=o)
            o_s.at[part][...] = o.astype(o_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[part], o_ref.at[b, pl.ds(chunk(n) * C, C), h, mine])

        def step(n, slot, st):
            x_c, y_c = x_s.at[slot], y_s.at[slot, part]
            if emit or q is not None:
                kept, turn = h_s.at[lax.rem(n, 2) if follows else wg], lax.rem(n, 2)
                if follows:
                    pl.when(n >= 2)(lambda: plgpu.barrier_wait(followed.at[turn]))
                if emit or not follows:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                kept[...] = st.astype(dtype)
                plgpu.commit_smem()
                if follows:
                    plgpu.barrier_arrive(written.at[turn])
            if emit:
                @pl.when(lax.rem(n, 2) == 0)
                def _():
                    plgpu.copy_smem_to_gmem(kept, h_ref.at[b, lax.div(chunk(n), 2), h, mine])
            if q is not None and not follows:
                outputs(n, slot)
            yt = load(y_c.T)
            if rows is not None:
                of_column = columns_s.at[slot]
                weights = product_before(of_column, COLS) * scale if reverse else product_after(of_column, COLS)
                yt = (yt.astype(F32) * by_column(weights, yt.shape)).astype(dtype)
                st = st * product_total(of_column)
            elif reverse:
                yt = (yt.astype(F32) * scale).astype(dtype)
            return call.dot((yt, x_c), init=st)

        go = partial(walk_chunks, fetch, count=count, wg=wg, wgs=threads, full=full, empty=empty)

        def walk():
            st = go(step, load_state(state_ref.at[b, s, h, pl.ds(0, K), mine]))
            store_state(final_ref.at[b, s, h, pl.ds(0, K), mine], st)

        if follows:
            pl.when(wg == 0)(walk)
            pl.when(wg == 1)(lambda: go(lambda n, slot, _: outputs(n, slot), None))
        else:
            walk()
        if emit or q is not None:
            plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "s": segments, "v": blocks}
    names = ("forward", "backward_states") if emit or q is not None else ("states", "backward_added")
    name = f"linear_attention_{names[reverse]}"
    final, *rest = call(body, name, grid, operands, out_type, scratch, threads)
    o = rest.pop(0) if q is not None else None
    return final, o, rest.pop(0) if emit else None


def _gradients(call, q, k, v, do, rows, h, dh, *, scale):
    """Gradients of every pair of chunks from the states that enter it and the cotangents of those that leave it.

    Two warpgroups take 64 tokens each, as queries of dq and as keys of dk and dv. Of more than 128 channels every block of keys
    and of values is taken by itself: all gradients are sums over them.

    Args:
      q, k: [B, T, H, K]; v, do: [B, T, H, V].
      rows: of `decay_rows`, for pairs of chunks.
      h, dh: [B, N, H, V, K].

    Returns:
      dq, dk, dv; with rows also, [B, H, N, 2 C], rowwise sums of q dq - k dk, and numbers whose sum over the last axis is what
      the leaving state and its cotangent have in common.
    """
    B, T, H, _ = q.shape
    K, V = (min(x.shape[-1], 2 * C) for x in (q, v))
    k_blocks, v_blocks = q.shape[-1] // K, v.shape[-1] // V
    dtype = q.dtype
    scratch = {
        # Halves are memories of their own: products are traced as functions, which take no constant index of a memory.
        "q_s": [swizzled((C, K), dtype)] * 2, "k_s": [swizzled((C, K), dtype)] * 2, "v_s": [swizzled((C, V), dtype)] * 2,
        "do_s": [swizzled((C, V), dtype)] * 2, "h_s": swizzled((V, K), dtype), "dh_s": swizzled((V, K), dtype),
        "out_s": swizzled((2, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=10 if rows is None else 12), "done": plgpu.Barrier(num_arrivals=2),
    }  # fmt: skip
    operands = [q, k, v, do, h, dh]
    parts = (v_blocks, v_blocks, k_blocks)
    out_type = [jax.ShapeDtypeStruct((n, *x.shape), dtype) for n, x in zip(parts, (q, k, v), strict=True)]
    if rows is not None:
        operands.append(rows)
        out_type += [jax.ShapeDtypeStruct((k_blocks * v_blocks, B, H, T // PAIR, PAIR), F32)] * 2
        scratch |= {
            "rows_s": plgpu.SMEM((rows.shape[3], PAIR), F32), "columns_s": plgpu.SMEM((rows.shape[3], PAIR), F32),
            "flow_s": plgpu.SMEM((2, C), F32), "common_s": plgpu.SMEM((2, C), F32),
        }  # fmt: skip

    def body(q_ref, k_ref, v_ref, do_ref, h_ref, dh_ref, *refs, q_s, k_s, v_s, do_s, h_s, dh_s, out_s, full, done,
             rows_s=None, columns_s=None, flow_s=None, common_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        dq_ref, dk_ref, dv_ref, *refs = refs
        n, hd, b = (lax.axis_index(name) for name in ("n", "h", "b"))
        wg, part = lax.axis_index("wg"), lax.axis_index("part")
        k_block, v_block = lax.rem(part, k_blocks), lax.div(part, k_blocks)
        keys, values = pl.ds(k_block * K, K), pl.ds(v_block * V, V)

        @pl.when(wg == 0)
        def _():
            for ref, to, channels in ((do_ref, do_s, values), (v_ref, v_s, values), (q_ref, q_s, keys), (k_ref, k_s, keys)):
                for half in range(2):
                    plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(n * PAIR + half * C, C), hd, channels], to[half], full)
            plgpu.copy_gmem_to_smem(h_ref.at[b, n, hd, values, keys], h_s, full)
            plgpu.copy_gmem_to_smem(dh_ref.at[b, n, hd, values, keys], dh_s, full)
            if rows is not None:
                of_head = rows_ref.at[b, hd if rows.shape[1] > 1 else 0, n]
                plgpu.copy_gmem_to_smem(of_head, rows_s, full)
                plgpu.copy_gmem_to_smem(of_head, columns_s, full)

        plgpu.barrier_wait(full)
        blocks = tuple(range(2))

        def send(x, ref, half, sum_of, first):
            for start in range(0, x.shape[1], C):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[half][...] = x[:, start : start + C].astype(dtype)
                plgpu.commit_smem()
                tokens = pl.ds(n * PAIR + half * C, C)
                plgpu.copy_smem_to_gmem(out_s.at[half], ref.at[sum_of, b, tokens, hd, pl.ds(first + start, C)])

        def factor(of, half, shape):
            return None if rows is None else by_row(of(rows_s, ROWS, pl.ds(half * C, C)), shape)

        def weigh(product, queries, keys, transposed):
            weights = weights_between((C, C), rows_s, columns_s, queries * C, keys * C, transposed=transposed)
            return (times(product, weights) * scale).astype(dtype)

        def of(half):
            """The gradients of one half; blocks of pairs of tokens that it takes part in are those on and off the diagonal."""
            flow = None
            dq = times(call.dot((do_s[half], h_s)) * scale, factor(product_before, half, (C, K)))
            for keys in blocks[: half + 1]:
                d_scores = weigh(call.dot((do_s[half], v_s[keys].T)), half, keys, False)
                dq = call.dot((d_scores, k_s[keys]), init=dq)
            if rows is not None:
                flow = jnp.sum(dq * load(q_s[half]).astype(F32), axis=1)
            send(dq, dq_ref, half, v_block, k_block * K)
            dk = times(call.dot((v_s[half], dh_s)), factor(product_after, half, (C, K)))
            if rows is not None:
                own = jnp.sum(dk * load(k_s[half]).astype(F32), axis=1)
                if V == PAIR:
                    mine = pl.ds(half * C, C)
                    both = load(h_s.at[mine]).astype(F32) * load(dh_s.at[mine]).astype(F32)
                    own = own + product_total(columns_s) * jnp.sum(both, axis=1)
                elif half == 0:
                    both = load(h_s).astype(F32) * load(dh_s).astype(F32)
                    own = own + product_total(columns_s) * jnp.sum(both, axis=1)
                common_s.at[half][...] = own
            for queries in blocks[half:]:
                d_scores = weigh(call.dot((v_s[half], do_s[queries].T)), queries, half, True)
                dk = call.dot((d_scores, q_s[queries]), init=dk)
            if rows is not None:
                flow_s.at[half][...] = flow - jnp.sum(dk * load(k_s[half]).astype(F32), axis=1)
            send(dk, dk_ref, half, v_block, k_block * K)
            dv = times(call.dot((k_s[half], dh_s.T)), factor(product_after, half, (C, V)))
            for queries in blocks[half:]:
                scores = weigh(call.dot((k_s[half], q_s[queries].T)), queries, half, True)
                dv = call.dot((scores, do_s[queries]), init=dv)
            send(dv, dv_ref, half, k_block, v_block * V)
            if rows is not None:
                for ref, x in zip(refs, (flow_s, common_s), strict=True):
                    plgpu.copy_smem_to_gmem(x.at[half], ref.at[part, b, hd, n, pl.ds(half * C, C)])
            plgpu.wait_smem_to_gmem(0)

        for half in blocks:
            pl.when(wg == half)(lambda half=half: of(half))
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "n": T // PAIR, "part": k_blocks * v_blocks}
    found = call(body, "linear_attention_backward", grid, operands, out_type, scratch, 2)
    return [x[0] if len(x) == 1 else jnp.sum(x, axis=0, dtype=F32).astype(x.dtype) for x in found]


def _prepare_channels(call, q, k, g, start, *, scale):
    """What a decay of every channel does within chunks.

    Args:
      q, k: [B, T, H, K]; g: [B, T, H, K] float32; start: [B, N, C] as in `decay_rows`, or None.

    Returns:
      scale q times the decays up to each token; k times those after it; the scores [B, N, H, C, C]; and the decays of whole
      chunks [B, N, H, K] float32, as powers of 2.
    """
    B, T, H, K = q.shape
    N, tiles = T // C, range(K // C)
    items = B * N * H
    blocks = min(items, (2 if K <= PAIR else 1) * gpu.SMS)  # as many as registers and memory hold
    dtype = q.dtype
    scratch = {name: [swizzled((C, C), dtype)] * len(tiles) for name in ("q_s", "k_s", "z_s")}
    scratch |= {
        "sum_s": [swizzled((C, C), jnp.float16)] * len(tiles), "g_s": [swizzled((C, C), F32)] * len(tiles),
        "decayed": plgpu.Barrier(num_arrivals=len(tiles)),
        "full": plgpu.Barrier(num_arrivals=2 * len(tiles) + (0 if start is None else 2)),
    }  # fmt: skip
    operands = [q, k, g]
    if start is not None:
        operands.append(start)
        scratch |= {"rows_s": plgpu.SMEM((C,), F32), "columns_s": plgpu.SMEM((C,), F32)}
    shape = jax.ShapeDtypeStruct
    out_type = [shape(q.shape, dtype)] * 2 + [shape((B, N, H, C, C), dtype), shape((B, N, H, K), F32)]

    def body(q_ref, k_ref, g_ref, *refs, q_s, k_s, z_s, sum_s, g_s, decayed, full, rows_s=None, columns_s=None):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        qb_ref, ka_ref, p_ref, total_ref = refs
        first = lax.axis_index("i")
        count = lax.div(items - 1 - first, blocks) + 1
        columns = [pl.ds(tile * C, C) for tile in tiles]

        def place(turn):
            of_row, h = divided(first + turn * blocks, H)
            b, n = divided(of_row, N)
            return b, n, h, pl.ds(n * C, C)

        def fetch_decays(turn):
            b, _, h, tokens = place(turn)
            for tile in tiles:
                plgpu.copy_gmem_to_smem(g_ref.at[b, tokens, h, columns[tile]], g_s[tile], decayed)

        def turn(t, _):
            b, n, h, tokens = place(t)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for tile in tiles:
                for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                    plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, columns[tile]], to[tile], full)
            if start is not None:
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(start_ref.at[b, n], to, full)
            plgpu.barrier_wait(decayed)
            for tile in tiles:
                sum_s[tile][...] = powers(load(g_s[tile])).astype(jnp.float16)
            plgpu.commit_smem()
            pl.when(t + 1 < count)(lambda: fetch_decays(t + 1))
            levels = Levels(call, dtype, unknown_zero())
            plgpu.barrier_wait(full)
            lost = 0.0 if start is None else jnp.where(rows_s[C - 1] < 0, 0.0, -jnp.inf)
            for tile in tiles:
                total_ref.at[b, n, h, columns[tile]][...] = of_chunk(sum_s[tile]) + lost
            scores = jnp.where(levels.i == levels.j, call.dot(*((q_s[tile], k_s[tile].T) for tile in tiles)), 0.0)

            def level(n, scores):
                size = jnp.int32(1) << n
                plgpu.commit_smem()  # the level before has been read
                for tile, factor in zip(tiles, levels.factors(sum_s, size), strict=True):
                    z_s[tile][...] = levels.mixed(factor, size, load(q_s[tile]), load(k_s[tile]))
                plgpu.commit_smem()
                return jnp.where(levels.pairs(size), call.dot(*((z_s[tile], z_s[tile].T) for tile in tiles)), scores)

            # A loop, so that what one level loads is not kept for the next: registers are short.
            scores = lax.fori_loop(0, LEVELS, level, scores) * scale
            starts = None
            if start is not None:
                starts = by_row(load(rows_s, ROWS), (C, C))
                scores = jnp.where(starts == by_column(load(columns_s, COLS), (C, C)), scores, 0.0)
            for tile, before, after in zip(tiles, levels.before(sum_s), levels.after(sum_s), strict=True):
                before = before * scale
                if start is not None:
                    before = jnp.where(starts < 0, before, 0.0)
                    after = jnp.where(starts == rows_s[C - 1], after, 0.0)
                q_s[tile][...] = (load(q_s[tile]).astype(F32) * before).astype(dtype)
                k_s[tile][...] = (load(k_s[tile]).astype(F32) * after).astype(dtype)
            plgpu.commit_smem()
            z_s[0][...] = scores.astype(dtype)
            plgpu.commit_smem()
            for tile in tiles:
                plgpu.copy_smem_to_gmem(q_s[tile], qb_ref.at[b, tokens, h, columns[tile]])
                plgpu.copy_smem_to_gmem(k_s[tile], ka_ref.at[b, tokens, h, columns[tile]])
            plgpu.copy_smem_to_gmem(z_s[0], p_ref.at[b, n, h])

        fetch_decays(jnp.int32(0))
        lax.fori_loop(0, count, turn, None)
        plgpu.wait_smem_to_gmem(0)

    name = "linear_attention_channels_scores"
    return call(body, name, {"i": blocks}, operands, out_type, scratch, 1, barriers=False, sums=False)


def _walk_channels(call, x, y, total, state, segments, *, q=None, scores=None, emit=False, reverse=False):
    """`_walk` for a decay of every channel, whose factors `_prepare_channels` has applied: h <- total h + y^T x.

    Args:
      x: [B, T, H, K]; y: [B, T, H, V]; total: [B, N, H, K], as powers of 2.
      q, scores: also return q h + P y, or in reverse q h + P^T y, with scores P [B, N, H, C, C].
      emit: also return the state at every chunk [B, N, H, V, K] in x's dtype, before it takes part.
    """
    B, T, H, K = x.shape
    V = y.shape[-1]
    chunks = T // C
    each = -(-chunks // segments)
    wgs = warpgroups(B * H * segments, K, V)
    blocks = V // C // wgs
    stages = 3 if K < 256 else 2
    dtype = x.dtype
    outputs = q is not None
    out_type = [jax.ShapeDtypeStruct(state.shape, F32)]
    scratch = {
        "x_s": swizzled((stages, C, K), dtype), "y_s": swizzled((stages, wgs, C, C), dtype),
        "total_s": plgpu.SMEM((stages, K), F32),
        "full": plgpu.Barrier(num_arrivals=2 + wgs + 2 * outputs, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    operands = [x, y, total, state]
    if outputs:
        operands += [q, scores]
        out_type.append(jax.ShapeDtypeStruct((B, T, H, V), y.dtype))
        scratch |= {"q_s": swizzled((stages, C, K), dtype), "p_s": swizzled((stages, C, C), dtype)}
        scratch["o_s"] = swizzled((wgs, C, C), y.dtype)
    if emit:
        out_type.append(jax.ShapeDtypeStruct((B, chunks, H, V, K), dtype))
    if emit or outputs:
        scratch["h_s"] = swizzled((wgs, C, K), dtype)

    def body(x_ref, y_ref, total_ref, state_ref, *refs, x_s, y_s, total_s, full, empty, done, q_s=None, p_s=None, o_s=None,
             h_s=None):
        refs = list(refs)
        q_ref, p_ref = (refs.pop(0), refs.pop(0)) if outputs else (None, None)
        final_ref = refs.pop(0)
        o_ref = refs.pop(0) if outputs else None
        h_ref = refs.pop(0) if emit else None
        b, h, s, block = (lax.axis_index(name) for name in ("b", "h", "s", "v"))
        wg = lax.axis_index("wg")
        first, last = s * each, jnp.minimum((s + 1) * each, chunks)
        count = jnp.maximum(last - first, 0)
        values = [(block * wgs + i) * C for i in range(wgs)]
        mine = pl.ds((block * wgs + wg) * C, C)

        def chunk(n):
            return last - 1 - n if reverse else first + n

        def fetch(n, slot):
            at = chunk(n)
            tokens, bar = pl.ds(at * C, C), full.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, h], x_s.at[slot], bar)
            for i in range(wgs):
                plgpu.copy_gmem_to_smem(y_ref.at[b, tokens, h, pl.ds(values[i], C)], y_s.at[slot, i], bar)
            plgpu.copy_gmem_to_smem(total_ref.at[b, at, h], total_s.at[slot], bar)
            if outputs:
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], q_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(p_ref.at[b, at, h], p_s.at[slot], bar)

        def step(n, slot, st):
            x_c, y_c = x_s.at[slot], y_s.at[slot, wg]
            if emit or outputs:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                h_s.at[wg][...] = st.astype(dtype)
                plgpu.commit_smem()
            if emit:
                plgpu.copy_smem_to_gmem(h_s.at[wg], h_ref.at[b, chunk(n), h, mine])
            if outputs:
                p_c = p_s.at[slot]
                o = call.dot((q_s.at[slot], h_s.at[wg].T), (p_c.T if reverse else p_c, y_c))
                o_s.at[wg][...] = o.astype(o_s.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_s.at[wg], o_ref.at[b, pl.ds(chunk(n) * C, C), h, mine])
            kept = by_column(jnp.exp2(load(total_s.at[slot], COLS)), st.shape)
            return call.dot((y_c.T, x_c), init=st * kept)

        st = load_state(state_ref.at[b, s, h, pl.ds(0, K), mine])
        st = walk_chunks(fetch, step, st, count=count, wg=wg, wgs=wgs, full=full, empty=empty)
        store_state(final_ref.at[b, s, h, pl.ds(0, K), mine], st)
        if emit or outputs:
            plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "s": segments, "v": blocks}
    names = ("forward", "backward_states") if emit or outputs else ("states", "backward_added")
    name = f"linear_attention_channels_{names[reverse]}"
    final, *rest = call(body, name, grid, operands, out_type, scratch, wgs)
    o = rest.pop(0) if outputs else None
    return final, o, rest.pop(0) if emit else None


def _gradients_channels(call, q, k, v, do, g, start, h, dh, *, scale):
    """dq, dk and dg of every chunk and tile of channels, for a decay of every channel.

    Args:
      q, k: [B, T, H, K]; v, do: [B, T, H, V]; g, start: as `_prepare_channels` takes them; h, dh: [B, N, H, V, K].

    Returns:
      dq, dk, and dg [B, T, H, K] float32.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype = q.dtype
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, g)]
    scratch = {name: swizzled((C, C), dtype) for name in ("q_s", "k_s")} | value_tiles(4, V, dtype)
    scratch |= {
        "sum_s": swizzled((C, C), jnp.float16), "common_s": swizzled((C, C), dtype),
        "ready": plgpu.Barrier(num_arrivals=2 + (start is not None)),
    }  # fmt: skip
    operands = [q, k, v, do, g, h, dh]
    if start is not None:
        operands.append(start)
        scratch["columns_s"] = plgpu.SMEM((C,), F32)

    def body(q_ref, k_ref, v_ref, do_ref, g_ref, h_ref, dh_ref, *refs, q_s, k_s, tiles_s, sum_s, common_s, full, ready,
             columns_s=None):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        dq_ref, dk_ref, dg_ref = refs
        hd, n, b = lax.div(lax.axis_index("h"), K // C), lax.axis_index("n"), lax.axis_index("b")
        columns = pl.ds(lax.rem(lax.axis_index("h"), K // C) * C, C)
        tokens = pl.ds(n * C, C)

        def fetch():
            for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, hd, columns], to, ready)
            if start is not None:
                plgpu.copy_gmem_to_smem(start_ref.at[b, n], columns_s, ready)
            g = powers(of_memory(g_ref.at[b, tokens, hd, columns]))
            sum_s[...] = g.astype(jnp.float16)

        def products(do_s, v_s, h_s, dh_s):
            return (do_s, v_s.T), (v_s, do_s.T), (do_s, h_s), (v_s, dh_s)

        pairs, turned, dq_state, dk_later = over_values(
            call, V, [ref.at[b, tokens, hd] for ref in (do_ref, v_ref)],
            [ref.at[b, n, hd, pl.ds(0, V), columns] for ref in (h_ref, dh_ref)], tiles_s, full, products, common_s, fetch,
        )  # fmt: skip
        plgpu.barrier_wait(ready)
        z_s = tiles_s[0][0]  # which is free now
        levels = Levels(call, dtype)
        i, j = levels.i, levels.j
        # Rows are the later or the earlier token of a pair: its cotangent of scores, either way round.
        both = jnp.where(i >= j, pairs, turned) * scale
        starts = None
        if start is not None:
            starts, last = by_row(of_memory(start_ref.at[b, n], ROWS), (C, C)), start_ref[b, n, C - 1]
            both = jnp.where(starts == by_column(load(columns_s, COLS), (C, C)), both, 0.0)
        own = by_row(jnp.sum(jnp.where(i == j, both, 0.0), axis=1), (C, C))
        both = both.astype(dtype)
        # One after the other: registers are short.
        [before] = levels.before([sum_s])
        before = before * scale
        if start is not None:
            before = jnp.where(starts < 0, before, 0.0)
        dq = before * dq_state + own * load(k_s).astype(F32)
        [after] = levels.after([sum_s])
        if start is not None:
            after = jnp.where(starts == last, after, 0.0)
        dk_later = after * dk_later
        [total] = levels.total([sum_s])
        if start is not None:
            total = total * jnp.where(last < 0, 1.0, 0.0)
        # Numbers whose sums over the rows are what the leaving state and its cotangent have in common.
        common_s[...] = (dk_later * load(k_s).astype(F32) + total * load(common_s).astype(F32)).astype(dtype)
        dk = dk_later + own * load(q_s).astype(F32)

        def level(n, gradients):
            dq, dk = gradients
            size = jnp.int32(1) << n
            right = levels.right(size)
            [factor] = levels.factors([sum_s], size)
            plgpu.commit_smem()  # the level before has been read
            z_s[...] = levels.mixed(factor, size, load(q_s), load(k_s))
            plgpu.commit_smem()
            d_mixed = factor * call.dot((both * levels.partners(size), z_s))
            return jnp.where(right, dq + d_mixed, dq), jnp.where(right, dk, dk + d_mixed)

        dq, dk = lax.fori_loop(0, LEVELS, level, (dq, dk))
        flow = load(q_s).astype(F32) * dq - load(k_s).astype(F32) * dk
        q_s[...] = dq.astype(dtype)
        k_s[...] = dk.astype(dtype)
        # Of the flow a token has the sum from it on; what is common is taken off where both are summed.
        plgpu.commit_smem()
        z_s[...] = (flow + load(common_s).astype(F32)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_ref.at[b, tokens, hd, columns])
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[b, tokens, hd, columns])
        later = jnp.where(i <= j, 1.0, 0.0).astype(dtype)
        dg = call.dot((later, z_s), (1 - later, common_s))
        if start is not None:
            dg = jnp.where(starts == i.astype(F32), 0.0, dg)
        dg_ref.at[b, tokens, hd, columns][...] = dg
        plgpu.wait_smem_to_gmem(0)

    grid = {"b": B, "n": T // C, "h": H * (K // C)}
    return call(body, "linear_attention_channels_backward", grid, operands, out_type, scratch, 1, barriers=False, sums=False)


def _segment_decays(log_decay, reset, segments, each):
    """Products of the decays over segments of time [B, S, H or 1, 1 or K], 0 where a document starts."""
    total = jnp.ones((1, 1, 1, 1), F32)
    length = (log_decay if reset is None else reset).shape[1] if log_decay is not None or reset is not None else 0
    pad = segments * each - length

    def split(x):
        return jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))).reshape(x.shape[0], segments, each, *x.shape[2:])

    if log_decay is not None:
        total = jnp.exp(jnp.sum(split(jnp.maximum(log_decay, FLOOR)), axis=2))
    if reset is not None:
        total = jnp.where(jnp.any(split(reset), axis=2)[..., None, None], 0.0, total)
    return total


def _entering(local, decays, state, *, reverse=False):
    """The states that enter segments [B, S, H, K, V], from what each adds and its decay."""
    order = range(local.shape[1])
    order = reversed(order) if reverse else order
    entering = [None] * local.shape[1]
    decays = jnp.broadcast_to(decays, (*decays.shape[:1], local.shape[1], *decays.shape[2:]))
    for s in order:
        entering[s] = state
        state = decays[:, s, :, :, None] * state + local[:, s]
    return jnp.stack(entering, axis=1)


def _segments(walks, V, pairs, *, cheaply):
    """Segments of time, so many that walks with few heads fill the chip. Two take twice half the time, so that they pay only if
    the first walk is cheap beside the second one."""
    most = max(1, min(gpu.SMS // (walks * (V // C)), pairs // FEWEST))
    segments = -(-pairs // -(-pairs // most))  # none is empty
    return 1 if segments == 2 and not cheaply else segments


def _walked(walk, state, decays, shape, unit, *, q=None, emit, reverse=False):
    """A walk from one state [B, H, K, V] over all of time; where there are few heads, in parallel segments of time whose
    entering states a first walk finds.

    Args:
      walk: `_walk` or `_walk_channels` of all but the states, the number of segments, and what follows here.
      decays: of the number of segments and the tokens of one, `_segment_decays`.
      shape: that of v; unit: tokens that a segment is a multiple of.
    """
    B, T, H, V = shape
    # Of decays of channels and in reverse the first walk takes as long as the second one.
    segments = _segments(B * H, V, T // PAIR, cheaply=unit == PAIR and not reverse)
    states = state[:, None]
    if segments > 1:
        zeros = jnp.zeros((B, segments, *state.shape[1:]), F32)
        local, *_ = walk(zeros, segments, reverse=reverse)
        states = _entering(local, decays(segments, -(-T // unit // segments) * unit), state, reverse=reverse)
    final, o, saved = walk(states, segments, q=q, emit=emit, reverse=reverse)
    return final[:, 0 if reverse else -1], o, saved


def _is_vector(log_decay):
    return log_decay is not None and log_decay.shape[-1] > 1


def forward(scale, q, k, v, log_decay, reset, state, *, save, interpret=False):
    """Outputs, final state, and for `backward` if asked the states that enter pairs of chunks.

    Args:
      scale: multiplies q.
      q, k: [B, T, H, K]; v: [B, T, H, V]; bfloat16, to which others are rounded.
      log_decay: [B, T, H, 1 or K] float32, None for no decay. Factors below exp(-128) count as exp(-128), which is 0.
      reset: bool [B, T], drops the state before the token is read; or None.
      state: [B, H, K, V] float32.
      save: whether `backward` will be called.
      interpret: run by the interpreter: True, or its `InterpretGPUParams`.

    Returns:
      o [B, T, H, V], bfloat16 numbers in the dtype of v; the final state, float32; what `backward` needs, None unless save.
    """
    call, given = Call(interpret), (v,)
    q, k, v = rounded(PAIR, q, k, v)
    channels, unit = None, PAIR
    if _is_vector(log_decay):
        channels = _prepare_channels(call, q, k, *channels_of(log_decay, reset, q.shape[1]), scale=scale)
        q, k, scores, total = channels
        walk, unit = partial(_walk_channels, call, k, v, total, scores=scores), C
    else:
        walk = partial(_walk, call, k, v, decay_rows(log_decay, reset, q.shape[1], C), scale=scale)
    decays = partial(_segment_decays, log_decay, reset)
    final, o, states = _walked(walk, state, decays, v.shape, unit, q=q, emit=save)
    return *as_given(given, o), final, (states, channels) if save else None


def backward(scale, q, k, v, log_decay, reset, saved, do, d_final, *, interpret=False):
    """Gradients of `forward`.

    Args:
      scale, q, k, v, log_decay, reset, interpret: as for `forward`; saved: what it returned.
      do: [B, T, H, V], as q, k and v; d_final: [B, H, K, V] float32.

    Returns:
      dq, dk, dv, bfloat16 numbers in the dtypes of q, k, v; d log_decay, float32 (None without); the gradient of the initial
      state, float32.
    """
    call, length, given = Call(interpret), q.shape[1], (q, k, v)
    q, k, v, do = rounded(PAIR, q, k, v, do)
    states, channels = saved
    decays = partial(_segment_decays, log_decay, reset)
    if _is_vector(log_decay):
        g, start = channels_of(log_decay, reset, q.shape[1])
        scaled_q, scaled_k, scores, total = channels
        walk = partial(_walk_channels, call, scaled_q, do, total, scores=scores)
        d_state, dv, d_leaving = _walked(walk, d_final, decays, v.shape, C, q=scaled_k, emit=True, reverse=True)
        dq, dk, dg = _gradients_channels(call, q, k, v, do, g, start, states, d_leaving, scale=scale)
        return *as_given(given, dq, dk, dv), dg[:, :length], d_state
    walk = partial(_walk, call, q, do, decay_rows(log_decay, reset, q.shape[1], C), scale=scale)
    d_state, _, d_leaving = _walked(walk, d_final, decays, v.shape, PAIR, emit=True, reverse=True)
    rows = decay_rows(log_decay, reset, q.shape[1], PAIR)
    dq, dk, dv, *sums = _gradients(call, q, k, v, do, rows, states, d_leaving, scale=scale)
    dg = None
    if log_decay is not None:
        flow, common = sums
        dg = cumulative_sums(flow, reverse=True) + jnp.sum(common, -1, keepdims=True)
        dg = dg.reshape(*dg.shape[:2], -1)[..., :length].swapaxes(1, 2)[..., None]
        if reset is not None:
            dg = jnp.where(reset[..., None, None], 0.0, dg)
    return *as_given(given, dq, dk, dv), dg, d_state
