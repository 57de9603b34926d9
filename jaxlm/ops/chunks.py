"""What chunked recurrences share: the layout of chunks, products of decays over them, scores under these, groups, shards.

Every weight is a product of decays, never a quotient, nor the exponential of a difference of cumulative sums: nothing
overflows, and a token decayed by exp(-80) costs its neighbours no digits. The products that weight scores factorise over a
binary tree (`decay_products`; see `jaxlm.ops.linear_attention`).

Arrays are [N, B, H, C, channels]: chunks lead, for the scan over them; B and H stay axes of their own, so that a mesh can
shard them. Padding tokens have k = v = g = 0: they write nothing and decay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.parallel import sequence


def check_inputs(q, keys: dict, v, log_decay, initial_state, chunk_size: int) -> None:
    """Raises ValueError for arrays of matrix-valued recurrences that do not fit each other.

    Args:
      q: [B, T, H, K].
      keys: other arrays of its shape, by name.
      v: [B, T, H, V].
      log_decay: None, [B, T, H] or [B, T, H, K].
      initial_state: None or [B, H, K, V].
      chunk_size: a power of two.
    """
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with at least one token, got {q.shape}")
    for name, x in keys.items():
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {q.shape}, got {x.shape}; repeat grouped keys over their heads")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {q.shape[:3]} as in q, got {v.shape}")
    if log_decay is not None and log_decay.shape not in (q.shape[:3], q.shape):
        raise ValueError(f"log_decay must be [B, T, H] = {q.shape[:3]} or [B, T, H, K] = {q.shape}, got {log_decay.shape}")
    state = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state must be [B, H, K, V] = {state}, got {initial_state.shape}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}; the default is 64")


def to_chunks(x: Float[Array, "B T H X"], size: int) -> Float[Array, "N B H C X"]:
    batch, length, heads, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, channels).transpose(1, 0, 3, 2, 4)


def from_chunks(x: Float[Array, "N B H C X"], length: int) -> Float[Array, "B T H X"]:
    chunks, batch, heads, size, channels = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, channels)[:, :length]


# The chunks are worked off in about this many groups, one after the other: only a group's intermediates are alive at a time.
GROUPS = 8


def over_groups(forward: Callable, backward: Callable) -> Callable:
    """A function (scale, *chunks, state) -> (o, final state) whose gradient keeps its inputs and one state a group.

    Args:
      forward: the same on any number of consecutive chunks.
      backward: (scale, (*chunks, state), (do, d_final_state)) -> (*d_chunks, d_state).
    """

    def split(chunks):
        count = jax.tree.leaves(chunks)[0].shape[0]
        size = max(n for n in range(1, -(-count // GROUPS) + 1) if count % n == 0)
        return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), chunks)

    def join(groups):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)

    def run_forward(scale, *inputs):
        *chunks, state = inputs

        def step(state, group):
            o, new_state = forward(scale, *group, state)
            return new_state, (o, state)

        final_state, (o, entering) = lax.scan(step, state, split(chunks))
        return (join(o), final_state), (chunks, entering)

    def run_backward(scale, residuals, cotangents):
        chunks, entering = residuals
        do, d_final = cotangents

        def step(d_state, group):
            chunks, entering, do = group
            *d_chunks, d_state = backward(scale, (*chunks, entering), (do, d_state))
            return d_state, d_chunks

        d_state, d_chunks = lax.scan(step, d_final, (split(chunks), entering, split(do)), reverse=True)
        return (*join(d_chunks), d_state)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(scale, *inputs):
        return run_forward(scale, *inputs)[0]

    run.defvjp(run_forward, run_backward)
    return run


def over_shards(run: Callable, transition: Callable, inputs: tuple, documents, state, **matrix):
    """A matrix-valued recurrence over [B, T, H, *] inputs whose tokens are split; see `jaxlm.parallel.sequence`."""
    tokens, kept = ("batch", sequence.AXIS, "heads", None), ("batch", "heads", *(None,) * (state.ndim - 2))
    op = sequence.Recurrence(run, transition, jax.tree.map(lambda _: tokens, inputs), tokens, kept, **matrix)
    batch, length, heads, _ = inputs[0].shape
    return sequence.recurrence(op, {"batch": batch, sequence.AXIS: length, "heads": heads}, inputs, documents, state)


def product(equation: str, x: Array, y: Array, operand: jnp.dtype, precise: jnp.dtype) -> Array:
    # HIGHEST concerns float32 operands alone, which TPUs and GPUs would otherwise round.
    precision = lax.Precision.HIGHEST
    x, y = x.astype(operand), y.astype(operand)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=precise)


def halves(x: Float[Array, "*L C X"], s: int) -> tuple[Float[Array, "*L n s X"], Float[Array, "*L n s X"]]:
    """The left and right halves of every block of 2s tokens."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, s, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def join(left: Float[Array, "*L n s X"], right: Float[Array, "*L n s X"]) -> Float[Array, "*L C X"]:
    joined = jnp.stack([left, right], axis=-3)
    return joined.reshape(*joined.shape[:-4], -1, joined.shape[-1])


