"""The chunked delta rule on Hopper GPUs (Mosaic GPU): S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'),
o_t = scale q_t S_t.

Without decay or with one of every head, in chunks of 64 tokens. With S_ij = E_ij (k_i k_j^T) for i > j, E_ij the product of the
decays between two tokens, and the state h that enters a chunk, its tokens leave unsaid

    r = R (v - before * (k h)),   R = (I + S beta)^-1,

of which beta r is written: o = scale (before * (q h) + P beta r), h <- total h + (after * k)^T beta r, P_ij = E_ij (q_i k_j^T).
With dh, the cotangent of the state that leaves,

    dv = R^T beta (P^T do + (after * k) dh),

and the loss knows beta from its products with the keys that are written alone: with w_j the cotangent of beta_j k_j there,
dbeta_j = k_j w_j. The kernels:

- inverses: every chunk on its own, R, in float16. The inverse doubles its blocks: with X that of the blocks of s tokens and A_s
  the part of A = S beta that joins two of them, X - X A_s X is that of the blocks of 2s. Products skip the blocks of 16 tokens
  that are 0.
- forward: a warpgroup walks a head's chunks in order with 64 value channels of the state, transposed, in registers; so are u
  (what R multiplies), r and what is written, which enter the next product from there. Another one follows with the outputs
  where blocks are few or K is 256. For training it also writes h and r of every chunk. Where keys are alike, what tokens write
  alternates in sign and its rounding shows, so u, R, r and P are float16.
- backward, states: the same walk in reverse with the cotangent of the state, for dv and dh of every chunk; the scores, and R in
  bfloat16, come from another warpgroup.
- backward: every chunk on its own, for dq, dk, dbeta and the flow of the decays, by blocks that go through many with the copies
  of the next one under way.

With a decay of every channel `scores` comes first, every chunk on its own: P and S (float16; P in bfloat16 for the backward), q
and k times their decays, level by level as in `pallas_kernels.linear_attention.gpu`, which training keeps; the walks then have
the chunk's decays alone, and backward goes through the levels. There r is bfloat16, and P and what is written are sums of two
such numbers; the walk itself turns R into bfloat16 in the backward.
Where rows and heads are few, time is split into segments: maps (what each multiplies a state by) and what it adds, by walks of
their own (`maps`, `forward`; in reverse `maps`, `backward_added`), give the states that enter them.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

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
    as_given,
    by_column,
    by_row,
    cumulative_sums,
    decay_rows,
    declines,
    iota,
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

# The first logical axes of every array that `forward` saves.
SAVED_AXES = ("batch", None, "heads")

# Of what a forward makes of its inputs: its rounding is an eighth of bfloat16's. Gradients, of any size, need the wide one.
HALF = jnp.float16
SMALL = 16  # tokens of the smallest blocks that matrix products join
FEWEST = 8  # chunks of a segment of time


def _inverse(call, A, a_s, x_s):
    """(I + A)^-1 of a strictly lower triangular A [C, C], by float16 products.

    Blocks of 16 tokens on the diagonal, which a product of tiles of 16 channels makes all at once, then those of 32 and of 64.
    A product of columns that are 0 outside a block of rows with these rows of another matrix is 0 there too.

    Args:
      A: its blocks of 16 columns, float32.
      a_s, x_s: swizzled memory [C, 16] float16, one for each of them, and two.

    Returns:
      the blocks of 16 columns, float16.
    """
    i, j = iota((C, SMALL), 0), iota((C, SMALL), 1)
    blocks, i = range(C // SMALL), i & (SMALL - 1)
    of_row = iota((C, SMALL), 0) >> SMALL.bit_length() - 1
    zero = plgpu.layout_cast(jnp.zeros((C, SMALL), F32), WGMMA)

    def only(x, block):
        return jnp.where(of_row == block, x, jnp.zeros_like(x))

    def rows(ref, block):
        return ref.at[pl.ds(block * SMALL, SMALL)]

    own = None
    for block, (x, to) in enumerate(zip(A, a_s, strict=True)):
        to[...] = x.astype(HALF)
        own = x if own is None else jnp.where(of_row == block, x, own)
    # The blocks of the diagonal, one below the other.
    inverse = jnp.where(i == j, 1.0, jnp.where(((i ^ j) == 1) & (i > j), -own, 0.0)).astype(HALF)
    for level in range(1, SMALL.bit_length() - 1):
        size, blocks_s = 1 << level, x_s[level % 2]
        blocks_s[...] = inverse
        plgpu.commit_smem()
        half = call.dot(*((only(inverse, n), rows(a_s[n], n)) for n in blocks)).astype(HALF)
        joined = call.dot(*((only(half, n), rows(blocks_s, n)) for n in blocks))
        # X has blocks of `size` tokens alone, so of its product with all of A and itself those parts that join two of them are
        # as with A_s; above the diagonal it is 0.
        inverse = inverse + jnp.where(((i ^ j) & -size) == size, -joined, 0.0).astype(HALF)
    x_s[0][...] = inverse
    plgpu.commit_smem()
    X = [only(inverse, n) for n in blocks]
    halves = call.dots([zero, zero], (X[1], rows(a_s[0], 1)), (X[3], rows(a_s[2], 3)))
    joined = call.dots([zero, zero], *((half.astype(HALF), rows(x_s[0], n)) for half, n in zip(halves, (0, 2), strict=True)))
    X[0], X[2] = X[0] - joined[0].astype(HALF), X[2] - joined[1].astype(HALF)
    x_s[1][...] = X[0]
    plgpu.commit_smem()
    halves = [call.dot((X[2], rows(a_s[n], 2)), (X[3], rows(a_s[n], 3))).astype(HALF) for n in range(2)]
    X[0] = X[0] - call.dot((halves[0], rows(x_s[0], 0)), (halves[1], rows(x_s[1], 1))).astype(HALF)
    X[1] = X[1] - call.dot((halves[1], rows(x_s[0], 1))).astype(HALF)
    return X


def _inverses(call, beta, *, k=None, rows=None, scores=None):
    """R [B, N, H, C, C] float16.

    Where beta |k|^2 <= 2, as it must be lest states explode, entries of R are at most 2; what float16 cannot hold becomes
    infinite.

    Args:
      beta: [B, H, N, C].
      k, rows: k [B, T, H, K], and `decay_rows` or None; or instead
      scores: S [B, N, H, C, C] float16.
    """
    B, H, N, _ = beta.shape
    out_type = [jax.ShapeDtypeStruct((B, N, H, C, C), HALF)]
    blocks = range(C // SMALL)
    scratch = {"a_s": [swizzled((C, SMALL), HALF)] * len(blocks), "x_s": [swizzled((C, SMALL), HALF)] * 2}
    scratch |= {"inverse_s": [swizzled((C, SMALL), HALF)] * len(blocks), "beta_s": plgpu.SMEM((C,), F32)}
    operands = [beta, scores if k is None else k]
    if k is not None:
        scratch["k_s"] = swizzled((C, k.shape[-1]), k.dtype)
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    scratch["full"] = plgpu.Barrier(num_arrivals=1 + (len(blocks) if k is None else 1) + 2 * (rows is not None))

    def body(beta_ref, of_ref, *refs, a_s, x_s, inverse_s, beta_s, full, k_s=None, rows_s=None, columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        h, n, b = (lax.axis_index(name) for name in ("h", "n", "b"))
        columns = [pl.ds(block * SMALL, SMALL) for block in blocks]
        if k is None:
            for to, of_block in zip(a_s, columns, strict=True):
                plgpu.copy_gmem_to_smem(of_ref.at[b, n, h, pl.ds(0, C), of_block], to, full)
        else:
            plgpu.copy_gmem_to_smem(of_ref.at[b, pl.ds(n * C, C), h], k_s, full)
        plgpu.copy_gmem_to_smem(beta_ref.at[b, h, n], beta_s, full)
        if rows is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(rows_ref.at[b, h if rows.shape[1] > 1 else 0, n], to, full)
        plgpu.barrier_wait(full)
        shape, A = (C, SMALL), []
        for block, of_block in zip(blocks, columns, strict=True):
            if k is None:
                S = load(a_s[block]).astype(F32)
            else:
                S = call.dot((k_s, k_s.at[of_block].T))
                S = times(S, weights_between(shape, rows_s, columns_s, 0, block * SMALL))
                S = jnp.where(iota(shape, 0) > iota(shape, 1) + block * SMALL, S, 0.0)
            A.append(S * by_column(load(beta_s.at[of_block], COLS), shape))
        for block, x in enumerate(_inverse(call, A, a_s, x_s)):
            inverse_s[block][...] = x
        plgpu.commit_smem()
        for to, of_block in zip(inverse_s, columns, strict=True):
            plgpu.copy_smem_to_gmem(to, refs[0].at[b, n, h, pl.ds(0, C), of_block])
        plgpu.wait_smem_to_gmem(0)

    # Between a product and the next store to what it reads there is always a commit: that of the other x_s.
    grid = {"b": B, "n": N, "h": H}
    [inverse] = call(body, "delta_rule_inverses", grid, operands, out_type, scratch, 1, barriers=False)
    return inverse


def _prepare_channels(call, q, k, g, start, *, scale, save):
    """What a decay of every channel does within chunks.

    Args:
      q, k: [B, T, H, K]; g, start: of `channels_of`.
      save: also return P in q's dtype.

    Returns:
      scale q and k times the decays up to each token; k times those after it; the decays of whole chunks [B, N, H, K] float32
      as powers of 2; the scores P and S [B, N, H, C, C], float16; P in q's dtype or None.
    """
    B, T, H, K = q.shape
    N, tiles = T // C, range(K // C)
    dtype = q.dtype
    scratch = {name: [swizzled((C, C), dtype)] * len(tiles) for name in ("q_s", "k_s", "k_read_s")}
    scratch |= {name: [swizzled((C, C), HALF)] * len(tiles) for name in ("z_s", "z_keys_s")}
    scratch |= {
        "sum_s": [swizzled((C, C), HALF)] * len(tiles), "total_s": plgpu.SMEM((K,), F32),
        "full": plgpu.Barrier(num_arrivals=2 * len(tiles) + 2 * (start is not None)),
    }  # fmt: skip
    if save:
        scratch["p_s"] = swizzled((C, C), dtype)
    operands = [q, k, g]
    if start is not None:
        operands.append(start)
        scratch |= {"rows_s": plgpu.SMEM((C,), F32), "columns_s": plgpu.SMEM((C,), F32)}
    shape = jax.ShapeDtypeStruct
    out_type = [shape(q.shape, dtype)] * 3 + [shape((B, N, H, K), F32)]
    out_type += [shape((B, N, H, C, C), x) for x in (HALF, HALF, dtype)[: 2 + save]]

    def body(q_ref, k_ref, g_ref, *refs, q_s, k_s, k_read_s, z_s, z_keys_s, sum_s, total_s, full, p_s=None,
             rows_s=None, columns_s=None):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        q_read_ref, k_read_ref, k_write_ref, total_ref, *scores_refs = refs
        h, n, b = (lax.axis_index(name) for name in ("h", "n", "b"))
        tokens = pl.ds(n * C, C)
        columns = [pl.ds(tile * C, C) for tile in tiles]
        for tile in tiles:
            for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, columns[tile]], to[tile], full)
        if start is not None:
            for to in (rows_s, columns_s):
                plgpu.copy_gmem_to_smem(start_ref.at[b, n], to, full)
        levels = Levels(call, HALF)
        for tile in tiles:
            g_c = powers(of_memory(g_ref.at[b, tokens, h, columns[tile]]))
            sum_s[tile][...] = g_c.astype(HALF)
        plgpu.commit_smem()
        plgpu.barrier_wait(full)
        lost = 0.0 if start is None else jnp.where(rows_s[C - 1] < 0, 0.0, -jnp.inf)
        for tile in tiles:
            total_s.at[columns[tile]][...] = of_chunk(sum_s[tile]) + lost
        starts = None if start is None else by_row(load(rows_s, ROWS), (C, C))
        scores = jnp.where(levels.i == levels.j, call.dot(*((q_s[tile], k_s[tile].T) for tile in tiles)), 0.0)
        found = (scores, jnp.zeros_like(scores))

        def level(n, found):
            size = jnp.int32(1) << n
            plgpu.commit_smem()  # the level before has been read
            for tile, factor in zip(tiles, levels.factors(sum_s, size), strict=True):
                q_c, k_c = load(q_s[tile]).astype(HALF), load(k_s[tile]).astype(HALF)
                z_s[tile][...] = levels.mixed(factor, size, q_c, k_c)
                z_keys_s[tile][...] = k_c * factor.astype(HALF)
            plgpu.commit_smem()
            parted = levels.pairs(size)
            products = (call.dot(*((z[tile], z[tile].T) for tile in tiles)) for z in (z_s, z_keys_s))
            return tuple(jnp.where(parted, product, x) for x, product in zip(found, products, strict=True))

        found = lax.fori_loop(0, LEVELS, level, found)
        if start is not None:
            together = starts == by_column(load(columns_s, COLS), (C, C))
            found = [jnp.where(together, x, 0.0) for x in found]
        for tile, before, after in zip(tiles, levels.before(sum_s), levels.after(sum_s), strict=True):
            if start is not None:
                before = jnp.where(starts < 0, before, 0.0)
                after = jnp.where(starts == rows_s[C - 1], after, 0.0)
            q_c, k_c = load(q_s[tile]).astype(F32), load(k_s[tile]).astype(F32)
            q_s[tile][...] = (q_c * (before * scale)).astype(dtype)
            k_read_s[tile][...] = (k_c * before).astype(dtype)
            k_s[tile][...] = (k_c * after).astype(dtype)
            plgpu.commit_smem()
            for x_s, ref in ((q_s[tile], q_read_ref), (k_read_s[tile], k_read_ref), (k_s[tile], k_write_ref)):
                plgpu.copy_smem_to_gmem(x_s, ref.at[b, tokens, h, columns[tile]])
        scores = found[0] * scale
        # What was there has been read: a commit followed.
        memories = (z_keys_s[0], sum_s[0], p_s)[: 2 + save]
        for x, to in zip((scores, found[1], scores), memories, strict=False):
            to[...] = x.astype(to.dtype)
        plgpu.commit_smem()
        for x_s, ref in zip((total_s, *memories), (total_ref, *scores_refs), strict=True):
            plgpu.copy_smem_to_gmem(x_s, ref.at[b, n, h])
        plgpu.wait_smem_to_gmem(0)

    grid = {"b": B, "n": N, "h": H}
    found = call(body, "delta_rule_channels_scores", grid, operands, out_type, scratch, 1, barriers=False, sums=False)
    return found if save else (*found, None)


def _stages(K, wgs, channels):
    """For how many chunks a walk has memory."""
    if K > 2 * C:
        return 2 if channels is None else 1
    return 2 if wgs > 1 or channels is not None else 3


def _forward_walk(call, q, k, v, beta, inverse, states, *, scale, save=False, segments=None, rows=None, channels=None):
    """The states that leave the segments [B, S, H, K, V], outputs and, if saved, the states that enter the chunks
    [B, N, H, V, K] and their r [B, N, H, V, C] in v's dtype.

    Where a block has 64 value channels, one warpgroup walks and another follows, up to a chunk behind, with the outputs. Those
    that walk make them where a block has more, for want of registers, and where memory holds one chunk only.

    Args:
      beta: [B, H, N, C]; inverse: of `_inverses`.
      states: [B, S, H, K, V] float32, entering each of S segments of time.
      segments: or S, for only what each makes of a state, [B, S, H, V + K, K]: the state that leaves it, transposed, after none
        enters (the first after `states` of S = 1), and the matrix that multiplies one that does. What `_entering` does not
        read is not made.
      rows: of `decay_rows`; or for a decay of every channel
      channels: of `_prepare_channels`, k that is written, the decays of chunks and P; then q and k are those that read.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = T // C
    dtype = k.dtype
    maps = segments is not None
    segments = segments or states.shape[1]
    each = -(-N // segments)
    wgs = 1 if maps else warpgroups(B * H * segments, K, V)
    blocks = (V + K if maps else V) // C // wgs
    stages = min(2, _stages(K, wgs, channels)) if maps else _stages(K, wgs, channels)
    follows = wgs == 1 and stages > 1 and not maps
    turns = min(stages, 2)  # chunks that have memory for what only one warpgroup reads
    handed = wgs if not follows else turns if K <= 2 * C else 1  # and for what the outputs take from the walk
    threads = wgs + follows
    scratch = {
        "k_s": swizzled((stages, C, K), dtype), "inverse_s": swizzled((stages, C, C), HALF),
        "beta_s": plgpu.SMEM((stages, C), F32), "v_s": swizzled((wgs * turns, C, C), dtype),
        "full": plgpu.Barrier(num_arrivals=3 + (1 if maps else 2) * (rows is not None) + 2 * (channels is not None),
                              num_barriers=stages),
        "full_v": plgpu.Barrier(num_barriers=wgs * turns), "done": plgpu.Barrier(num_arrivals=threads),
    }  # fmt: skip
    operands = [k, v, beta, inverse, states]
    if rows is not None:
        operands.append(rows)
        scratch["columns_s"] = plgpu.SMEM((stages, rows.shape[3], C), F32)
    elif channels is not None:
        operands += channels[:2]
        scratch |= {"k_write_s": swizzled((stages, C, K), dtype), "total_s": plgpu.SMEM((stages, K), F32)}
    shape = jax.ShapeDtypeStruct
    out_type = [shape((B, segments, H, V + K, K) if maps else (B, segments, H, K, V), F32)]
    if not maps:
        operands += [q] + ([] if channels is None else [channels[2]])
        out_type.append(shape(v.shape, v.dtype))
        scratch |= {
            "q_s": swizzled((turns, C, K), dtype), "h_s": swizzled((handed, C, K), dtype),
            "r_s": swizzled((handed, C, C), HALF if channels is None else dtype), "o_s": swizzled((wgs, C, C), dtype),
            "full_q": plgpu.Barrier(num_arrivals=1 + (channels is not None), num_barriers=turns),
        }  # fmt: skip
        if rows is not None:
            scratch["rows_s"] = plgpu.SMEM((stages, rows.shape[3], C), F32)
        elif channels is not None:
            scratch["p_s"] = swizzled((turns, C, C), HALF)
    if follows:
        scratch |= {name: plgpu.Barrier(num_barriers=handed) for name in ("written", "followed")}
    elif wgs > 1:
        scratch["walked"] = plgpu.Barrier(num_arrivals=wgs, num_barriers=turns)
    if save:
        out_type += [shape((B, N, H, V, K), dtype), shape((B, N, H, V, C), dtype)]
        if channels is None:
            scratch["saved_s"] = swizzled((handed, C, C), dtype)

    def body(k_ref, v_ref, beta_ref, inverse_ref, states_ref, *refs, k_s, v_s, inverse_s, beta_s, full, full_v, done,
             full_q=None, written=None, followed=None, walked=None, q_s=None, h_s=None, r_s=None, saved_s=None, o_s=None,
             rows_s=None, columns_s=None, k_write_s=None, p_s=None, total_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        k_write_ref, total_ref = (refs.pop(0), refs.pop(0)) if channels is not None else (None, None)
        q_ref = None if maps else refs.pop(0)
        p_ref = refs.pop(0) if p_s is not None else None
        final_ref, *refs = refs
        b, h, s, block = (lax.axis_index(name) for name in ("b", "h", "s", "v"))
        wg = lax.axis_index("wg")
        part = jnp.int32(0) if follows else wg
        first = s * each
        count = jnp.maximum(jnp.minimum(first + each, N) - first, 0)
        mine = pl.ds((block * wgs + part) * C, C)
        of_maps = (block * wgs + part) * C >= V
        if maps:
            count = jnp.where((s == segments - 1) | (of_maps & (s == 0)), 0, count)

        def tokens(n):
            return pl.ds((first + n) * C, C)

        def parts(x):
            """x as a sum of two numbers of the dtype."""
            high = x.astype(dtype)
            return high, (x - high.astype(F32)).astype(dtype)

        def fetch(n):
            at, slot = first + n, lax.rem(n, stages)
            bar = full.at[slot]
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens(n), h], k_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, at, h], inverse_s.at[slot], bar)
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, at], beta_s.at[slot], bar)
            if rows is not None:
                of_head = rows_ref.at[b, h if rows.shape[1] > 1 else 0, at]
                for to in (columns_s, rows_s)[: 1 if maps else 2]:
                    plgpu.copy_gmem_to_smem(of_head, to.at[slot], bar)
            elif channels is not None:
                plgpu.copy_gmem_to_smem(k_write_ref.at[b, tokens(n), h], k_write_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(total_ref.at[b, at, h], total_s.at[slot], bar)

        def fetch_queries(n):
            slot = lax.rem(n, turns)
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens(n), h], q_s.at[slot], full_q.at[slot])
            if channels is not None:
                plgpu.copy_gmem_to_smem(p_ref.at[b, first + n, h], p_s.at[slot], full_q.at[slot])

        def fetch_values(n):
            slot = part * turns + lax.rem(n, turns)
            start = (block * wgs + part) * C
            start = jnp.where(start >= V, 0, start) if maps else start
            plgpu.copy_gmem_to_smem(v_ref.at[b, tokens(n), h, pl.ds(start, C)], v_s.at[slot], full_v.at[slot])

        def begin(fetch, most):
            for n in range(most):
                pl.when(n < count)(lambda n=n: fetch(jnp.int32(n)))

        def go_on(fetch, n):
            pl.when(n < count)(lambda: fetch(n))

        def outputs(n, kept):
            """From the state that enters and r, in `kept` of their memory; of a chunk whose keys are there."""
            slot, turn = lax.rem(n, stages), lax.rem(n, turns)
            q_c, of_row = q_s.at[turn], None if rows is None else rows_s.at[slot]
            plgpu.barrier_wait(full_q.at[turn])
            beta_c = by_column(load(beta_s.at[slot], COLS), (C, C))
            if channels is None:
                of_column = None if rows is None else columns_s.at[slot]
                scores = times(call.dot((q_c, k_s.at[slot].T)), weights_between((C, C), of_row, of_column, 0, 0))
                scores = [(scores * (scale * beta_c)).astype(HALF)]
            else:
                scores = parts(load(p_s.at[turn]).astype(F32) * beta_c)
            if follows:
                plgpu.barrier_wait(written.at[kept])
                go_on(fetch, n + stages - 1)  # the walk is past the chunk before this one
            o = call.dot((q_c, h_s.at[kept].T))
            if channels is None:
                o = o * scale
            if rows is not None:
                o = o * by_row(product_before(of_row, ROWS), (C, C))
            o = call.dot(*((x, r_s.at[kept].T) for x in scores), init=o)
            if follows:
                plgpu.barrier_arrive(followed.at[kept])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_s.at[part][...] = o.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[part], refs[0].at[b, tokens(n), h, mine])

        def step(n, state):
            at, slot, turn = first + n, lax.rem(n, stages), lax.rem(n, turns)
            kept, of_values = lax.rem(n, handed) if follows else wg, part * turns + turn
            if not follows:
                @pl.when(wg == 0)
                def _():
                    if wgs > 1:
                        pl.when((n > 0) & (n + turns - 1 < count))(
                            lambda: plgpu.barrier_wait(walked.at[lax.rem(n + turns - 1, turns)])
                        )
                    if not maps:
                        go_on(fetch_queries, n + turns - 1)
                    go_on(fetch, n + stages - 1)
            of_column = None if rows is None else columns_s.at[slot]
            k_c, low = k_s.at[slot], state.astype(dtype)
            if not maps:
                if follows:
                    pl.when(n >= handed)(lambda: plgpu.barrier_wait(followed.at[kept]))
                if save or not follows:
                    plgpu.wait_smem_to_gmem(2 * (handed - 1) if follows else 0, wait_read_only=True)
                h_s.at[kept][...] = low
                if K > 2 * C:  # registers are short
                    plgpu.commit_smem()
                    low = h_s.at[kept]

            def values():
                plgpu.barrier_wait(full_v.at[of_values])
                v_c = load(v_s.at[of_values].T).astype(F32)
                return jnp.where(lax.broadcast(of_maps, v_c.shape), 0.0, v_c) if maps else v_c

            plgpu.barrier_wait(full.at[slot])
            read, v_c = call.dot_while(low, k_c.T, values)
            if rows is not None:
                read = read * by_column(product_before(of_column, COLS), (C, C))
                state = state * product_total(of_column)
            elif channels is not None:
                state = state * by_column(jnp.exp2(load(total_s.at[slot], COLS)), state.shape)
            r = call.dot(((v_c - read).astype(HALF), inverse_s.at[slot].T))
            if not maps:
                r_s.at[kept][...] = r.astype(r_s.dtype)
            if saved_s is not None:
                saved_s.at[kept][...] = r.astype(dtype)
            plgpu.commit_smem()
            if follows:
                plgpu.barrier_arrive(written.at[kept])
            go_on(fetch_values, n + turns)
            if save:
                h_ref, r_ref = refs[1:]
                plgpu.copy_smem_to_gmem(h_s.at[kept], h_ref.at[b, at, h, mine])
                plgpu.copy_smem_to_gmem((saved_s if channels is None else r_s).at[kept], r_ref.at[b, at, h, mine])
            r = r * by_column(load(beta_s.at[slot], COLS), (C, C))
            if rows is not None:
                r = r * by_column(product_after(of_column, COLS), (C, C))
            k_write = k_c if channels is None else k_write_s.at[slot]
            written_c = [r.astype(dtype)] if channels is None else parts(r)
            state = call.dot(*((x, k_write) for x in written_c), init=state)
            if not (maps or follows):
                outputs(n, wg)
            if not follows:
                plgpu.commit_smem()  # what the slot held has been read before the copy engine fills it again
                if wgs > 1:
                    pl.when(n + turns < count)(lambda: plgpu.barrier_arrive(walked.at[turn]))
            return state

        def walk():
            begin(fetch_values, turns)
            if not follows:
                @pl.when(wg == 0)
                def _():
                    begin(fetch, stages - 1)
                    if not maps:
                        begin(fetch_queries, turns - 1)
            if maps:
                start = (block * wgs + wg) * C
                state = load_state(states_ref.at[b, 0, h, pl.ds(0, K), pl.ds(jnp.where(of_maps, 0, start), C)])
                state = jnp.where(lax.broadcast(of_maps | (s > 0), state.shape), 0.0, state)
                # In the rows of values none is on the diagonal.
                state = jnp.where(iota((C, K), 0) + (start - V) == iota((C, K), 1), 1.0, state)
            else:
                state = load_state(states_ref.at[b, s, h, pl.ds(0, K), mine])
            state = lax.fori_loop(0, count, step, state)
            if maps:
                final_ref.at[b, s, h, mine][...] = state
            else:
                store_state(final_ref.at[b, s, h, pl.ds(0, K), mine], state)

        if follows:
            pl.when(wg == 0)(walk)

            @pl.when(wg == 1)
            def _():
                begin(fetch, stages - 1)
                begin(fetch_queries, turns)

                def turn(n, _):
                    plgpu.barrier_wait(full.at[lax.rem(n, stages)])
                    outputs(n, lax.rem(n, handed))
                    go_on(fetch_queries, n + turns)

                lax.fori_loop(0, count, turn, None)
        else:
            walk()
        if not maps:
            plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "s": segments, "v": blocks}
    name = "maps" if maps else "forward"
    name = f"delta_rule_{name}" if channels is None else f"delta_rule_channels_{name}"
    return call(body, name, grid, operands, out_type, scratch, threads)


