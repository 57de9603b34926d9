"""What the kernels for Hopper GPUs (Mosaic GPU) share: tiles and layouts, matrix products, and the decays of chunks."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

C = 64  # tokens a chunk of the walks
DIMS = {"K": (64, 128, 256), "V": (64, 128, 256, 512)}
CHIPS = ("H100", "H200", "GH200", "H800", "H20")  # in names of devices, such as "NVIDIA H100 80GB HBM3"
FLOOR = -128.0  # exp(-128) is 0 in float32 and sums of 64 of them are finite, where those of -inf are not
LOG2E = math.log2(math.e)
SMS = 132  # multiprocessors of the chip
# By which jax_default_matmul_precision float32 may be multiplied as bfloat16; None and "default" mean TF32 on these chips.
PRECISIONS = ("bfloat16", "BF16_BF16_F32", "BF16_BF16_BF16")
F32 = jnp.float32

# What kernels take from here where they are traced: a jax without it fails at the import.
NEEDS = (
    "ACC", "Barrier", "CompilerParams", "InterpretGPUParams", "Layout", "SMEM", "SwizzleTransform", "TilingTransform",
    "barrier_arrive", "barrier_wait", "broadcasted_iota", "commit_smem", "copy_gmem_to_smem", "copy_smem_to_gmem",
    "find_swizzle", "kernel", "layout_cast", "load", "wait_smem_to_gmem", "wgmma",
)  # fmt: skip
for name in NEEDS:
    getattr(plgpu, name)

WGMMA = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
ROWS = WGMMA.reduce(1)  # a number for every row of a tile
COLS = WGMMA.reduce(0)  # a number for every column


def declines(*, K: int | None, V: int | None, dtype, chip: str) -> str | None:
    """Why the kernel does not run for such heads on this chip (`jax.Device.device_kind`), or None. What is None is not known
    and rules nothing out. Float32 runs where jax_default_matmul_precision, as it is in force here, is one of `PRECISIONS`."""
    if not any(re.search(rf"\b{name}\b", chip) for name in CHIPS):
        return f"the GPU kernel is made for Hopper ({', '.join(CHIPS)}), not for {chip or 'an unknown chip'}"
    if (K is not None and K not in DIMS["K"]) or (V is not None and V not in DIMS["V"]):
        return f"the GPU kernel has K in {DIMS['K']} and V in {DIMS['V']}, not K={K}, V={V}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the GPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    precision = jax.config.jax_default_matmul_precision
    if jnp.dtype(dtype) == jnp.float32 and precision not in PRECISIONS:
        return (
            f"the GPU kernel multiplies in bfloat16, too coarse for float32 under jax_default_matmul_precision={precision}: "
            'pass bfloat16, or set jax.default_matmul_precision("bfloat16")'
        )
    return None


def swizzled(shape, dtype, columns=None):
    """Shared memory that the copy engine and wgmma read: tiles of 8 rows, swizzled as a memory of so many columns would be."""
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * jnp.dtype(dtype).itemsize * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def by_row(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def by_column(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def divided(i, size):
    """Quotient and remainder."""
    return (i, 0) if size == 1 else (lax.div(i, size), lax.rem(i, size))


def load(ref, layout=WGMMA):
    return plgpu.load(ref, layout=layout)


def of_memory(ref, layout=WGMMA):
    """An array in global memory, read without shared memory on the way."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load_state(ref):
    """Some value channels of a state in global memory [K, C], transposed."""
    return plgpu.layout_cast(plgpu.load(ref.T, layout=TRANSPOSED, optimized=False), WGMMA)


def store_state(ref, state):
    """The reverse of `load_state`."""
    ref.T[...] = plgpu.layout_cast(state, TRANSPOSED)


