"""A decay for every channel of the keys within a chunk, on TPUs."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import NN, NT, Layout, Masks, dot, iota, scaled

BEFORE, AFTER = 0, 1


class Channels:
    """Scores of queries and keys, their gradients, and the products of decays up to and after every token.

    Scores factorise over a binary tree of blocks: the pair (i, j) parts at one block of 2s tokens with i in its right half and
    j in its left, and the exponents are sums of g from j to the end of the left half and from the start of the right half to
    i, never differences: any decay is safe, and no factor that enters row i belongs to a later token.

    A level of the tree is one array z [C, K]: the queries of right halves and the keys of left halves, scaled by the factors
    of their halves. z z^T has the level's scores where i lies right and j left, and the matrix of d_scores and its transpose
    times z has the gradients of both. For the scores of keys with keys, keys stand in the right halves too.

    What passes from one step to the next does so through memory (`scratch`), in pieces of a few rows: registers hold a
    piece at a time.
    """

    NEAR = (1, 2, 4)  # levels within 8 tokens, a tile of registers

    @staticmethod
    def scratch(layout: Layout, *, keys: bool, backward: bool) -> dict:
        """Memory for `n` heads; `keys` for scores of keys with keys, `backward` for gradients."""
        levels = layout.C.bit_length() - 1
        tokens = (layout.n, levels, layout.C, layout.K)
        table = pltpu.VMEM((layout.n * layout.C, layout.C), jnp.float32)
        memory = {
            "sums": pltpu.VMEM((layout.n, levels - 2, 2, layout.C, layout.K), jnp.float32),
            "z": pltpu.VMEM(tokens, layout.dtype), "table": table,
        }  # fmt: skip
        if keys:
            memory |= {"z_keys": pltpu.VMEM(tokens, layout.dtype), "key_table": table}
        if backward:
            d_table = pltpu.VMEM((layout.n, layout.C, layout.C), jnp.float32)
            memory |= {
                "factor": pltpu.VMEM(tokens, jnp.float32), "d_table": d_table,
                "d_qk": pltpu.VMEM((layout.n, 3 if keys else 2, layout.C, layout.K), jnp.float32),
            }  # fmt: skip
        if keys and backward:
            memory["d_key_table"] = d_table
        return memory

    def __init__(self, refs: dict, head: int, n: int, masks: Masks):
        """refs: q, k and g, and what `scratch` says."""
        width = refs["q"].shape[-1] // n
        self.q, self.k, self.g, self.channels = refs["q"], refs["k"], refs["g"], pl.ds(head * width, width)
        self.masks, self.size, self.head = masks, masks.size, head
        names = ("sums", "z", "z_keys", "factor", "d_table", "d_key_table", "d_qk")
        of_head = {name: refs[name].at[head] for name in names if name in refs}
        self.sums, self.z, self.z_keys = of_head["sums"], of_head["z"], of_head.get("z_keys")
        self.factor, self.d_table, self.d_qk = (of_head.get(name) for name in ("factor", "d_table", "d_qk"))
        self.d_key_table = of_head.get("d_key_table")
        # The tables of all heads are one below the other, as a masked store takes slices alone.
        self.tables = [refs[name] for name in ("table", "key_table") if name in refs]

    def scores(self) -> list:
        """q_i k_j^T weighted by the decays between them, for i >= j, and after it k_i k_j^T for i > j, if asked for; leaves
        `before`, `after` and `total`."""
        self._near()
        self._near_scores()
        for s, slot in self._far():
            self._far_scores(s, slot)
        return [self._together(table[pl.ds(self.head * self.size, self.size)]) for table in self.tables]

    def gradients(self, d_scores, d_keys=None):
        """What the cotangents of the scores give queries, keys and, with `d_keys`, the keys of rows; after `scores`.

        Args:
          d_scores: [C, C], for i >= j the cotangent of a score, above the diagonal its mirror image.
          d_keys: likewise for i > j; the diagonal does not count.
        """
        self.d_table[...] = self._together(d_scores)
        if d_keys is not None:
            self.d_key_table[...] = self._together(d_keys)
        self._near_gradients()
        slot, s = len(self.NEAR), 8
        while s < self.size:
            for start in range(0, self.size, 2 * s):
                left, right, block = pl.ds(start, s), pl.ds(start + s, s), pl.ds(start, 2 * s)
                apart = self.masks.apart[start : start + 2 * s]
                factor = self.factor[slot, block]
                d_mixed = factor * dot(self._level(self.d_table[block], apart, s), self.z[slot], NN)
                self.d_qk[0, right] += d_mixed[s:]
                if d_keys is not None:
                    d_both = factor * dot(self._level(self.d_key_table[block], apart, s), self.z_keys[slot], NN)
                    self.d_qk[1, left] += d_mixed[:s] + d_both[:s]
                    self.d_qk[2, right] += d_both[s:]
                else:
                    self.d_qk[1, left] += d_mixed[:s]
            s, slot = 2 * s, slot + 1
        return [self.d_qk[m] for m in range(self.d_qk.shape[0])]

    def read(self, q, h):
        """What the entering state [V, K] says to q, without the scale; after `scores`."""
        return dot(scaled(q, self.before), h, NT)

    def _together(self, scores):
        return scores if self.masks.together is None else jnp.where(self.masks.together, scores, 0)

    def _set(self, slot: int, rows, mixed, keys, sums):
        factor = jnp.exp(sums)
        self.z[slot, rows] = (mixed * factor).astype(self.z.dtype)
        if self.z_keys is not None:
            self.z_keys[slot, rows] = (keys * factor).astype(self.z.dtype)
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
                self._set(slot, rows, *(x.reshape(16, width) for x in (mixed, k, sums)))
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
                left, right = self.k[0, pl.ds(start, s), self.channels], self.q[0, pl.ds(middle, s), self.channels]
                keys = None if self.z_keys is None else self.k[0, pl.ds(start, 2 * s), self.channels]
                sums = jnp.concatenate(read(AFTER, start, middle) + read(BEFORE, middle, stop))
                self._set(slot, pl.ds(start, 2 * s), jnp.concatenate([left, right]), keys, sums)
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

    def _far_scores(self, s: int, slot: int):
        """Scores of the pairs that part at blocks of 2s tokens."""
        rights = [slice(start + s, start + 2 * s) for start in range(0, self.size, 2 * s)]
        rows = [z[slot, right] for z in (self.z, self.z_keys) if z is not None for right in rights]
        parts = dot(_joined(rows), self.z[slot], NT)
        lane = iota((s, self.size), 1)
        for m in range(len(rows)):
            table, right = self.tables[m // len(rights)], rights[m % len(rights)]
            # To the left of the block's left half stand pairs of later levels, which fill them in after this one.
            mask = lane < right.start
            pltpu.store(table.at[pl.ds(self.head * self.size + right.start, s)], parts[m * s : (m + 1) * s], mask=mask)

    def _near_gradients(self):
        q, k = self.q[0, :, self.channels], self.k[0, :, self.channels]
        own = jnp.where(self.masks.apart == 0, self.d_table[...], 0).astype(q.dtype)
        dq, dk, d_rows = dot(own, k, NN), dot(own, q, NN), None
        row = iota(dq.shape, 0)
        for slot, s in enumerate(self.NEAR):
            right = row // s % 2 == 1
            d_mixed = self.factor[slot] * dot(self._level(self.d_table[...], self.masks.apart, s), self.z[slot], NN)
            dq = jnp.where(right, dq + d_mixed, dq)
            if self.d_key_table is not None:
                both = self._level(self.d_key_table[...], self.masks.apart, s)
                d_both = self.factor[slot] * dot(both, self.z_keys[slot], NN)
                d_mixed = d_mixed + d_both
                d_rows = jnp.zeros_like(dq) if d_rows is None else d_rows
                d_rows = jnp.where(right, d_rows + d_both, d_rows)
            dk = jnp.where(right, dk, dk + d_mixed)
        self.d_qk[0], self.d_qk[1] = dq, dk
        if d_rows is not None:
            self.d_qk[2] = d_rows

    def _level(self, both, apart, s: int):
        return jnp.where((apart >= s) & (apart < 2 * s), both, 0).astype(self.z.dtype)


def sums_from(x):
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


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _from_row(x, s: int, row: int):
    """In tiles [N, 8, K], every row's block of 2s rows filled with the block's row of that number."""
    parts = [x[:, at : at + 1] for at in range(row, 8, 2 * s)]
    width = 2 * s
    return jnp.concatenate([jnp.broadcast_to(part, (x.shape[0], width, x.shape[2])) for part in parts], axis=1)
