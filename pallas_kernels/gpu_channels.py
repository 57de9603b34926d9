"""A decay for every channel of the keys within chunks, on Hopper GPUs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import F32, FLOOR, LOG2E, ROWS, WGMMA, C, by_row, iota, starts_of


def unknown_zero():
    """A 0 that the compiler does not know: masks it is part of are made where this stands, and not ahead of the loop around it,
    for which registers are too few."""
    return lax.optimization_barrier(jnp.int32(0))


class Levels:
    """The tree of pairs of tokens in a chunk, and what decays of channels do at its levels. A level s splits blocks of 2s
    tokens into a left and a right half.

    Sums of log decays over ranges of tokens are products with matrices of zeros and ones. Those, and what factors scale, come
    from arithmetic on 16-bit numbers, two of which make an instruction.
    """

    def __init__(self, call, dtype, zero=0):
        """
        Args:
          dtype: of what factors scale.
          zero: 0, or `unknown_zero` where masks are to be made here.
        """
        self.call, self.dtype = call, dtype
        self.i, self.j = iota((C, C), 0) + zero, iota((C, C), 1) + zero
        self.row = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=ROWS) + zero

    def _inside(self, low, high, dtype):
        """1 where low <= j <= high for column j, else 0, of numbers for every row."""
        middle, reach = 0.5 * (low + high).astype(F32), 0.5 * (high - low + 2).astype(F32)  # exact in 16 bits too
        apart = jnp.abs(self.j.astype(dtype) - by_row(middle.astype(dtype), (C, C)))
        inside = by_row(reach.astype(dtype), (C, C)) - apart  # a whole number
        return jnp.minimum(jnp.maximum(inside, jnp.zeros((), dtype)), jnp.ones((), dtype))

    def right(self, s):
        return (self.i & s) != 0

    def factors(self, sums, s):
        """Products of decays at a level, for each of the arrays of log decays: over the left half after a key, over the right
        half up to a query. They are float16 numbers of powers of 2, errors of 2^-12 each, since all summands have one sign."""
        start = self.row & -s
        right = (self.row & s) != 0
        return self._factors(sums, jnp.where(right, start, self.row + 1), jnp.where(right, self.row, start + (s - 1)))

    def before(self, sums):
        """Over the chunk up to each token."""
        return self._factors(sums, self.row & 0, self.row)

    def after(self, sums):
        """Over the chunk after each token."""
        return self._factors(sums, self.row + 1, self.row | (C - 1))

    def total(self, sums):
        """Over the chunk, in every row."""
        return self._factors(sums, self.row & 0, self.row | (C - 1))

    def _factors(self, sums, low, high):
        chosen = self._inside(low, high, jnp.float16)
        return (jnp.exp2(self.call.dot((chosen, g))) for g in sums)

    def mixed(self, factor, s, q, k):
        """Queries of right halves and keys of left halves, times the factors of the level."""
        factor = factor.astype(self.dtype)
        of_queries = factor * by_row(jnp.minimum(self.row & s, 1).astype(self.dtype), (C, C))
        return q * of_queries + k * (factor - of_queries)  # one of the two is 0

    def pairs(self, s):
        """The pairs of a query, the row, and a key that part at a level."""
        return (((self.i ^ self.j) & -s) == s) & self.right(s)

    def partners(self, s):
        """1 for the pairs of a level, either way round, else 0."""
        other = (self.row & -s) ^ s
        return self._inside(other, other + (s - 1), self.dtype)


LEVELS = C.bit_length() - 1


def channels_of(log_decay, reset, length):
    """Log decays of every channel [B, T, H, K] and where in its chunk the document of every token starts [B, N, C] or None; of
    tokens padded to `length`."""
    start = None if reset is None else starts_of(reset, length, C)[:, 0].astype(jnp.float32)
    return jnp.pad(log_decay, ((0, 0), (0, length - log_decay.shape[1]), (0, 0), (0, 0))), start


def of_chunk(sum_s):
    """Sums over the chunk of log decays in memory, one for every row of their transpose: sums over its columns would go through
    memory of all warps."""
    return jnp.sum(plgpu.load(sum_s.T, layout=WGMMA).astype(F32), axis=1)


def powers(g):
    """Log decays as powers of 2, and none below the floor."""
    return jnp.maximum(g, FLOOR) * LOG2E
