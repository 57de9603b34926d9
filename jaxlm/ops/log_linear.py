"""Log-linear attention (Guo et al. 2025, arXiv 2506.04761): scalar-decay linear attention whose past is kept in
log2(T) + 1 levels of doubling age, each read with a data-dependent scale of its own:

    o_t = scale sum_{s<=t} lambda_t[level(t, s)] exp(g_{s+1} + .. + g_t) (q_t . k_s) v_s,
    level(t, t) = 0,    level(t, s) = 1 + msb(t XOR s),

with positions t, s counted from 0 at the start of the document (a Fenwick tree). With lambda = 1 it is linear attention.

The state is one matrix a binary digit of n, the number of tokens seen: digit j, where it is 1, stands for the block of
2^j tokens that ends at s_j = (n with its lower j bits cleared) - 1. All tokens of the block have one level from any later
token's point of view, level(t, s_j). So a chunk that begins anywhere in a document reads each entering matrix with the
scale lambda_t[level(t, s_j)], and nothing asks chunks to be aligned with documents. What a chunk does to the digits is
affine, and positions alone say which digit moves where: so sequences split over devices like every linear recurrence.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops.chunks import decays, from_chunks, over_shards, product, scalar_weights, to_chunks
from jaxlm.ops.forms import choose
from jaxlm.ops.ranges import check_log_decay
from jaxlm.ops.segments import check_segment_ids, positions_in_runs, resets
from jaxlm.parallel import sequence


class LogLinearState(NamedTuple):
    """What log-linear attention keeps of the past.

    Attributes:
      digits: one matrix a binary digit of `position`, lowest first; the last takes in all that is older.
      position: number of tokens of the document so far.
    """

    digits: Float[Array, "B H J K V"]
    position: Int[Array, " B"]


def log_linear_state(batch: int, levels: int, heads: int, keys: int, values: int, dtype=jnp.float32) -> LogLinearState:
    """The state before the first token, for level scales of `levels` levels."""
    return LogLinearState(jnp.zeros((batch, heads, levels - 1, keys, values), dtype), jnp.zeros(batch, jnp.int32))


def levels_for(length: int) -> int:
    """Levels that documents of up to `length` tokens need: ceil(log2(length)) + 1, at least 2."""
    return max(2, (length - 1).bit_length() + 1)


def log_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    level_scales: Float[Array, "B T H L"],
    *,
    scale: float = 1.0,
    initial_state: LogLinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], LogLinearState]:
    """o_t = scale sum_{s<=t} level_scales_t[level(t, s)] exp(sum of log_decay over s+1..t) (q_t . k_s) v_s.

    Decay products, scales and states are float32 (float64 if an input is), and so are the sums of all matrix products,
    whose operands keep the dtype of q, k and v. Here, unlike in the models that freeze gradients for a chunk, the chunk
    is only how the numbers are computed.

    Args:
      q: queries; they read the state after their own token was written.
      k: keys.
      v: values.
      log_decay: natural logarithm of each head's decay, <= 0. Positive values are an error where values are known
        (`ops.ranges`).
      level_scales: lambda, of the token that reads; L levels serve documents of up to 2 ** (L - 1) tokens. A document
        that outgrows them (token by token, through states) keeps what is older in the last level.
      scale: multiplies q.
      initial_state: what token 0 continues; None for the start of a document.
      segment_ids: levels and positions start anew where the id changes. The first run continues `initial_state`.
      form: "recurrent" (token by token), "parallel" (all pairs, O(T^2) memory), "chunked" (O(T (C + L V)) time a
        channel; its gradient keeps the inputs and L - 1 matrices a chunk, and recomputes the rest) or "auto".
      chunk_size: C, a power of two. Sequences shorter than it are one smaller chunk.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, decays known to be positive, fewer levels than T tokens need, shards of the
        sequence that do not divide it, or an unknown form.
    """
    _check(q, k, v, log_decay, level_scales, initial_state, chunk_size)
    batch, length, heads, keys = q.shape
    check_segment_ids(segment_ids, (batch, length))
    check_log_decay(log_decay)
    inputs = [x.dtype for x in (q, k, v, log_decay, level_scales)]
    precise = jnp.promote_types(jnp.result_type(*inputs), jnp.float32)
    state = initial_state
    if state is None:
        state = log_linear_state(batch, level_scales.shape[-1], heads, keys, v.shape[-1], precise)
    state = LogLinearState(state.digits.astype(precise), state.position.astype(jnp.int32))
    log_decay, level_scales = log_decay.astype(precise), level_scales.astype(precise)
    reset = None if segment_ids is None else resets(segment_ids)

    form = choose("log_linear_attention", form, T=length, dtype=jnp.result_type(q, k, v)).form
    if form == "recurrent":
        o, final_state = _recurrent(scale, q, k, v, log_decay, level_scales, reset, state)
        return o.astype(v.dtype), final_state

    if reset is not None:
        log_decay = jnp.where(reset[..., None], -jnp.inf, log_decay)
    inputs = (q, k, v, log_decay[..., None], level_scales)
    positions = jnp.broadcast_to(positions_in_runs(reset, state.position, length), (batch, length))
    run = partial(_run_whole, scale, chunk_size if form == "chunked" else length)
    if form == "chunked" and sequence.split(length):
        o, digits = over_shards(
            run, lambda inputs, positions: log_linear_transition(inputs, positions, positions[:, -1] + 1),
            inputs, positions, state.digits, apply=apply_digits, transpose=sequence.transpose_matrix,
        )  # fmt: skip
    else:
        o, digits = run(inputs, positions, state.digits)
    return o.astype(v.dtype), LogLinearState(digits, positions[:, -1] + 1)


def _check(q, k, v, log_decay, level_scales, state, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with at least one token, got {q.shape}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {q.shape}, got {k.shape}; repeat grouped keys over their heads")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {q.shape[:3]} as in q, got {v.shape}")
    if log_decay.shape != q.shape[:3]:
        raise ValueError(f"log_decay must be [B, T, H] = {q.shape[:3]}, got {log_decay.shape}; decay a head, not a channel")
    if level_scales.ndim != 4 or level_scales.shape[:3] != q.shape[:3] or level_scales.shape[3] < 2:
        raise ValueError(
            f"level_scales must be [B, T, H, L] with B, T, H = {q.shape[:3]} as in q and L >= 2, got {level_scales.shape}"
        )
    levels = level_scales.shape[3]
    if q.shape[1] > 2 ** (levels - 1):
        raise ValueError(
            f"level_scales has {levels} levels, which serve {2 ** (levels - 1)} tokens, but q has {q.shape[1]}; "
            f"give {levels_for(q.shape[1])} levels"
        )
    digits = (q.shape[0], q.shape[2], levels - 1, q.shape[3], v.shape[3])
    if state is not None and (state.digits.shape != digits or state.position.shape != digits[:1]):
        raise ValueError(
            f"initial_state must have digits [B, H, L-1, K, V] = {digits} and position [B], "
            f"got {state.digits.shape} and {state.position.shape}"
        )
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}; the default is 64")


def _recurrent(scale, q, k, v, g, scales, reset, state):
    """The definition on the Fenwick state, one token a step."""
    precise = state.digits.dtype
    digit = jnp.arange(state.digits.shape[2])

    def step(state, token):
        q, k, v, g, scales, reset = token
        digits, position = state
        if reset is not None:
            digits = jnp.where(reset[:, None, None, None, None], 0, digits)
            position = jnp.where(reset, 0, position)
        digits = jnp.exp(g)[..., None, None, None] * digits
        own = k.astype(precise)[..., None] * v.astype(precise)[..., None, :]
        read = scales[..., 0, None, None] * own
        read = read + jnp.einsum("bhj,bhjkv->bhkv", scales[..., 1:], digits, precision=lax.Precision.HIGHEST)
        o = jnp.einsum("bhk,bhkv->bhv", scale * q.astype(precise), read, precision=lax.Precision.HIGHEST)
        # Adding one to the position carries over its z trailing ones: their blocks and the new token become digit z.
        position = position + 1
        carried = lax.population_count((position & -position) - 1)[:, None]
        lower = (digit < carried)[:, None, :, None, None]
        block = own + jnp.sum(jnp.where(lower, digits, 0), axis=2)
        target = (digit == jnp.minimum(carried, digit[-1]))[:, None, :, None, None]
        digits = jnp.where(lower, 0, digits) + jnp.where(target, block[:, :, None], 0)
        return LogLinearState(digits, position), o

    tokens = (q, k, v, g, scales, reset)
    if q.shape[1] == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], tokens))
        return o[:, None], state
    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1), state


def _level(reader: Int[Array, "*X"], written: Int[Array, "*X"], last: int) -> Int[Array, "*X"]:
    """level(t, s) = 1 + msb(t XOR s), 0 for t = s, `last` for what no level is left for."""
    return jnp.minimum(32 - lax.clz(reader ^ written), last)


def _ends(position: Int[Array, " B"], last: int) -> Int[Array, "B J"]:
    """Ends s_j of the blocks that the digits of a state after `position` tokens stand for."""
    digit = jnp.arange(last, dtype=jnp.int32)
    return ((position[:, None] >> digit) << digit) - 1


def _moves(ends: Int[Array, "B J"], position: Int[Array, " B"]) -> Bool[Array, "B J J"]:
    """Whether, once `position` tokens were seen, digit m (rows) takes in what digit j (columns), ending there, stood for.
    Every token is older than that, so no level is 0."""
    last = ends.shape[1]
    return (_level(position[:, None], ends, last) - 1)[:, None] == jnp.arange(last, dtype=jnp.int32)[:, None]


def run_log_linear(
    scale, chunk_size: int, inputs, positions: Int[Array, "B T"], after: Int[Array, " B"], digits: Float[Array, "B H J K V"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H J K V"]]:
    """Outputs and final digits of prepared arrays, for whoever says himself where in their documents tokens stand.

    Args:
      scale, chunk_size: as in `log_linear_attention`.
      inputs: q, k, v, log_decay [B, T, H, 1] and level_scales. A document that starts within has log_decay -inf there and
        position 0; so does one that starts at token 0, and then nothing of `digits` is read.
      positions: of the tokens in their documents. Where a row ends earlier, k, v and log_decay are 0 and positions `after`.
      after: number of tokens of the last document once the row is over.
      digits: after `positions[:, 0]` tokens.
    """
    length = positions.shape[1]
    size = 1 << (min(length, chunk_size) - 1).bit_length()
    padding = jnp.broadcast_to(after[:, None], (after.shape[0], -length % size))
    positions = jnp.concatenate([positions, padding], axis=1).reshape(after.shape[0], -1, size).swapaxes(0, 1)
    # The digits that a chunk leaves are those before the next. They are dropped where that starts a document.
    after = jnp.concatenate([positions[1:, :, 0], after[None]])
    chunks = [to_chunks(x, size) for x in inputs]
    body = partial(_chunk, scale)
    if chunks[0].shape[0] == 1:
        digits, o = body(digits, jax.tree.map(lambda x: x[0], (*chunks, positions, after)))
        o = o[None]
    else:
        digits, o = lax.scan(jax.checkpoint(body), digits, (*chunks, positions, after))
    return from_chunks(o, length), digits


def _run_whole(scale, chunk_size: int, inputs, positions, digits):
    return run_log_linear(scale, chunk_size, inputs, positions, positions[:, -1] + 1, digits)


def log_linear_transition(inputs, positions: Int[Array, "B T"], after: Int[Array, " B"]) -> Float[Array, "B H J J"]:
    """M of digits_out = M digits_in + N of `run_log_linear`: where the digits move, times the product of the decays (0 once
    a document starts among them)."""
    *_, log_decay, level_scales = inputs
    moves = _moves(_ends(positions[:, 0], level_scales.shape[-1] - 1), after)
    return jnp.exp(jnp.sum(log_decay, axis=1))[..., None] * moves[:, None]


def apply_digits(transition: Float[Array, "*b J J"], x: Float[Array, "*b J *X"]) -> Float[Array, "*b J *X"]:
    """M digits, or a product of two M."""
    return sequence.apply_matrix(transition, x.reshape(*transition.shape[:-1], -1)).reshape(x.shape)


def _chunk(scale, digits: Float[Array, "B H J K V"], chunk):
    """One chunk [B, H, C, ...] of tokens: the digits it leaves and its outputs."""
    q, k, v, g, scales, positions, after_chunk = chunk
    last = scales.shape[-1] - 1
    matmul = partial(product, operand=jnp.result_type(q, k, v), precise=digits.dtype)
    before, after, total, tree = (jax.tree.map(lambda x: x[0], part) for part in decays(g[None], q[None], digits.dtype))

    def scale_of(level):
        """level_scales_i[level_ij] [B, H, C, X] for levels [B, C, X]: selects and sums, which TPUs prefer to gathers."""
        level = level[:, None]
        return sum(jnp.where(level == n, scales[..., n, None], 0) for n in range(last + 1))

    ends = _ends(positions[:, 0], last)
    # All digits at once: their keys are the channels of one long key.
    reads = (scale * before) * scale_of(_level(positions[..., None], ends[:, None], last))
    reads = (reads[..., None] * q[..., None, :]).reshape(*q.shape[:3], -1)
    o = matmul("bhcx,bhxv->bhcv", reads, digits.reshape(*digits.shape[:2], -1, digits.shape[-1]))
    weights = scalar_weights(tree, g[..., 0]) * scale_of(_level(positions[..., None], positions[:, None], last))
    o = o + matmul("bhij,bhjv->bhiv", scale * matmul("bhik,bhjk->bhij", q, k) * weights, v)

    # Digits that stand for what was written, after the chunk.
    moves = _moves(ends, after_chunk).astype(digits.dtype)
    kept = jnp.einsum("bmj,bhjkv->bhmkv", moves, digits, precision=lax.Precision.HIGHEST)
    writes = (_level(after_chunk[:, None], positions, last) - 1)[..., None] == jnp.arange(last, dtype=jnp.int32)
    writes = jnp.where(writes[:, None, ..., None], (k * after)[..., None, :], 0).reshape(*k.shape[:3], -1)
    written = matmul("bhcx,bhcv->bhxv", writes, v).reshape(digits.shape)
    return total[:, :, None] * kept + written, o