class Call:
    """A kernel, and matrix products in it that its interpreter can run too."""

    def __init__(self, interpret):
        self.interpret = plgpu.InterpretGPUParams() if interpret is True else interpret or None

    def __call__(self, body, name, grid, operands, out_type, scratch, threads, *, barriers=True, sums=True):
        """Call a kernel.

        Args:
          barriers: without, those of its own have to keep every store to memory away from matrix products, loads of rows by
            other warps and copies that read there.
          sums: without, it has none over the rows of an array, nor memory for that (2 KB).
        """
        names, sizes = zip(*grid.items(), strict=True)
        params = {} if sums else {"reduction_scratch_bytes": 0}
        params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not barriers, **params)
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, grid=sizes, grid_names=names, num_threads=threads, thread_name="wg",
            compiler_params=params, interpret=self.interpret, kernel_name=name,
        )(*operands)  # fmt: skip

    def dot(self, *pairs, init=None):
        """init + the sum of x @ y over pairs; y in shared memory, x there or in registers."""
        shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
        if self.interpret is not None:
            for x, y in pairs:
                if isinstance(x, jax.Array):
                    product = jnp.dot(x, y[...], preferred_element_type=F32)
                else:
                    product = self._fresh([(x, y)], shape)
                init = product if init is None else init + product
            return init
        if init is None:
            return self._fresh(pairs, shape)

        def accumulate(acc):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)

        # Nothing that reads the sum may move ahead of the wait for it.
        return lax.optimization_barrier(pl.run_state(accumulate)(plgpu.ACC.init(init)))

    def dot_while(self, x, y, meanwhile):
        """x @ y as `dot` has it, and what `meanwhile` returns: it is called with the product under way, and may not write what
        that reads."""
        if self.interpret is not None:
            other = meanwhile()
            return self.dot((x, y)), other
        return self._fresh([(x, y)], (x.shape[0], y.shape[1]), meanwhile)

    def dots(self, inits, *pairs):
        """[init + x @ y], one product for every init, under way together; y in shared memory, x there or in registers."""
        if self.interpret is not None:
            return [self.dot(pair, init=init) for init, pair in zip(inits, pairs, strict=True)]

        def accumulate(accs):
            for acc, (x, y) in zip(accs, pairs, strict=True):
                plgpu.wgmma(acc, x, y)

        return list(lax.optimization_barrier(pl.run_state(accumulate)([plgpu.ACC.init(init) for init in inits])))

    def _fresh(self, pairs, shape, meanwhile=None):
        def scoped(acc):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)
            if meanwhile is None:
                return acc[...]
            other = meanwhile()
            return acc[...], other

        product = pl.run_scoped(scoped, plgpu.ACC(shape, F32))
        return product if self.interpret is not None else lax.optimization_barrier(product)