def decay_products(g: Float[Array, "N B H C X"]):
    """Products of a = exp(g) over parts of a chunk.

    Returns:
      before, after [N, B, H, C, X]: over the tokens up to each (inclusive), and after it.
      levels: for s = 1, 2, 4, .., C/2 the pair of [N, B, H, C/2s, s, X]: over the right half of each block of 2s tokens
        up to each of its tokens, and over the left half after each of its tokens.
    """
    before = jnp.exp(g)
    after = jnp.ones_like(before)
    levels = []
    s = 1
    while s < g.shape[-2]:
        before_left, before_right = halves(before, s)
        after_left, after_right = halves(after, s)
        levels.append((before_right, after_left))
        before = join(before_left, before_right * before_left[..., -1:, :])
        after = join(after_left * before_right[..., -1:, :], after_right)
        s *= 2
    return before, after, levels


def assemble(diagonal: Float[Array, "*L C"], blocks: Sequence[Array]) -> Float[Array, "*L C C"]:
    """The lower triangular matrix of its diagonal and, for s = 1, 2, .., C/2, the squares [*L, C/2s, s, s] that pair
    the right half of each block of 2s tokens (rows) with its left half (columns)."""
    tiles = diagonal[..., None, None]
    for block in blocks:
        left, right = tiles[..., 0::2, :, :], tiles[..., 1::2, :, :]
        upper = jnp.concatenate([left, jnp.zeros_like(block)], axis=-1)
        tiles = jnp.concatenate([upper, jnp.concatenate([block, right], axis=-1)], axis=-2)
    return tiles[..., 0, :, :]


def take_apart(matrix: Float[Array, "*L C C"]) -> tuple[Float[Array, "*L C"], list[Array]]:
    """The transpose of `assemble`."""
    tiles, blocks = matrix[..., None, :, :], []
    while (s := tiles.shape[-1] // 2) > 0:
        blocks.append(tiles[..., s:, :s])
        tiles = jnp.stack([tiles[..., :s, :s], tiles[..., s:, s:]], axis=-3)
        tiles = tiles.reshape(*tiles.shape[:-4], -1, s, s)
    return tiles[..., 0, 0], blocks[::-1]


def scalar_weights(levels, like: Float[Array, "N B H C"]) -> Float[Array, "N B H C C"]:
    """prod_{j<l<=i} a_l for a decay that all channels share."""
    return assemble(jnp.ones_like(like), [before * jnp.swapaxes(after, -1, -2) for before, after in levels])


def chunk_states(total, writes, state, *, reverse: bool = False):
    """The states that enter the chunks (in reverse: that leave them) and the last one, by h <- total h + writes."""

    def step(state, chunk):
        total, write = chunk
        return total * state + write, state

    state, entering = lax.scan(step, state, (total, writes), reverse=reverse)
    return entering, state


def decays(g, q, precise):
    """before, after [N, B, H, C, X], total [N, B, H, X, 1] and levels; X is 1 unless every channel decays by itself."""
    if g is None:
        one = jnp.ones((q.shape[0], 1, 1, 1, 1), precise)
        return one, one, one, None
    before, after, levels = decay_products(g)
    return before, after, jnp.swapaxes(before[..., -1:, :], -1, -2), levels


def vector_pairs(scale, q, k, levels):
    """Per level the scaled right-half queries and left-half keys whose matrix product is that level's scores."""
    for before, after in levels:
        s = before.shape[-2]
        yield halves(q, s)[1] * (scale * before), halves(k, s)[0] * after


def vector_scores(scale, q, k, levels, matmul):
    precise = levels[0][0].dtype if levels else jnp.promote_types(q.dtype, jnp.float32)
    own = scale * jnp.sum(q.astype(precise) * k.astype(precise), axis=-1)
    pairs = vector_pairs(scale, q, k, levels)
    return assemble(own, [matmul("nbhmik,nbhmjk->nbhmij", x, y) for x, y in pairs])