def _backward_walk(call, q, k, do, beta, inverse, states, *, scale, segments=None, rows=None, channels=None):
    """The cotangents of the states that enter the segments [B, S, H, K, V], dv [B, T, H, V] and the cotangents of the states
    that leave the chunks [B, N, H, V, K], both in q's dtype.

    Where the scores are not there yet, another warpgroup makes them and R in q's dtype, up to a chunk ahead of the walk.

    Args:
      do: [B, T, H, V]; inverse: of `_inverses`.
      states: [B, S, H, K, V] float32, the cotangents of the states that leave segments.
      segments: or S, for only what each adds, [B, S, H, V, K], the last to `states` of S = 1.
      beta, rows, channels: as for `_forward_walk`.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N = T // C
    dtype = q.dtype
    alone = segments is not None
    segments = segments or states.shape[1]
    each = -(-N // segments)
    leads = channels is None
    wgs = 1 if leads else warpgroups(B * H * segments, K, V)
    turns = 2 if leads and K <= 2 * C else wgs  # chunks of scores and of R that have memory, or of each warpgroup one
    threads = wgs + leads
    stages = _stages(K, wgs, channels)
    scratch = {
        "q_s": swizzled((stages, C, K), dtype), "k_s": swizzled((stages, C, K), dtype),
        "do_s": swizzled((stages, wgs, C, C), dtype), "inverse_s": swizzled((stages, C, C), HALF),
        "low_s": swizzled((turns, C, C), dtype),
        "beta_s": plgpu.SMEM((stages, C), F32),
        "full": plgpu.Barrier(num_arrivals=4 + wgs + 2 * (rows is not None) + 3 * (channels is not None), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages), "done": plgpu.Barrier(num_arrivals=threads),
    }  # fmt: skip
    operands = [q, k, do, beta, inverse, states]
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((stages, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}
    if channels is None:
        scratch["p_s"] = swizzled((turns, C, C), dtype)
        scratch |= {name: plgpu.Barrier(num_barriers=turns) for name in ("scored", "used")}
    else:
        operands += channels
        scratch |= {
            "k_write_s": swizzled((stages, C, K), dtype), "p_s": swizzled((stages, C, C), dtype),
            "total_s": plgpu.SMEM((stages, K), F32),
        }  # fmt: skip
    shape = jax.ShapeDtypeStruct
    out_type = [shape((B, segments, H, V, K) if alone else (B, segments, H, K, V), F32)]
    if not alone:
        out_type += [shape(do.shape, dtype), shape((B, N, H, V, K), dtype)]
        scratch |= {"dh_s": swizzled((wgs, C, K), dtype), "dv_s": swizzled((wgs, C, C), dtype)}

    def body(q_ref, k_ref, do_ref, beta_ref, inverse_ref, states_ref, *refs, q_s, k_s, do_s, inverse_s, low_s, beta_s, p_s,
             full, empty, done, scored=None, used=None, dh_s=None, dv_s=None, rows_s=None, columns_s=None, k_write_s=None,
             total_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        k_write_ref, total_ref, p_ref = (refs.pop(0) for _ in range(3)) if channels is not None else (None,) * 3
        d_state_ref, *refs = refs
        b, h, s, block = (lax.axis_index(name) for name in ("b", "h", "s", "v"))
        wg = lax.axis_index("wg")
        part = jnp.int32(0) if leads else wg
        mine = pl.ds((block * wgs + part) * C, C)
        last = jnp.minimum((s + 1) * each, N) - 1
        count = jnp.maximum(last + 1 - s * each, 0)
        if alone:
            count = jnp.where(s == 0, 0, count)  # `_entering` does not read it

        def fetch(n, slot):
            at, bar = last - n, full.at[slot]
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
            elif channels is not None:
                plgpu.copy_gmem_to_smem(k_write_ref.at[b, tokens, h], k_write_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(p_ref.at[b, at, h], p_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(total_ref.at[b, at, h], total_s.at[slot], bar)

        def lead(n, _):
            slot, turn = lax.rem(n, stages), lax.rem(n, turns)
            plgpu.barrier_wait(full.at[slot])
            of_both = (None, None) if rows is None else (rows_s.at[slot], columns_s.at[slot])
            scores = times(call.dot((q_s.at[slot], k_s.at[slot].T)), weights_between((C, C), *of_both, 0, 0)) * scale
            scores = scores.astype(dtype)
            pl.when(n >= turns)(lambda: plgpu.barrier_wait(used.at[turn]))
            p_s.at[turn][...] = scores
            low_s.at[turn][...] = load(inverse_s.at[slot]).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scored.at[turn])

        def step(n, slot, dh):
            at = last - n
            q_c, k_c = q_s.at[slot], k_s.at[slot]
            of_column = None if rows is None else columns_s.at[slot]
            low = dh.astype(dtype)
            if not alone:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dh_s.at[part][...] = low
            if leads:
                k_write, turn = k_c, lax.rem(n, turns)
                scores_s = p_s.at[turn]
            else:
                k_write, turn = k_write_s.at[slot], wg
                scores_s = p_s.at[slot]
                low_s.at[turn][...] = load(inverse_s.at[slot]).astype(dtype)
            plgpu.commit_smem()
            if not alone:
                plgpu.copy_smem_to_gmem(dh_s.at[part], refs[1].at[b, at, h, mine])
                if K > 2 * C:  # registers are short
                    low = dh_s.at[part]
            d_written = call.dot((low, k_write.T))
            if rows is not None:
                d_written = d_written * by_column(product_after(of_column, COLS), (C, C))
            do_c = load(do_s.at[slot, part].T)
            if leads:
                plgpu.barrier_wait(scored.at[turn])
            d_written = call.dot((do_c, scores_s), init=d_written)
            d_written = d_written * by_column(load(beta_s.at[slot], COLS), (C, C))
            dv = call.dot((d_written.astype(dtype), low_s.at[turn]))
            if leads:
                pl.when(n + turns < count)(lambda: plgpu.barrier_arrive(used.at[turn]))
            if not alone:
                dv_s.at[part].T[...] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s.at[part], refs[0].at[b, pl.ds(at * C, C), h, mine])
            d_read = -dv
            d_out = do_c if channels is not None else do_c.astype(F32) * scale
            if rows is not None:
                before = by_column(product_before(of_column, COLS), (C, C))
                d_read, d_out = d_read * before, d_out * before
                dh = dh * product_total(of_column)
            elif channels is not None:
                dh = dh * by_column(jnp.exp2(load(total_s.at[slot], COLS)), dh.shape)
            return call.dot((d_out.astype(dtype), q_c), (d_read.astype(dtype), k_c), init=dh)

        def walk():
            dh = load_state(states_ref.at[b, 0 if alone else s, h, pl.ds(0, K), mine])
            if alone:
                dh = jnp.where(lax.broadcast(s < segments - 1, dh.shape), 0.0, dh)
            dh = walk_chunks(fetch, step, dh, count=count, wg=part, wgs=wgs, full=full, empty=empty)
            if alone:
                d_state_ref.at[b, s, h, mine][...] = dh
            else:
                store_state(d_state_ref.at[b, s, h, pl.ds(0, K), mine], dh)
                plgpu.wait_smem_to_gmem(0)

        if leads:
            pl.when(wg == 0)(walk)
            pl.when(wg == 1)(lambda: lax.fori_loop(0, count, lead, None))
        else:
            walk()
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    grid = {"b": B, "h": H, "s": segments, "v": V // C // wgs}
    name = "backward_added" if alone else "backward_states"
    name = f"delta_rule_{name}" if channels is None else f"delta_rule_channels_{name}"
    return call(body, name, grid, operands, out_type, scratch, threads)


def _segments(walks, V, chunks):
    """Segments of time, so many that walks with few heads fill the chip with a block of 64 value channels each. They double
    the work, so that two gain nothing in the forward and cost time in the backward."""
    most = max(1, min(gpu.SMS // (walks * (V // C)), chunks // FEWEST))
    segments = -(-chunks // -(-chunks // most))  # none is empty
    return segments if segments > 2 else 1


def _entering(added, maps, first, *, reverse=False):
    """The states [B, S, H, K, V] that enter segments.

    Args:
      added: [B, S, H, V, K], what each adds to a transposed state, the first one with what enters it; not read of the last one.
      maps: [B, S, H, K, K], what multiplies a transposed state; not read of the first and the last one.
      first: [B, H, K, V], enters the first segment.
      reverse: from the last segment to the first.
    """
    order = range(maps.shape[1])[:: -1 if reverse else 1]
    entering, state = {order[0]: jnp.swapaxes(first, -1, -2)}, None
    for s, after in pairwise(order):
        through = 0 if state is None else jnp.einsum("bhvk,bhkl->bhvl", state, maps[:, s], precision=lax.Precision.HIGHEST)
        entering[after] = state = added[:, s] + through
    return jnp.swapaxes(jnp.stack([entering[s] for s in range(len(order))], axis=1), -1, -2)


def _products(do_s, dv_s, r_s, h_s, dh_s):
    """Summed over values: cotangents of the scores of pairs, of queries and of keys as readers, and what queries, reading keys
    and written keys have from the states."""
    return (do_s, r_s), (dv_s, r_s), (do_s, h_s), (dv_s, h_s), (r_s.T, dh_s)


def _gradients(call, q, k, do, beta, rows, h, r, dv, dh, *, scale):
    """Gradients of every chunk.

    Blocks, as many as an H100 holds, go through the chunks with the copies of the next one under way. Their two warpgroups
    have 64 of the key channels each (32 where K is 64; K=256 takes two blocks); one makes the cotangents of the queries'
    scores, the other one the keys'.

    Args:
      q, k: [B, T, H, K]; do, dv: [B, T, H, V]; beta: [B, H, N, C]; rows: of `decay_rows`.
      h, dh: [B, N, H, V, K], the states that enter and the cotangents of those that leave; r: [B, N, H, V, C].

    Returns:
      dq, dk; numbers [B, H, N, parts, C] whose sums are dbeta; with rows also, likewise, the flow of the decays, and numbers
      whose sum is what the leaving state and its cotangent have in common.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N, tiles, wgs = T // C, V // C, 2
    width = min(C, K // wgs)  # key channels of a warpgroup
    slots = 2 * C // width  # of 64 value channels, as many as memory holds
    groups = K // width // wgs
    items = B * H * N * groups
    blocks = min(items, gpu.SMS)
    dtype = q.dtype
    names = ("dbeta_s", "flow_s", "common_s")[: 1 if rows is None else 3]
    memory = partial(swizzled, dtype=dtype, columns=width)  # operands of a product are swizzled alike
    # Of one index each, and none that is a number: products cannot take those.
    scratch = {name: memory((2 * wgs, C, width)) for name in ("q_s", "k_s")}
    scratch |= {name: memory((slots * wgs, C, width)) for name in ("h_s", "dh_s")}
    scratch |= {
        "do_s": memory((slots * 2, C, C)), "r_s": memory((slots, C, C)),  # do_s: of do and dv
        "kb_s": memory((wgs, C, width)), "pairs_s": memory((C, C)), "key_pairs_s": memory((C, C)),
        "beta_s": plgpu.SMEM((2 * wgs, C), F32),
        "values": plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        "states": plgpu.Barrier(num_arrivals=2, num_barriers=slots * wgs),
        "tokens": plgpu.Barrier(num_arrivals=3 if rows is None else 5, num_barriers=2 * wgs),
        "read": plgpu.Barrier(num_arrivals=wgs, num_barriers=slots),
        "made": plgpu.Barrier(num_arrivals=wgs), "used": plgpu.Barrier(num_arrivals=wgs),
    }  # fmt: skip
    scratch |= {name: plgpu.SMEM((wgs, C), F32) for name in names}
    operands = [q, k, do, dv, beta, h, r, dh]
    shape = jax.ShapeDtypeStruct
    out_type = [shape(x.shape, dtype) for x in (q, k)] + [shape((B, H, N, K // width, C), F32)] * len(names)
    if rows is not None:
        operands.append(rows)
        scratch |= {name: plgpu.SMEM((2 * wgs, rows.shape[3], C), F32) for name in ("rows_s", "columns_s")}

    def body(q_ref, k_ref, do_ref, dv_ref, beta_ref, h_ref, r_ref, dh_ref, *refs, q_s, k_s, do_s, r_s, h_s, dh_s, kb_s, pairs_s,
             key_pairs_s, beta_s, dbeta_s, values, states, tokens, read, made, used, flow_s=None,
             common_s=None, rows_s=None, columns_s=None):
        refs = list(refs)
        rows_ref = refs.pop(0) if rows is not None else None
        dq_ref, dk_ref, *refs = refs
        wg, first = lax.axis_index("wg"), lax.axis_index("i")
        count = lax.div(items - 1 - first, blocks) + 1

        def split(i, size):
            return (i, 0) if size == 1 else (lax.div(i, size), lax.rem(i, size))

        def place(turn):
            i, group = split(first + turn * blocks, groups)
            i, hd = split(i, H)
            b, n = split(i, N)
            return b, n, hd, group * wgs + wg

        def fetch_tokens(turn):
            b, n, hd, part = place(turn)
            mine = lax.rem(turn, 2) * wgs + wg
            bar = tokens.at[mine]
            for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(n * C, C), hd, pl.ds(part * width, width)], to.at[mine], bar)
            plgpu.copy_gmem_to_smem(beta_ref.at[b, hd, n], beta_s.at[mine], bar)
            if rows is not None:
                for to in (rows_s, columns_s):
                    plgpu.copy_gmem_to_smem(rows_ref.at[b, hd if rows.shape[1] > 1 else 0, n], to.at[mine], bar)

        def fetch_states(step):
            turn, tile = split(step, tiles)
            b, n, hd, part = place(turn)
            mine = lax.rem(step, slots) * wgs + wg
            for ref, to in ((h_ref, h_s), (dh_ref, dh_s)):
                source = ref.at[b, n, hd, pl.ds(tile * C, C), pl.ds(part * width, width)]
                plgpu.copy_gmem_to_smem(source, to.at[mine], states.at[mine])

        def fetch_values(step):
            turn, tile = split(step, tiles)
            b, n, hd, _ = place(turn)
            slot, of_tile = lax.rem(step, slots), pl.ds(tile * C, C)
            for which, ref in enumerate((do_ref, dv_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(n * C, C), hd, of_tile], do_s.at[slot * 2 + which], values.at[slot])
            plgpu.copy_gmem_to_smem(r_ref.at[b, n, hd, of_tile], r_s.at[slot], values.at[slot])

        def sums_of(step, sums, shared):
            slot = lax.rem(step, slots)
            mine = slot * wgs + wg
            plgpu.barrier_wait(states.at[mine])
            h_c, dh_c, r_c, do_c, dv_c = h_s.at[mine], dh_s.at[mine], r_s.at[slot], do_s.at[slot * 2], do_s.at[slot * 2 + 1]
            if rows is not None:
                shared += jnp.sum(load(h_c).astype(F32) * load(dh_c).astype(F32), axis=1)
            plgpu.barrier_wait(values.at[slot])
            sums = call.dots(sums, (do_s.at[slot * 2 + wg], r_c), (do_c, h_c), (dv_c, h_c), (r_c.T, dh_c))
            plgpu.commit_smem()  # the tiles have been read before the copy engine fills them again
            ahead = step + slots

            @pl.when(ahead < count * tiles)
            def _():
                fetch_states(ahead)
                plgpu.barrier_arrive(read.at[slot])

                @pl.when(wg == 0)
                def _():
                    plgpu.barrier_wait(read.at[slot])
                    fetch_values(ahead)

            return sums, shared

        def turn(t, _):
            b, n, hd, part = place(t)
            mine = lax.rem(t, 2) * wgs + wg
            zeros = [plgpu.layout_cast(jnp.zeros((C, n), F32), WGMMA) for n in (C, width, width, width)]
            shared = None if rows is None else plgpu.layout_cast(jnp.zeros((C,), F32), ROWS)
            # A loop where one or two turns could do without: those spill registers.
            carried = lax.fori_loop(0, tiles, lambda j, carried: sums_of(t * tiles + j, *carried), (zeros, shared))
            (scores, dq, dk_read, d_written), shared = carried
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(t + 1 < count)(lambda: fetch_tokens(t + 1))
            plgpu.barrier_wait(tokens.at[mine])
            q_c, k_c, kb_c = q_s.at[mine], k_s.at[mine], kb_s.at[wg]
            of_row, of_column = (None, None) if rows is None else (rows_s.at[mine], columns_s.at[mine])
            beta_c = beta_s.at[mine]
            weights = weights_between((C, C), of_row, of_column, 0, 0)
            i, j = iota((C, C), 0), iota((C, C), 1)
            weights = jnp.where(i >= j + wg, weights, 0.0) * jnp.where(wg == 0, scale, -1.0)
            scores = (scores * weights).astype(dtype)
            pl.when(t > 0)(lambda: plgpu.barrier_wait(used))
            for which, to in enumerate((pairs_s, key_pairs_s)):

                @pl.when(wg == which)
                def _(to=to):
                    to[...] = scores

            # Keys as they are written.
            kb_c[...] = (load(k_c).astype(F32) * by_row(load(beta_c, ROWS), (C, width))).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(made)
            plgpu.barrier_wait(made)
            # What is read twice is loaded twice: the sums leave few registers.
            if rows is not None:
                d_written = d_written * by_row(product_after(of_row, ROWS), (C, width))
                common = jnp.sum(d_written * load(kb_c).astype(F32), axis=1)
                common_s.at[wg][...] = common + product_total(of_column) * shared
            d_written = call.dot((pairs_s.T, q_c), (key_pairs_s.T, k_c), init=d_written)
            before = 1.0 if rows is None else by_row(product_before(of_row, ROWS), (C, width))
            dq = call.dot((pairs_s, kb_c), init=dq * (before * scale))
            flow = None if rows is None else jnp.sum(dq * load(q_c).astype(F32), axis=1)
            q_c[...] = dq.astype(dtype)
            dk_read = call.dot((key_pairs_s, kb_c), init=dk_read * -before)
            pl.when(t + 1 < count)(lambda: plgpu.barrier_arrive(used))
            keys = load(k_c).astype(F32)
            dbeta_s.at[wg][...] = jnp.sum(d_written * keys, axis=1)
            if rows is not None:
                # Of the products as they were rounded: what cancels has to be the same numbers.
                flow_s.at[wg][...] = flow + jnp.sum(dk_read * keys - d_written * load(kb_c).astype(F32), axis=1)
            k_c[...] = (dk_read + d_written * by_row(load(beta_c, ROWS), (C, width))).astype(dtype)
            plgpu.commit_smem()
            for x, ref in ((q_c, dq_ref), (k_c, dk_ref)):
                plgpu.copy_smem_to_gmem(x, ref.at[b, pl.ds(n * C, C), hd, pl.ds(part * width, width)])
            for ref, x in zip(refs, (dbeta_s, flow_s, common_s), strict=False):
                plgpu.copy_smem_to_gmem(x.at[wg], ref.at[b, hd, n, part])

        fetch_tokens(jnp.int32(0))
        for step in range(slots):

            @pl.when(step < count * tiles)
            def _(step=step):
                fetch_states(jnp.int32(step))
                pl.when(wg == 0)(lambda: fetch_values(jnp.int32(step)))

        lax.fori_loop(0, count, turn, None)
        plgpu.wait_smem_to_gmem(0)

    return call(body, "delta_rule_backward", {"i": blocks}, operands, out_type, scratch, wgs)


def _gradients_channels(call, q, k, do, beta, g, start, h, r, dv, dh, *, scale):
    """Gradients of every chunk, by 64 of its key channels, for a decay of every channel.

    Args:
      q, k: [B, T, H, K]; do, dv: [B, T, H, V]; beta: [B, H, N, C]; g, start: of `channels_of`; h, r, dh: as for `_gradients`.

    Returns:
      dq, dk; numbers [B, H, N, K / C, C] whose sums are dbeta; and dg [B, T, H, K] float32.
    """
    B, T, H, K = q.shape
    V = do.shape[-1]
    N, tiles = T // C, K // C
    dtype = q.dtype
    scratch = {name: swizzled((C, C), dtype) for name in ("q_s", "k_s")} | value_tiles(5, V, dtype)
    scratch |= {"common_s": swizzled((C, C), dtype), "sum_s": swizzled((C, C), HALF)}
    scratch["ready"] = plgpu.Barrier(num_arrivals=2)
    operands = [q, k, do, dv, beta, g, h, r, dh]
    shape = jax.ShapeDtypeStruct
    out_type = [shape(x.shape, dtype) for x in (q, k)] + [shape((B, H, N, tiles, C), F32), shape(g.shape, F32)]
    if start is not None:
        operands.append(start)

    def body(q_ref, k_ref, do_ref, dv_ref, beta_ref, g_ref, h_ref, r_ref, dh_ref, *refs, q_s, k_s, tiles_s, sum_s,
             common_s, full, ready):
        refs = list(refs)
        start_ref = refs.pop(0) if start is not None else None
        dq_ref, dk_ref, dbeta_ref, dg_ref = refs
        hd, part = lax.div(lax.axis_index("h"), tiles), lax.rem(lax.axis_index("h"), tiles)
        n, b = lax.axis_index("n"), lax.axis_index("b")
        tokens, keys = pl.ds(n * C, C), pl.ds(part * C, C)

        rows = [of_memory(ref, ROWS) for ref in [beta_ref.at[b, hd, n]] + ([] if start is None else [start_ref.at[b, n]])]

        def fetch():
            for ref, to in ((q_ref, q_s), (k_ref, k_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, hd, keys], to, ready)
            g_c = powers(of_memory(g_ref.at[b, tokens, hd, keys]))
            sum_s[...] = g_c.astype(HALF)

        refs_of_tokens = [ref.at[b, tokens, hd] for ref in (do_ref, dv_ref)]
        refs_of_values = [r_ref.at[b, n, hd], *(ref.at[b, n, hd, pl.ds(0, V), keys] for ref in (h_ref, dh_ref))]
        pairs, key_pairs, dq, dk_read, d_written = over_values(
            call, V, refs_of_tokens, refs_of_values, tiles_s, full, _products, common_s, fetch
        )
        plgpu.barrier_wait(ready)
        levels = Levels(call, dtype)
        i, j = levels.i, levels.j
        z_s, z_keys_s, kb_s, pairs_s, key_pairs_s = tiles_s[0]  # which are free now
        beta_rows = by_row(rows[0], (C, C))
        kb_s[...] = (load(k_s).astype(F32) * beta_rows).astype(dtype)  # keys as they are written
        starts = None
        pairs = jnp.where(i >= j, pairs, 0.0) * scale
        key_pairs = jnp.where(i > j, -key_pairs, 0.0)
        if start is not None:
            starts, last = by_row(rows[1], (C, C)), start_ref[b, n, C - 1]
            together = starts <= j.astype(F32)  # of keys that are not later than the query
            pairs, key_pairs = (jnp.where(together, x, 0.0) for x in (pairs, key_pairs))
        own = by_row(jnp.sum(jnp.where(i == j, pairs, 0.0), axis=1), (C, C))
        # Rows are the later or the earlier token of a pair: the cotangents of its scores, either way round.
        for x, x_s in ((jnp.where(i > j, pairs, 0.0), pairs_s), (key_pairs, key_pairs_s)):
            low = x.astype(dtype)
            z_s[...] = low
            z_keys_s.T[...] = low
            plgpu.commit_smem()
            x_s[...] = load(z_s) + load(z_keys_s)  # one of the two is 0
            plgpu.commit_smem()
        # One after the other: registers are short.
        [before] = levels.before([sum_s])
        if start is not None:
            before = jnp.where(starts < 0, before, 0.0)
        dq = dq * (before * scale) + own * load(kb_s).astype(F32)
        dk_read = dk_read * -before
        [after] = levels.after([sum_s])
        if start is not None:
            after = jnp.where(starts == last, after, 0.0)
        d_written = d_written * after  # keys are written, and read as queries are
        [total] = levels.total([sum_s])
        if start is not None:
            total = total * jnp.where(last < 0, 1.0, 0.0)
        # Numbers whose sums over the rows are what the leaving state and its cotangent have in common.
        common_s[...] = (d_written * load(kb_s).astype(F32) + total * load(common_s).astype(F32)).astype(dtype)
        d_written = d_written + own * load(q_s).astype(F32)

        def level(n, gradients):
            dq, dk_read, d_written = gradients
            size = jnp.int32(1) << n
            levels = Levels(call, dtype, unknown_zero())
            right, partners = levels.right(size), levels.partners(size)
            [factor] = levels.factors([sum_s], size)
            k_c, kb_c = load(k_s), load(kb_s)
            plgpu.commit_smem()  # the level before has been read
            z_s[...] = levels.mixed(factor, size, load(q_s), kb_c)
            z_keys_s[...] = levels.mixed(factor, size, k_c, kb_c)
            plgpu.commit_smem()
            d_mixed = factor * call.dot((load(pairs_s) * partners, z_s))
            dq, d_written = jnp.where(right, dq + d_mixed, dq), jnp.where(right, d_written, d_written + d_mixed)
            d_keys = factor * call.dot((load(key_pairs_s) * partners, z_keys_s))
            return dq, jnp.where(right, dk_read + d_keys, dk_read), jnp.where(right, d_written, d_written + d_keys)

        dq, dk_read, d_written = lax.fori_loop(0, LEVELS, level, (dq, dk_read, d_written))
        k_c = load(k_s).astype(F32)
        dbeta_ref.at[b, hd, n, part][...] = jnp.sum(d_written * k_c, axis=1)
        flow = load(q_s).astype(F32) * dq + k_c * dk_read - load(kb_s).astype(F32) * d_written
        plgpu.commit_smem()
        # Of the flow a token has the sum from it on; what is common is taken off where both are summed.
        z_s[...] = (flow + load(common_s).astype(F32)).astype(dtype)
        q_s[...] = dq.astype(dtype)
        k_s[...] = (dk_read + d_written * beta_rows).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_ref.at[b, tokens, hd, keys])
        plgpu.copy_smem_to_gmem(k_s, dk_ref.at[b, tokens, hd, keys])
        later = jnp.where(i <= j, 1.0, 0.0).astype(dtype)
        dg = call.dot((later, z_s), (1 - later, common_s))
        if start is not None:
            dg = jnp.where(starts == i.astype(F32), 0.0, dg)
        dg_ref.at[b, tokens, hd, keys][...] = dg
        plgpu.wait_smem_to_gmem(0)

    grid = {"b": B, "n": N, "h": H * tiles}
    return call(body, "delta_rule_channels_backward", grid, operands, out_type, scratch, 1, barriers=False, sums=False)


def _gates(beta, length):
    """[B, H, N, C] of tokens padded to `length`."""
    beta = jnp.pad(beta[..., 0], ((0, 0), (0, length - beta.shape[1]), (0, 0))).swapaxes(1, 2)
    return beta.reshape(*beta.shape[:2], -1, C)


def forward(scale, q, k, v, beta, log_decay, reset, state, *, save: bool, interpret=False):
    """Outputs, final state and what `backward` needs.

    Args:
      scale: multiplies q.
      q, k: [B, T, H, K]; v: [B, T, H, V]; bfloat16, to which others are rounded. Scores and v less what states answer
        are float16 numbers, with decays of channels q and k too: below 2e-5 v, scale q k and k k (and q and k) lose digits, and
        from 65504 on they are infinite, and outputs of the chunk NaN.
      beta: [B, T, H, 1], float32.
      log_decay: None, [B, T, H, 1] or [B, T, H, K], float32, <= 0. Factors below exp(-128) count as exp(-128), which is 0.
      reset: None or bool [B, T]: the state that such a token would continue is dropped.
      state: [B, H, K, V] float32, enters token 0.
      save: whether `backward` will be called.
      interpret: run by the interpreter: True, or its `InterpretGPUParams`.

    Returns:
      o [B, T, H, V], bfloat16 numbers in v's dtype; the final state, float32; what `backward` needs, None unless save.
    """
    call, given = Call(interpret), (v,)
    q, k, v = rounded(C, q, k, v)
    beta = _gates(beta, q.shape[1])
    if log_decay is not None and log_decay.shape[-1] > 1:
        gates = channels_of(log_decay, reset, q.shape[1])
        q, k, k_write, total, scores, of_keys, low = _prepare_channels(call, q, k, *gates, scale=scale, save=save)
        inverse, channels = _inverses(call, beta, scores=of_keys), (q, k, k_write, total, low)
        walk = partial(_forward_walk, call, q, k, v, beta, inverse, channels=(k_write, total, scores), scale=scale)
    else:
        rows = decay_rows(log_decay, reset, q.shape[1], C)
        inverse, channels = _inverses(call, beta, k=k, rows=rows), None
        walk = partial(_forward_walk, call, q, k, v, beta, inverse, rows=rows, scale=scale)
    B, H, K, V = state.shape
    states, maps = state[:, None], jnp.zeros((B, 0, H, K, K), F32)
    segments = _segments(B * H, V, q.shape[1] // C)
    if segments > 1:
        [both] = walk(states, segments=segments)
        added, maps = both[..., :V, :], both[..., V:, :]
        states = _entering(added, maps, state)
    final, o, *saved = walk(states, save=save)
    return *as_given(given, o), final[:, -1], (*saved, maps, inverse, channels) if save else None


def backward(scale, q, k, v, beta, log_decay, reset, saved, do, d_final, *, interpret=False):
    """Gradients of `forward`.

    Args:
      scale, q, k, v, beta, log_decay, reset, interpret: as for `forward`; saved: what it returned.
      do: [B, T, H, V], as q, k and v; d_final: [B, H, K, V] float32.

    Returns:
      dq, dk, dv, bfloat16 numbers in the dtypes of q, k, v; dbeta, float32; dlog_decay, float32 or None; the gradient of the
      initial state, float32.
    """
    call, length, given = Call(interpret), q.shape[1], (q, k, v)
    q, k, do = rounded(C, q, k, do)
    beta = _gates(beta, q.shape[1])
    h, r, maps, inverse, channels = saved

    def walked(q, k, **gates):
        walk = partial(_backward_walk, call, q, k, do, beta, inverse, scale=scale, **gates)
        d_states = d_final[:, None]
        if maps.shape[1]:
            [added] = walk(d_states, segments=maps.shape[1])
            d_states = _entering(added, jnp.swapaxes(maps, -1, -2), d_final, reverse=True)
        d_states, dv, dh = walk(d_states)
        return d_states[:, 0], dv, dh

    def of_tokens(x):
        return x.reshape(*x.shape[:2], -1)[..., :length].swapaxes(1, 2)[..., None]

    if log_decay is not None and log_decay.shape[-1] > 1:
        g, start = channels_of(log_decay, reset, q.shape[1])
        q_read, k_read, *channels = channels
        d_state, dv, dh = walked(q_read, k_read, channels=channels)
        dq, dk, dbeta, dg = _gradients_channels(call, q, k, do, beta, g, start, h, r, dv, dh, scale=scale)
        dg = dg[:, :length]
    else:
        rows = decay_rows(log_decay, reset, q.shape[1], C)
        d_state, dv, dh = walked(q, k, rows=rows)
        dq, dk, dbeta, *sums = _gradients(call, q, k, do, beta, rows, h, r, dv, dh, scale=scale)
        dg = None
        if log_decay is not None:
            flow, common = (jnp.sum(x, axis=3) for x in sums)
            dg = of_tokens(cumulative_sums(flow, reverse=True) + jnp.sum(common, -1, keepdims=True))
            if reset is not None:
                dg = jnp.where(reset[..., None, None], 0.0, dg)
    return *as_given(given, dq, dk, dv), of_tokens(jnp.sum(dbeta, axis=3)), dg, d_state