def decay_rows(log_decay, reset, length, chunk):
    """What the decays and documents do within chunks, as rows [B, H, N, 1 or 2, chunk]: sums of log decays up to each token, in
    powers of 2, and with resets where in the chunk its document starts (-1 before it). None without either."""
    if log_decay is None and reset is None:
        return None
    if log_decay is None:
        sums = jnp.zeros((reset.shape[0], 1, length // chunk, chunk), F32)
    else:
        g = jnp.maximum(log_decay[..., 0], FLOOR) * LOG2E
        if reset is not None:
            g = jnp.where(reset[..., None], 0.0, g)  # what a reset drops needs no decay, and sums over it stay small
        g = jnp.pad(g, ((0, 0), (0, length - g.shape[1]), (0, 0))).swapaxes(1, 2).reshape(g.shape[0], g.shape[2], -1, chunk)
        sums = cumulative_sums(g)
    rows = [sums]
    if reset is not None:
        rows.append(jnp.broadcast_to(starts_of(reset, length, chunk).astype(F32), sums.shape))
    return jnp.stack(rows, axis=3)


def cumulative_sums(x, *, reverse=False):
    """Over the last axis up to each number, or in reverse from each on: a matrix product, where XLA's cumulative sum is several
    kernels and its sum of a masked square one that takes eight times as long."""
    ones = jnp.tri(x.shape[-1], dtype=x.dtype)
    return jnp.einsum("...j,ji->...i" if reverse else "...j,ij->...i", x, ones, precision=lax.Precision.HIGHEST)


def starts_of(reset, length, chunk):
    """Where in its chunk the document of every token starts, -1 before it: [B, 1, N, C]; of tokens padded to `length`."""
    inside = jnp.pad(reset, ((0, 0), (0, length - reset.shape[1]))).reshape(reset.shape[0], 1, -1, chunk)
    return lax.cummax(jnp.where(inside, jnp.arange(chunk), -1), axis=3)


SUMS, START = range(2)


def product_before(rows, layout, tokens=slice(None)):
    """Products of the decays from the chunk's start up to each token, 0 for later documents, of its `decay_rows` in memory."""
    before = jnp.exp2(load(rows.at[SUMS, tokens], layout))
    return jnp.where(load(rows.at[START, tokens], layout) < 0, before, 0.0) if rows.shape[0] > START else before


def product_after(rows, layout, tokens=slice(None)):
    """Products of the decays after each token to the chunk's end, 0 for documents that end before it."""
    last = rows.shape[1] - 1
    after = jnp.exp2(rows[SUMS, last] - load(rows.at[SUMS, tokens], layout))
    return jnp.where(load(rows.at[START, tokens], layout) == rows[START, last], after, 0.0) if rows.shape[0] > START else after


def product_total(rows):
    """Product of all decays of the chunk."""
    last = rows.shape[1] - 1
    total = jnp.exp2(rows[SUMS, last])
    return jnp.where(rows[START, last] < 0, total, 0.0) if rows.shape[0] > START else total


def weights_between(shape, rows, columns, queries, keys, *, transposed=False):
    """What weighs the scores of a block of queries with a block of keys: rows are queries, or keys if transposed.

    Args:
      rows, columns: the chunk's `decay_rows` in two shared memories (one memory is read in one layout), or None for no decay.
      queries, keys: where the blocks start in the chunk.
    """
    of_row, of_column = (keys, queries) if transposed else (queries, keys)
    seen = None
    if queries < keys + shape[0 if transposed else 1] - 1:
        i, j = iota(shape, 0) + of_row, iota(shape, 1) + of_column
        seen = (i <= j) if transposed else (i >= j)
    if rows is None:
        return None if seen is None else jnp.where(seen, 1.0, 0.0)

    def both(which):
        row = load(rows.at[which, pl.ds(of_row, shape[0])], ROWS)
        return by_row(row, shape), by_column(load(columns.at[which, pl.ds(of_column, shape[1])], COLS), shape)

    row, column = both(SUMS)
    apart = column - row if transposed else row - column
    if rows.shape[0] > START:
        row, column = both(START)
        seen = (row == column) if seen is None else seen & (row == column)
    return jnp.exp2(apart if seen is None else jnp.where(seen, apart, -jnp.inf))


def times(x, weights):
    return x if weights is None else x * weights


def walk_chunks(fetch, step, state, *, count, wg, wgs, full, empty):
    """Walk `count` chunks in order by all warpgroups, with the copies of the next ones under way.

    Args:
      fetch: of (n, slot) starts the copies of chunk n to a slot of memory, on `full.at[slot]`.
      step: of (n, slot, state) returns the state after chunk n.
      wg, wgs: this warpgroup, of so many.
      full, empty: barriers, one for every slot; every warpgroup arrives on `empty` once it needs a slot no more.
    """
    slots = full.shape[0]

    @pl.when(wg == 0)
    def _():
        for n in range(slots - 1):
            pl.when(n < count)(lambda n=n: fetch(jnp.int32(n), n))

    def turn(n, state):
        slot = lax.rem(n, slots)
        ahead = n + slots - 1

        @pl.when((wg == 0) & (ahead < count))
        def _():
            if wgs > 1:
                @pl.when(n > 0)
                def _():
                    plgpu.barrier_wait(empty.at[lax.rem(ahead, slots)])
            fetch(ahead, lax.rem(ahead, slots))

        plgpu.barrier_wait(full.at[slot])
        state = step(n, slot, state)
        plgpu.commit_smem()  # what the slot held has been read before the copy engine fills it again
        if wgs > 1:
            @pl.when(n + slots < count)
            def _():
                plgpu.barrier_arrive(empty.at[slot])
        return state

    return lax.fori_loop(0, count, turn, state)


def value_tiles(arrays, V, dtype):
    """Memory and barriers for `over_values`: tiles of so many arrays for one or two blocks of 64 value channels."""
    ahead = min(2, V // C)
    return {
        "tiles_s": [[swizzled((C, C), dtype)] * arrays] * ahead,
        "full": plgpu.Barrier(num_arrivals=arrays, num_barriers=ahead),
    }  # fmt: skip


def over_values(call, V, of_tokens, of_values, tiles_s, full, products, common_s, between):
    """Sums over the value channels of a chunk, 64 at a time with the copies of the next ones under way.

    Args:
      of_tokens, of_values: arrays [C, V], and [V, 64], of which the last two are the entering state and the cotangent of the
        leaving one.
      tiles_s, full: of `value_tiles`.
      products: of the tiles of all arrays, pairs (x, y) whose products are summed.
      common_s: memory [64, 64] for the two states' product, of every 64 values added up.
      between: called once the first copies are under way.

    Returns:
      the sums of the products.
    """
    ahead = len(tiles_s)

    def fetch(tile, slot):
        values = pl.ds(tile * C, C)
        refs = [ref.at[pl.ds(0, C), values] for ref in of_tokens] + [ref.at[values] for ref in of_values]
        for ref, to in zip(refs, tiles_s[slot], strict=True):
            plgpu.copy_gmem_to_smem(ref, to, full.at[slot])

    for slot in range(ahead):
        fetch(slot, slot)
    between()

    def turn(n, sums):
        common = None if sums is None else load(common_s).astype(F32)
        for slot, (*_, h_s, dh_s) in enumerate(tiles_s):
            plgpu.barrier_wait(full.at[slot])
            both = load(h_s).astype(F32) * load(dh_s).astype(F32)
            common = both if common is None else common + both
        common_s[...] = common.astype(common_s.dtype)
        for slot, tiles in enumerate(tiles_s):
            pairs = products(*tiles)
            sums = call.dots(sums or [plgpu.layout_cast(jnp.zeros((C, C), F32), WGMMA)] * len(pairs), *pairs)
            plgpu.commit_smem()  # the tiles have been read before the copy engine fills them again
            pl.when((n + 1) * ahead + slot < V // C)(lambda slot=slot: fetch((n + 1) * ahead + slot, slot))
        return sums

    # The first ones before the loop: sums that are not there yet take no registers from what is common.
    first = turn(jnp.int32(0), None)
    return first if ahead == V // C else lax.fori_loop(1, V // C // ahead, turn, first)


def rounded(unit, *arrays):
    """Arrays [B, T, ...] as the kernels multiply them: in bfloat16, with zeros up to a multiple of `unit` tokens."""
    return [jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, -x.shape[1] % unit), *[(0, 0)] * (x.ndim - 2))) for x in arrays]


def as_given(given, *arrays):
    """What kernels made of `rounded` arrays, as those that were given: in their dtypes, without the padding."""

    def back(x, like):
        x = x[:, : like.shape[1]]
        # XLA would leave out a rounding that is taken back, of sums that kernels left to it.
        return x if x.dtype == like.dtype else lax.reduce_precision(x.astype(F32), 8, 7).astype(like.dtype)

    return [back(x, like) for x, like in zip(arrays, given, strict=True)]


def warpgroups(walks, K, V):
    """Of how many warpgroups, each with 64 value channels, a block of a walk is: two read its queries and keys once, one leaves
    more blocks to fill the chip, and memory for more key channels."""
    return 2 if K <= 128 and V % (2 * C) == 0 and walks * V // (2 * C) >= SMS else 1
