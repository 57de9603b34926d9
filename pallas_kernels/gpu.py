"""What the kernels for Hopper GPUs (Mosaic GPU) share: tiles and layouts, matrix products, and the decays of chunks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

C = 64  # tokens a chunk of the walks
DIMS = (64, 128)
CHIPS = ("H100", "H200", "H800", "H20")
FLOOR = -128.0  # exp(-128) is 0 in float32 and sums of 64 of them are finite, where those of -inf are not
LOG2E = math.log2(math.e)
SMS = 132  # multiprocessors of the chip
F32 = jnp.float32

WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # a number for every row of a tile
COLS = WGMMA.reduce(0)  # a number for every column


def declines(*, H: int | None, K: int | None, V: int | None, dtype, decay: str | None, chip: str) -> str | None:
    """Why the kernel does not run for these heads on this chip (`jax.Device.device_kind`), or None. What is None is not known
    and rules nothing out."""
    if not any(name in chip for name in CHIPS):
        return f"the GPU kernel is made for Hopper ({', '.join(CHIPS)}), not for {chip or 'an unknown chip'}"
    if any(x is not None and x not in DIMS for x in (K, V)):
        return f"the GPU kernel has K and V in {DIMS}, not K={K}, V={V}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the GPU kernel takes bfloat16, not {jnp.dtype(dtype).name}"
    return None


def swizzled(shape, dtype):
    """Shared memory that the copy engine and wgmma read: tiles of 8 rows, swizzled."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def by_row(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def by_column(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def load(ref, layout=WGMMA):
    return plgpu.load(ref, layout=layout)


class Call:
    """A kernel, and matrix products in it that its interpreter can run too."""

    def __init__(self, interpret):
        self.interpret = plgpu.InterpretGPUParams() if interpret is True else interpret or None

    def __call__(self, body, name, grid, operands, out_type, scratch, threads):
        names, sizes = zip(*grid.items(), strict=True)
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, grid=sizes, grid_names=names, num_threads=threads, thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True), interpret=self.interpret, kernel_name=name,
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

    def _fresh(self, pairs, shape):
        def scoped(acc):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)
            return acc[...]

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
        # Quadratic and one kernel, where a cumulative sum is several.
        sums = jnp.sum(jnp.where(jnp.tri(chunk, dtype=bool), g[..., None, :], 0.0), axis=-1)
    rows = [sums]
    if reset is not None:
        rows.append(jnp.broadcast_to(starts_of(reset, length, chunk).astype(F32), sums.shape))
    return jnp.stack(rows, axis=3)


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
    if queries == keys:
        i, j = iota(shape, 0), iota(shape, 1)
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


def padded(x, unit):
    """x [B, T, ...] with zeros up to a multiple of `unit` tokens."""
    return None if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % unit), *[(0, 0)] * (x.ndim - 2)))


def value_blocks(walks, V):
    """Into how many blocks to split the value channels, so that there are enough walks for the chip."""
    return 1 if V == C or walks >= SMS else V // C
