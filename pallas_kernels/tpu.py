"""What the TPU kernels of matrix-valued recurrences share: heads along lanes, chunks along a sequential grid, the masks and
decays of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add, sub

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# What kernels take from here where they are traced: a jax without it fails at the import.
NEEDS = ("CompilerParams", "VMEM", "roll", "store")
for name in NEEDS:
    getattr(pltpu, name)

KEY_DIMS = (64, 128, 256)
VALUE_DIMS = (*KEY_DIMS, 512)
CHIPS = ("v4", "v5", "v6", "7x")
# exp(-128) is 0 in float32 and sums of 128 of them are finite, where those of -inf are not.
FLOOR = -128.0
TILE, LANES = 8, 128  # rows and columns of a register of 32-bit numbers
MOST_HEADS = 8  # a grid step, for the sake of its memory
MEMORY = 15 * 2**20  # that `step_bytes` may be: kernels have 16 MiB on v4 and v5


def declines(*, K: int | None, V: int | None, dtype, chip: str) -> str | None:
    """Why the kernel does not run for such heads on this chip (`jax.Device.device_kind`), or None. What is None is not known
    and rules nothing out."""
    if not chip.startswith("TPU") or not any(name in chip for name in CHIPS):
        return f"the TPU kernel runs on TPU {', '.join(CHIPS)}, not on {chip or 'an unknown chip'}"
    if K not in (None, *KEY_DIMS) or V not in (None, *VALUE_DIMS):
        return f"the TPU kernel has K in {KEY_DIMS} and V in {VALUE_DIMS}, not K={K}, V={V}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


def step_bytes(n: int, K: int, V: int, itemsize: int, vector: bool) -> int:
    """Of the chip's memory for n heads, at most: blocks (twice, as the next ones are under way) and scratch of the delta rule's
    backward in chunks of 128 tokens, and what the compiler was seen to take beside them, up to 0.7 MiB a head."""
    C, levels = 128, 7

    def lanes(width: int) -> int:
        return -(-width // LANES) * LANES

    queries, values, state = lanes(n * K), lanes(n * V), n * V * lanes(K)
    blocks = C * itemsize * (4 * queries + 3 * values) + state * (itemsize + 2 * 4)  # q, k, dq, dk; v, do, dv; states
    scratch = state * 4 + n * 3 * 2**18
    if vector:
        blocks += C * 4 * 2 * queries  # g, dg
        tokens = 4 * (3 + 3 + 2 + 3) + 2 * itemsize * levels  # scaled, factor, within, d_qk; z and z_keys
        scratch += n * C * (lanes(K) * tokens + 4 * 4 * C) + n * (levels - 2) * C // TILE * lanes(K) * 4  # tables; tiles
    return 2 * blocks + scratch


def groups(H: int, K: int, V: int) -> list[int]:
    """Numbers of heads that a grid step can take: blocks of whole lanes, or all there is."""
    whole = [n for n in range(1, H + 1) if H % n == 0 and ((n * K % 128 == 0 and n * V % 128 == 0) or n == H)]
    return [n for n in whole if n <= MOST_HEADS]


def heads_a_step(q, v, limit: int, *, vector: bool) -> int:
    """How many heads of q [B, T, H, K] and v [B, T, H, V] a grid step takes: up to a limit, or all there are. Where they are an
    odd number of 64 channels, too many to go at once, that is of them and one more."""
    H, K, V = *q.shape[2:], v.shape[3]
    fitting = groups(H, K, V)
    if not fitting or step_bytes(fitting[0], K, V, q.dtype.itemsize, vector) > MEMORY:
        fitting = groups(H + 1, K, V)
    return max([n for n in fitting if n <= limit], default=fitting[0])


def dot(x, y, contract: tuple[int, int]):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


NN, NT, TN = (1, 0), (1, 1), (0, 0)


def iota(shape: tuple[int, ...], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def call(body: Callable, name: str, grid, inputs: dict, outputs: dict, scratch: dict, interpret, **settings):
    """`pl.pallas_call` with refs by name; inputs and outputs are name -> (array or its shape, block spec)."""
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs):
        body(**dict(zip(names, refs, strict=True)), **settings)

    results = pl.pallas_call(
        kernel, grid=grid, name=name, interpret=interpret,
        in_specs=[spec for _, spec in inputs.values()], out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()], scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(*(array for array, _ in inputs.values()))  # fmt: skip
    return dict(zip(outputs, results, strict=True))


class Layout:
    """Arrays as the kernels take them: tokens padded to whole chunks, heads along lanes in groups of n, padded to whole groups:
    H of them, which is H' outside."""

    def __init__(self, q, v, heads: int, chunk: int, *, reverse: bool = False):
        self.B, self.T, self.given, self.K = q.shape
        self.V, self.n, self.dtype = v.shape[-1], heads, q.dtype
        self.C = chunk
        self.chunks = -(-self.T // self.C)
        self.H = -(-self.given // heads) * heads
        self.grid = (self.B, self.H // heads, self.chunks)
        self.at = (lambda t: self.chunks - 1 - t) if reverse else (lambda t: t)

    def tokens(self, x):
        """[B, T, H, X] and a block of one chunk and n heads."""
        x = self.padded(x).reshape(self.B, -1, self.H * x.shape[-1])
        return x, self.token_spec(x.shape[-1] // self.H)

    def token_spec(self, width: int):
        return pl.BlockSpec((1, self.C, self.n * width), lambda b, g, t: (b, self.at(t), g))

    def padded(self, x):
        """[B, T] or [B, T, H, X]."""
        heads = ((0, self.H - self.given), (0, 0)) if x.ndim == 4 else ()
        return jnp.pad(x, ((0, 0), (0, self.chunks * self.C - self.T), *heads))

    def rows(self, x):
        """[B, T', H]: a row [1, C] of every head. Columns would fill a lane of 128."""
        return x.reshape(self.B, self.chunks, self.C, -1, self.n).transpose(0, 3, 1, 4, 2), self.row_spec()

    def row_spec(self):
        return pl.BlockSpec((1, 1, 1, self.n, self.C), lambda b, g, t: (b, g, self.at(t), 0, 0))

    def shared_row(self, x):
        """[B, N, 1, C]: one row [1, C] for all heads."""
        return x, pl.BlockSpec((1, 1, 1, self.C), lambda b, g, t: (b, self.at(t), 0, 0))

    def transposed(self, state):
        """[B, H, K, V] as the kernels have it: [B, H', V, K]."""
        return jnp.pad(jnp.swapaxes(state, -1, -2), ((0, 0), (0, self.H - self.given), (0, 0), (0, 0)))

    def state_of(self, x):
        """The reverse of `transposed`."""
        return jnp.swapaxes(x[:, : self.given], -1, -2)

    def states(self, x):
        """[B, H', V, K], the same block in every chunk."""
        return x, pl.BlockSpec((1, self.n, self.V, self.K), lambda b, g, t: (b, g, 0, 0))

    def states_of_chunks(self, x):
        """[B, N, H', V, K]."""
        return x, pl.BlockSpec((1, 1, self.n, self.V, self.K), lambda b, g, t: (b, self.at(t), g, 0, 0))

    def unpadded(self, x):
        return x[:, : self.T].reshape(self.B, self.T, self.H, -1)[:, :, : self.given]


def prepared(layout: Layout, q, k, v, log_decay, reset) -> dict:
    """The inputs that forward and backward have in common."""
    inputs = {"q": layout.tokens(q), "k": layout.tokens(k), "v": layout.tokens(v)}
    if log_decay is not None and log_decay.shape[-1] > 1:
        inputs["g"] = layout.tokens(log_decay)
    elif log_decay is not None:
        g = jnp.maximum(layout.padded(log_decay), FLOOR)
        if reset is not None:
            # What a reset drops needs no decay, and sums over it stay small.
            g = jnp.where(layout.padded(reset)[..., None, None], 0.0, g)
        parts = {"b": g}
        if layout.dtype == jnp.float32:
            # Differences of sums lose the digits that the sums have before the point. Multiples of 1/64 add up and
            # subtract exactly, and what is left of each stays small.
            parts["b"] = jnp.round(64 * g) / 64
            parts["b_low"] = g - parts["b"]
        for name, part in parts.items():
            sums = jnp.cumsum(part.reshape(layout.B, layout.chunks, layout.C, layout.H), axis=2)
            inputs[name] = layout.rows(sums.reshape(g.shape[:3]))
    if reset is not None:
        in_chunks = layout.padded(reset).reshape(layout.B, layout.chunks, layout.C)
        starts = lax.cummax(jnp.where(in_chunks, jnp.arange(layout.C), -1), axis=2)
        inputs["start"] = layout.shared_row(starts[:, :, None].astype(jnp.float32))
    return inputs


def head_of(ref, head: int, n: int):
    width = ref.shape[-1] // n
    return ref[0, :, pl.ds(head * width, width)]


class Masks:
    """Which tokens of a chunk see which, for all heads alike. A token's `start` is the index of the newest reset up to it, -1
    before any: equal for tokens of one document."""

    def __init__(self, size: int, start=None):
        self.size = size
        i, j = iota((size, size), 0), iota((size, size), 1)
        self.causal = self.seen = i >= j
        self.apart = i ^ j
        self.together = self.first = self.last = None
        if start is not None:
            row = start[0, 0]
            column = row.T
            self.together = column == row
            self.seen = self.causal & self.together
            self.first = column < 0  # tokens that read the entering state [C, 1]
            self.last = column == column[size - 1 :]  # tokens that write the leaving one

    def at_level(self, s: int):
        """Pairs that part at a block of 2s tokens."""
        return (self.apart >= s) & (self.apart < 2 * s) & self.causal

    def reading(self, before):
        """`before`, or 1, for tokens that read the entering state, else 0."""
        return before if self.first is None else jnp.where(self.first, jnp.float32(1) if before is None else before, 0)

    def written(self, after):
        """`after`, or 1, for tokens that write the leaving state, else 0."""
        return after if self.last is None else jnp.where(self.last, jnp.float32(1) if after is None else after, 0)

    def surviving(self, total):
        """`total`, or 1, if the chunk has no reset, else 0."""
        if self.first is None:
            return total
        return jnp.where(self.first[self.size - 1 :], jnp.float32(1) if total is None else total, 0)


class Shared:
    """One decay for all channels of K, or none."""

    def __init__(self, refs: dict, head: int, masks: Masks):
        self.masks = masks
        self.weights = self.before = self.after = self.total = None
        if "b" in refs:
            # One row of sums, or in float32 two that make them up.
            rows = [refs[name][0, 0, 0, head : head + 1] for name in ("b", "b_low") if name in refs]
            columns = [row.T for row in rows]
            lasts = [column[masks.size - 1 :] for column in columns]
            between, after = (reduce(add, map(sub, x, y)) for x, y in ((columns, rows), (lasts, columns)))
            self.weights = jnp.exp(jnp.where(masks.seen, between, -jnp.inf))
            self.before, self.after, self.total = jnp.exp(reduce(add, columns)), jnp.exp(after), jnp.exp(reduce(add, lasts))
        self.before, self.after = masks.reading(self.before), masks.written(self.after)
        self.total = masks.surviving(self.total)

    def scores(self, q, k):
        """P without its scale."""
        scores = dot(q, k, NT)
        return jnp.where(self.masks.seen, scores, 0) if self.weights is None else scores * self.weights

    def read(self, q, h):
        """What the entering state [V, K] says to q, without the scale."""
        return times(self.before, dot(q, h, NT))

    def pullback(self, scale, q, k, v, do):
        """P, and what its cotangent do v^T gives q and k."""
        weights = jnp.where(self.masks.seen, jnp.float32(scale), 0) if self.weights is None else scale * self.weights
        scores, d_scores = (dot(q, k, NT) * weights).astype(q.dtype), (dot(do, v, NT) * weights).astype(q.dtype)
        return scores, dot(d_scores, k, NN), dot(d_scores, q, TN)


def times(factor, x):
    return x if factor is None else factor * x


def scaled(x, factor):
    """In the dtype of x, which a matrix product is to take."""
    return x if factor is None else (x * factor).astype(x.dtype)
