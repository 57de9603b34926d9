"""A decay for every channel of the keys within a chunk, on TPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from operator import add

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import NN, NT, TILE, Layout, Masks, dot, iota

BEFORE, AFTER, LEVELS = range(3)
QUERIES, KEYS, ROW_KEYS = range(3)
LOG2E = math.log2(math.e)


class Channels:
    """Scores of queries and keys, their gradients, and what the decays up to and after every token leave of them.

    Scores factorise over a binary tree of blocks: the pair (i, j) parts at one block of 2s tokens with i in its right half and
    j in its left, and the exponents are sums of g from j to the end of the left half and from the start of the right half to
    i, never differences: any decay is safe, and no factor that enters row i belongs to a later token.

    A level of the tree is one array z [C, K]: the queries of right halves and the keys of left halves, scaled by the factors
    of their halves. z z^T has the level's scores where i lies right and j left, and the matrix of d_scores and its transpose
    times z has the gradients of both. For the scores of keys with keys, keys stand in the right halves too.

    Halves of 8 tokens and more are whole tiles: a token's factor is that within its tile, the same at all of these levels,
    times one of its tile, from the same tree over the tiles' sums.

    What passes from one step to the next does so through memory (`scratch`), in pieces of a few rows: registers hold a
    piece at a time.
    """

    NEAR = (1, 2, 4)  # levels within a tile

    @staticmethod
    def scratch(layout: Layout, *, keys: bool, backward: bool) -> dict:
        """Memory for `n` heads; `keys` for scores of keys with keys, `backward` for gradients."""
        n, C, K, near = layout.n, layout.C, layout.K, len(Channels.NEAR)
        levels = C.bit_length() - 1

        def precise(*shape):
            return pltpu.VMEM(shape, jnp.float32)

        z, table = pltpu.VMEM((n, levels, C, K), layout.dtype), precise(n * C, C)
        memory = {
            "scaled": precise(n, 3 if keys else 2, C, K), "tiles": precise(n, 1 + levels - near, max(TILE, C // TILE), K),
            "z": z, "table": table,
        }  # fmt: skip
        if keys:
            memory |= {"z_keys": z, "key_table": table}
        if backward:
            memory |= {
                "factor": precise(n, near, C, K), "within": precise(n, 2, C, K), "d_table": precise(n, C, C),
                "d_qk": precise(n, 3 if keys else 2, C, K),
            }  # fmt: skip
        if keys and backward:
            memory["d_key_table"] = precise(n, C, C)
        return memory

    def __init__(self, refs: dict, head: int, n: int, masks: Masks):
        """refs: q, k and g, and what `scratch` says."""
        width = refs["q"].shape[-1] // n
        self.q, self.k, self.g, self.channels = refs["q"], refs["k"], refs["g"], pl.ds(head * width, width)
        self.masks, self.size, self.head = masks, masks.size, head
        names = ("scaled", "tiles", "z", "z_keys", "factor", "within", "d_table", "d_key_table", "d_qk")
        of_head = {name: refs[name].at[head] for name in names if name in refs}
        self.scaled, self.tiles, self.z, self.z_keys = (of_head.get(name) for name in names[:4])
        self.factor, self.within, self.d_table, self.d_key_table, self.d_qk = (of_head.get(name) for name in names[4:])
        # The tables of all heads are one below the other, as a masked store takes slices alone.
        self.tables = [refs[name] for name in ("table", "key_table") if name in refs]

    def scores(self) -> list:
        """q_i k_j^T weighted by the decays between them, for i >= j, and after it k_i k_j^T for i > j, if asked for; leaves
        `total`, the product of all decays, and what the properties and other methods need."""
        self._over_tiles(self._near())
        self._near_scores()
        for slot, s, tiles in self._far():
            self._far_scores(slot, s, tiles)
        return [self._together(table[pl.ds(self.head * self.size, self.size)]) for table in self.tables]

    @property
    def q_reading(self):
        """Queries times the decays up to them [C, K]."""
        return self.masks.reading(self._by_tiles(BEFORE, self.scaled.at[QUERIES]))

    @property
    def k_reading(self):
        """Keys likewise."""
        return self.masks.reading(self._by_tiles(BEFORE, self.scaled.at[ROW_KEYS]))

    @property
    def k_written(self):
        """Keys times the decays after them."""
        return self.masks.written(self._by_tiles(AFTER, self.scaled.at[KEYS]))

    @property
    def before(self):
        """The products of the decays up to every token [C, K]."""
        return self.masks.reading(self._by_tiles(BEFORE, self.within.at[BEFORE]))

    @property
    def after(self):
        """Those of the decays after it."""
        return self.masks.written(self._by_tiles(AFTER, self.within.at[AFTER]))

    def gradients(self, d_scores, d_keys=None):
        """What the cotangents of the scores give queries, keys and, with `d_keys`, the keys of rows; after `scores`.

        Args:
          d_scores: [C, C], for i >= j the cotangent of a score, above the diagonal its mirror image.
          d_keys: likewise for i > j; the diagonal does not count.
        """
        self.d_table[...] = self._together(d_scores)
        if d_keys is not None:
            self.d_key_table[...] = self._together(d_keys)
        self._far_gradients()
        self._near_gradients()
        return [self.d_qk[m] for m in range(self.d_qk.shape[0])]

    def _together(self, scores):
        return scores if self.masks.together is None else jnp.where(self.masks.together, scores, 0)

    def _near(self) -> list:
        """Every level within tiles, in slots 0, 1, 2, and what the others take from tiles; returns the tiles' sums, as
        exponents of 2 and in all rows."""
        width = self.channels.size
        row, found = iota((2, TILE, width), 1), []
        for start in range(0, self.size, 2 * TILE):
            rows = pl.ds(start, 2 * TILE)

            def put(ref, at, x, rows=rows):
                ref[at, rows] = x.reshape(2 * TILE, width).astype(ref.dtype)

            q, k, g = (x[0, rows, self.channels].reshape(2, TILE, width).astype(jnp.float32) for x in (self.q, self.k, self.g))
            before, after = LOG2E * g, jnp.zeros_like(g)
            total = before
            for slot, s in enumerate(self.NEAR):
                right = row // s % 2 == 1
                sums = jnp.where(right, before, after)
                factor = jnp.exp2(sums)
                put(self.z, slot, jnp.where(right, q, k) * factor)
                if self.z_keys is not None:
                    put(self.z_keys, slot, k * factor)
                if self.factor is not None:
                    put(self.factor, slot, factor)
                other = _of_partners(total, s, right)
                total, sums = total + other, sums + other
                before, after = jnp.where(right, sums, before), jnp.where(right, after, sums)
            before, after = jnp.exp2(before), jnp.exp2(after)
            put(self.scaled, QUERIES, q * before)
            put(self.scaled, KEYS, k * after)
            if self.z_keys is not None:
                put(self.scaled, ROW_KEYS, k * before)
            if self.within is not None:
                put(self.within, BEFORE, before)
                put(self.within, AFTER, after)
            found += [total[0], total[1]]
        return found

    def _over_tiles(self, found: list) -> None:
        """The factors of tiles up to each, after it, and at the levels of 16 tokens and more, from their sums; and `total`."""
        row, count = iota(found[0].shape, 0), len(found)
        # A row for every tile, in groups of 8.
        totals = [_rows_of(found[first : first + TILE], row) for first in range(0, count, TILE)]
        before = after = [jnp.zeros_like(x) for x in totals]
        s, at = 1, LEVELS
        while s < count:
            if s < TILE:
                rights = [row // s % 2 == 1] * len(totals)
                others = [_of_partners(x, s, right) for x, right in zip(totals, rights, strict=True)]
            else:
                rights = [group * TILE // s % 2 == 1 for group in range(len(totals))]
                others = [totals[group ^ s // TILE] for group in range(len(totals))]
            sums = [_either(*parts) for parts in zip(rights, before, after, strict=True)]
            if s > 1:
                self._put_tiles(at, sums)
                at += 1
            totals = [x + other for x, other in zip(totals, others, strict=True)]
            sums = [x + other for x, other in zip(sums, others, strict=True)]
            before = [_either(*parts) for parts in zip(rights, sums, before, strict=True)]
            after = [_either(*parts) for parts in zip(rights, after, sums, strict=True)]
            s *= 2
        self._put_tiles(BEFORE, before)
        self._put_tiles(AFTER, after)
        self.total = self.masks.surviving(jnp.exp2(totals[0][:1]))

    def _put_tiles(self, at: int, sums: list) -> None:
        for m, x in enumerate(sums):
            self.tiles[at, pl.ds(m * TILE, TILE)] = jnp.exp2(x)

    def _far(self) -> Iterator[tuple[int, int, int | None]]:
        """Slots, s and the index of the tiles' factors, None for 1, of the levels beyond tiles."""
        slot, s, tiles = len(self.NEAR), TILE, None
        while s < self.size:
            yield slot, s, tiles
            slot, s, tiles = slot + 1, 2 * s, LEVELS if tiles is None else tiles + 1

    def _by_tiles(self, tiles: int | None, x, start: int = 0, rows: int | None = None):
        """Rows of x [C, K], an array or in memory, times the factors of their tiles of that index."""
        rows = rows or self.size
        if tiles is None:
            return x[start : start + rows]
        parts = [x[at : at + TILE] * self.tiles[tiles, pl.ds(at // TILE, 1)] for at in range(start, start + rows, TILE)]
        return _joined(parts)

    def _near_scores(self):
        q, k = self.q[0, :, self.channels], self.k[0, :, self.channels]
        near = [jnp.where(self.masks.apart == 0, dot(q, k, NT), 0)]
        if self.z_keys is not None:
            near.append(jnp.zeros_like(near[0]))
        for slot, s in enumerate(self.NEAR):
            level = self.masks.at_level(s)
            rows = [self.z[slot]] if self.z_keys is None else [self.z[slot], self.z_keys[slot]]
            scores = dot(_joined(rows), self.z[slot], NT)
            near = [jnp.where(level, scores[m * self.size : (m + 1) * self.size], x) for m, x in enumerate(near)]
        for table, x in zip(self.tables, near, strict=True):
            table[pl.ds(self.head * self.size, self.size)] = x

    def _far_scores(self, slot: int, s: int, tiles: int | None):
        """Scores of the pairs that part at blocks of 2s tokens."""
        for start in range(0, self.size, 2 * s):
            block = pl.ds(start, 2 * s)
            left = self._by_tiles(tiles, self.scaled.at[KEYS], start, s)
            right = self._by_tiles(tiles, self.scaled.at[QUERIES], start + s, s)
            self.z[slot, block] = jnp.concatenate([left, right]).astype(self.z.dtype)
            if self.z_keys is not None:
                right = self._by_tiles(tiles, self.scaled.at[ROW_KEYS], start + s, s)
                self.z_keys[slot, block] = jnp.concatenate([left, right]).astype(self.z.dtype)
        rights = [slice(start + s, start + 2 * s) for start in range(0, self.size, 2 * s)]
        rows = [z[slot, right] for z in (self.z, self.z_keys) if z is not None for right in rights]
        parts = dot(_joined(rows), self.z[slot], NT)
        lane = iota((s, self.size), 1)
        for m in range(len(rows)):
            table, right = self.tables[m // len(rights)], rights[m % len(rights)]
            # To the left of the block's left half stand pairs of later levels, which fill them in after this one.
            mask = lane < right.start
            pltpu.store(table.at[pl.ds(self.head * self.size + right.start, s)], parts[m * s : (m + 1) * s], mask=mask)

    def _far_gradients(self):
        """What pairs of different tiles give, without the factors within tiles."""
        for slot, s, tiles in self._far():
            found = [dot(self._level(self.d_table[...], s), self.z[slot], NN)]
            if self.d_key_table is not None:
                found.append(dot(self._level(self.d_key_table[...], s), self.z_keys[slot], NN))
            for start in range(0, self.size, s):
                rows, parts = pl.ds(start, s), [self._by_tiles(tiles, x, start, s) for x in found]
                of_right = dict(zip((QUERIES, ROW_KEYS), parts, strict=False))
                got = of_right if start // s % 2 == 1 else {KEYS: reduce(add, parts)}
                for which in range(self.d_qk.shape[0]):
                    if s == TILE:
                        self.d_qk[which, rows] = got.get(which, jnp.zeros_like(parts[0]))
                    elif which in got:
                        self.d_qk[which, rows] += got[which]

    def _near_gradients(self):
        q, k = self.q[0, :, self.channels], self.k[0, :, self.channels]
        own = jnp.where(self.masks.apart == 0, self.d_table[...], 0).astype(q.dtype)
        dq, dk, d_rows = dot(own, k, NN), dot(own, q, NN), None
        row = iota(dq.shape, 0)
        for slot, s in enumerate(self.NEAR):
            right = row // s % 2 == 1
            d_mixed = self.factor[slot] * dot(self._level(self.d_table[...], s), self.z[slot], NN)
            dq = jnp.where(right, dq + d_mixed, dq)
            if self.d_key_table is not None:
                d_both = self.factor[slot] * dot(self._level(self.d_key_table[...], s), self.z_keys[slot], NN)
                d_mixed = d_mixed + d_both
                d_rows = jnp.zeros_like(dq) if d_rows is None else d_rows
                d_rows = jnp.where(right, d_rows + d_both, d_rows)
            dk = jnp.where(right, dk, dk + d_mixed)
        before, after = self.within[BEFORE], self.within[AFTER]
        self.d_qk[QUERIES] = dq + before * self.d_qk[QUERIES]
        self.d_qk[KEYS] = dk + after * self.d_qk[KEYS]
        if d_rows is not None:
            self.d_qk[ROW_KEYS] = d_rows + before * self.d_qk[ROW_KEYS]

    def _level(self, both, s: int):
        apart = self.masks.apart
        return jnp.where((apart >= s) & (apart < 2 * s), both, 0).astype(self.z.dtype)


def _rows_of(tiles: list, row):
    """[8, K] of which each row is that of another tile, of up to 8."""
    return reduce(lambda x, at: jnp.where(row == at, tiles[at], x), range(1, len(tiles)), tiles[0])


def _either(condition, x, y):
    if isinstance(condition, bool):
        return x if condition else y
    return jnp.where(condition, x, y)


def _of_partners(total, s: int, right):
    """In tiles [.., 8, K] of which blocks of s rows are alike, for every row what the other half of its block of 2s has."""
    axis = total.ndim - 2
    other = pltpu.roll(total, s, axis)
    return other if 2 * s == TILE else jnp.where(right, other, pltpu.roll(total, TILE - s, axis))


def sums_from(x):
    """Sums over the rows of x [C, K] from each on."""
    size, width = x.shape
    sums = total = x.reshape(size // TILE, TILE, width)
    for s in Channels.NEAR:
        right = iota(sums.shape, 1) // s % 2 == 1
        other = _of_partners(total, s, right)
        sums, total = jnp.where(right, sums, sums + other), total + other
    rest, parts = jnp.zeros((TILE, width), x.dtype), []
    for tile in reversed(range(size // TILE)):
        parts.append(sums[tile] + rest)
        rest = rest + total[tile]
    return jnp.concatenate(parts[::-1])


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
