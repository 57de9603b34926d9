"""Linear attention with no, scalar or per-channel decay: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.

One op for linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), RetNet (2307.08621), Lightning Attention-2
(2401.04658), Mamba-2/SSD (2405.21060), GLA (2312.06635), HGRN2 and their kin, which differ in where the decay comes
from.

The chunked form splits time into chunks of C tokens. With h the state that enters a chunk and `before`, `after`,
`total` the products of the decays up to a token (itself included), after it, and over the chunk,

    o = scale (q * before) h + P v,      h_next = total * h + (k * after)^T v,
    P_ij = scale sum_c q_ic k_jc prod_{j<l<=i} a_lc,   a = exp(g),   i >= j.

Every weight here is a product of factors a in [0, 1], never a quotient, nor the exponential of a difference of
cumulative sums: nothing overflows, and a token decayed by exp(-80) costs its neighbours no digits. A document boundary
is a factor 0.

The weights in P factorise over a binary tree: the pair (i, j) parts at exactly one block of 2s tokens, with i in its
right half and j in its left, and prod_{j<l<=i} a_l is the product over the left half after j times that over the right
half up to i. So P is matrix products of tokens scaled by factors <= 1, for decays of any strength, and no factor that
enters row i belongs to a token after i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops.forms import choose
from jaxlm.ops.segments import check_segment_ids, resets
from jaxlm.parallel import sequence


def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t, per batch row and head.

    Gates, decay products and states are float32 (float64 if an input is), and so are the sums of all matrix products,
    whose operands keep the dtype of q, k and v.

    Args:
      q: queries; they read the state after their own token was written.
      k: keys.
      v: values.
      log_decay: natural logarithm of the decay, <= 0: None for none, [B, T, H] for one a head, [B, T, H, K] for one a
        key channel. Positive values are not checked for, and make the state grow.
      scale: multiplies q; None for K ** -0.5.
      initial_state: the state that token 0 continues; None for zeros.
      segment_ids: the state is zeroed between two tokens whose ids differ, so that each document of a packed row gets
        what it gets alone. The first run of a row continues `initial_state`.
      form: "recurrent" (token by token), "parallel" (all pairs, O(T^2) memory), "chunked" (O(T C) time and memory; its
        gradient keeps the inputs and a few states, and recomputes one state a chunk) or "auto" (see `forms.choose`).
      chunk_size: C, a power of two. Sequences shorter than it are one smaller chunk.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, a chunk_size that is not a power of two, or an unknown form.
    """
    _check(q, k, v, log_decay, initial_state, chunk_size)
    batch, length, heads, keys = q.shape
    check_segment_ids(segment_ids, (batch, length))
    inputs = [x.dtype for x in (q, k, v, log_decay, initial_state) if x is not None]
    precise = jnp.promote_types(jnp.result_type(*inputs), jnp.float32)
    scale = keys**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, keys, v.shape[-1]), precise)
    initial_state = initial_state.astype(precise)
    if log_decay is not None:
        log_decay = log_decay.astype(precise).reshape(batch, length, heads, -1)
    reset = None if segment_ids is None else resets(segment_ids)

    inputs = (q, k, v, log_decay)
    if form in ("auto", "chunked") and sequence.split(length):
        o, final_state = over_shards(partial(_run, scale, "chunked", chunk_size), _transition, inputs, reset, initial_state)
        return o.astype(v.dtype), final_state
    form = choose("linear_attention", form, T=length, dtype=jnp.result_type(q, k, v)).form
    o, final_state = _run(scale, form, chunk_size, inputs, reset, initial_state)
    return o.astype(v.dtype), final_state


def _run(scale, form: str, chunk_size: int, inputs, reset: Bool[Array, "B T"] | None, state):
    """The op on prepared arrays; a reset drops the state that a token would continue, at token 0 too."""
    q, k, v, log_decay = inputs
    batch, length, heads, _ = q.shape
    if form == "recurrent":
        return _recurrent(scale, q, k, v, log_decay, reset, state)
    if reset is not None:
        kept = jnp.zeros((batch, length, heads, 1), state.dtype) if log_decay is None else log_decay
        log_decay = jnp.where(reset[..., None, None], -jnp.inf, kept)
    size = 1 << (length - 1).bit_length()
    if form == "chunked":
        size = min(size, chunk_size)
    chunks = [None if x is None else _to_chunks(x, size) for x in (q, k, v, log_decay)]
    run = _chunked if form == "chunked" else _chunks_forward
    o, final_state = run(scale, *chunks, state)
    return _from_chunks(o, length), final_state


def _transition(inputs, reset: Bool[Array, "B T"] | None) -> Float[Array, "B H K 1"] | Float[Array, "B H 1 1"]:
    """M of S_out = M * S_in + N over these tokens: the product of the decays, 0 once a document starts among them."""
    q, _, _, log_decay = inputs
    batch, _, heads, _ = q.shape
    if log_decay is None:
        total = jnp.ones((batch, heads, 1, 1), jnp.promote_types(q.dtype, jnp.float32))
    else:
        total = jnp.exp(jnp.sum(log_decay, axis=1))[..., None]
    return total if reset is None else jnp.where(jnp.any(reset, axis=1)[:, None, None, None], 0, total)


def over_shards(run: Callable, transition: Callable, inputs: tuple, reset, state, **matrix):
    """A matrix-valued recurrence over [B, T, H, *] inputs whose tokens are split; see `jaxlm.parallel.sequence`."""
    tokens, kept = ("batch", sequence.AXIS, "heads", None), ("batch", "heads", None, None)
    op = sequence.Recurrence(run, transition, jax.tree.map(lambda _: tokens, inputs), tokens, kept, **matrix)
    batch, length, heads, _ = inputs[0].shape
    return sequence.recurrence(op, {"batch": batch, sequence.AXIS: length, "heads": heads}, inputs, reset, state)


def _check(q, k, v, log_decay, initial_state, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with at least one token, got {q.shape}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {q.shape}, got {k.shape}; repeat grouped keys over their heads")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {q.shape[:3]} as in q, got {v.shape}")
    if log_decay is not None and log_decay.shape not in (q.shape[:3], q.shape):
        raise ValueError(
            f"log_decay must be [B, T, H] = {q.shape[:3]} or [B, T, H, K] = {q.shape}, got {log_decay.shape}"
        )
    state = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state must be [B, H, K, V] = {state}, got {initial_state.shape}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}; the default is 64")


def _recurrent(scale, q, k, v, g, reset, state):
    """The definition, one token a step."""

    def step(state, token):
        q, k, v, g, reset = token
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        if g is not None:
            state = jnp.exp(g)[..., None] * state
        state = state + k.astype(state.dtype)[..., None] * v.astype(state.dtype)[..., None, :]
        o = jnp.einsum("bhk,bhkv->bhv", scale * q.astype(state.dtype), state, precision=lax.Precision.HIGHEST)
        return state, o

    tokens = (q, k, v, g, reset)
    if q.shape[1] == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], tokens))
        return o[:, None], state
    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1), state


# From here on arrays are [N, B, H, C, channels]: chunks lead, for the scan over them; B and H stay axes of their own,
# so that a mesh can shard them. Padding tokens have k = v = g = 0: they write nothing and decay nothing.


def _to_chunks(x: Float[Array, "B T H X"], size: int) -> Float[Array, "N B H C X"]:
    batch, length, heads, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, channels).transpose(1, 0, 3, 2, 4)


def _from_chunks(x: Float[Array, "N B H C X"], length: int) -> Float[Array, "B T H X"]:
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


def _matmul(equation: str, x: Array, y: Array, operand: jnp.dtype, precise: jnp.dtype) -> Array:
    # HIGHEST concerns float32 operands alone, which TPUs and GPUs would otherwise round.
    precision = lax.Precision.HIGHEST
    x, y = x.astype(operand), y.astype(operand)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=precise)


def _halves(x: Float[Array, "*L C X"], s: int) -> tuple[Float[Array, "*L n s X"], Float[Array, "*L n s X"]]:
    """The left and right halves of every block of 2s tokens."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, s, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _join(left: Float[Array, "*L n s X"], right: Float[Array, "*L n s X"]) -> Float[Array, "*L C X"]:
    joined = jnp.stack([left, right], axis=-3)
    return joined.reshape(*joined.shape[:-4], -1, joined.shape[-1])


def _decay_products(g: Float[Array, "N B H C X"]):
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
        before_left, before_right = _halves(before, s)
        after_left, after_right = _halves(after, s)
        levels.append((before_right, after_left))
        before = _join(before_left, before_right * before_left[..., -1:, :])
        after = _join(after_left * before_right[..., -1:, :], after_right)
        s *= 2
    return before, after, levels


def _assemble(diagonal: Float[Array, "*L C"], blocks: Sequence[Array]) -> Float[Array, "*L C C"]:
    """The lower triangular matrix of its diagonal and, for s = 1, 2, .., C/2, the squares [*L, C/2s, s, s] that pair
    the right half of each block of 2s tokens (rows) with its left half (columns)."""
    tiles = diagonal[..., None, None]
    for block in blocks:
        left, right = tiles[..., 0::2, :, :], tiles[..., 1::2, :, :]
        upper = jnp.concatenate([left, jnp.zeros_like(block)], axis=-1)
        tiles = jnp.concatenate([upper, jnp.concatenate([block, right], axis=-1)], axis=-2)
    return tiles[..., 0, :, :]


def _take_apart(matrix: Float[Array, "*L C C"]) -> tuple[Float[Array, "*L C"], list[Array]]:
    """The transpose of `_assemble`."""
    tiles, blocks = matrix[..., None, :, :], []
    while (s := tiles.shape[-1] // 2) > 0:
        blocks.append(tiles[..., s:, :s])
        tiles = jnp.stack([tiles[..., :s, :s], tiles[..., s:, s:]], axis=-3)
        tiles = tiles.reshape(*tiles.shape[:-4], -1, s, s)
    return tiles[..., 0, 0], blocks[::-1]


def _scalar_weights(levels, like: Float[Array, "N B H C"]) -> Float[Array, "N B H C C"]:
    """prod_{j<l<=i} a_l for a decay that all channels share."""
    return _assemble(jnp.ones_like(like), [before * jnp.swapaxes(after, -1, -2) for before, after in levels])


def _chunk_states(total, writes, state, *, reverse: bool = False):
    """The states that enter the chunks (in reverse: that leave them) and the last one, by h <- total h + writes."""

    def step(state, chunk):
        total, write = chunk
        return total * state + write, state

    state, entering = lax.scan(step, state, (total, writes), reverse=reverse)
    return entering, state


def _dtypes(q, k, v, state):
    return {"operand": jnp.result_type(q, k, v), "precise": state.dtype}


def _decays(g, q, precise):
    """before, after [N, B, H, C, X], total [N, B, H, X, 1] and levels; X is 1 unless every channel decays by itself."""
    if g is None:
        one = jnp.ones((q.shape[0], 1, 1, 1, 1), precise)
        return one, one, one, None
    before, after, levels = _decay_products(g)
    return before, after, jnp.swapaxes(before[..., -1:, :], -1, -2), levels


def _chunks_forward(scale, q, k, v, g, state):
    """Outputs and final state; the parallel form is this with a single chunk, under plain autodiff."""
    matmul = partial(_matmul, **_dtypes(q, k, v, state))
    before, after, total, levels = _decays(g, q, state.dtype)
    writes = matmul("nbhck,nbhcv->nbhkv", k * after, v)
    entering, final_state = _chunk_states(total, writes, state)
    if g is None:
        scores = scale * jnp.tril(matmul("nbhik,nbhjk->nbhij", q, k))
    elif g.shape[-1] == 1:
        scores = scale * matmul("nbhik,nbhjk->nbhij", q, k) * _scalar_weights(levels, g[..., 0])
    else:
        scores = _vector_scores(scale, q, k, levels, matmul)
    o = matmul("nbhck,nbhkv->nbhcv", q * (scale * before), entering) + matmul("nbhij,nbhjv->nbhiv", scores, v)
    return o, final_state


def _vector_pairs(scale, q, k, levels):
    """Per level the scaled right-half queries and left-half keys whose matrix product is that level's scores."""
    for before, after in levels:
        s = before.shape[-2]
        yield _halves(q, s)[1] * (scale * before), _halves(k, s)[0] * after


def _vector_scores(scale, q, k, levels, matmul):
    precise = levels[0][0].dtype if levels else jnp.promote_types(q.dtype, jnp.float32)
    own = scale * jnp.sum(q.astype(precise) * k.astype(precise), axis=-1)
    pairs = _vector_pairs(scale, q, k, levels)
    return _assemble(own, [matmul("nbhmik,nbhmjk->nbhmij", x, y) for x, y in pairs])


def _chunks_backward(scale, inputs, cotangents):
    """The gradient in closed form (GLA, arXiv 2312.06635, section 4.3): the reverse recurrence of the state's cotangent
    between chunks, matrix products within them, and dg as a reverse cumulative sum of q dq - k dk."""
    q, k, v, g, state = inputs
    do, d_final = cotangents
    matmul = partial(_matmul, **_dtypes(q, k, v, state))
    precise = state.dtype
    before, after, total, levels = _decays(g, q, precise)
    before = scale * before
    entering, _ = _chunk_states(total, matmul("nbhck,nbhcv->nbhkv", k * after, v), state)
    reads = matmul("nbhck,nbhcv->nbhkv", q * before, do)
    d_leaving, d_state = _chunk_states(total, reads, d_final, reverse=True)

    d_scores = matmul("nbhiv,nbhjv->nbhij", do, v)
    dq = before * matmul("nbhcv,nbhkv->nbhck", do, entering)
    dk_later = after * matmul("nbhcv,nbhkv->nbhck", v, d_leaving)
    if g is None or g.shape[-1] == 1:
        scores = scale * matmul("nbhik,nbhjk->nbhij", q, k)
        d_scores = scale * d_scores
        if g is None:
            scores, d_scores = jnp.tril(scores), jnp.tril(d_scores)
        else:
            weights = _scalar_weights(levels, g[..., 0])
            scores, d_scores = scores * weights, d_scores * weights
        dq = dq + matmul("nbhij,nbhjk->nbhik", d_scores, k)
        dk = dk_later + matmul("nbhij,nbhik->nbhjk", d_scores, q)
    else:
        scores = _vector_scores(scale, q, k, levels, matmul)
        d_own, d_blocks = _take_apart(d_scores)
        d_own = scale * d_own[..., None]
        dq = dq + d_own * k
        dk = dk_later + d_own * q
        for (x, y), (ahead, behind), d_block in zip(_vector_pairs(scale, q, k, levels), levels, d_blocks, strict=True):
            dx = scale * ahead * matmul("nbhmij,nbhmjk->nbhmik", d_block, y)
            dy = behind * matmul("nbhmij,nbhmik->nbhmjk", d_block, x)
            dq = dq + _join(jnp.zeros_like(dx), dx)
            dk = dk + _join(dy, jnp.zeros_like(dy))
    dv = matmul("nbhij,nbhiv->nbhjv", scores, do) + matmul("nbhck,nbhkv->nbhcv", k * after, d_leaving)

    dg = None
    if g is not None:
        flow = q * dq - k * dk
        # What the decays of the chunk do to the state that leaves it.
        left = total[..., 0] * jnp.sum(entering * d_leaving, axis=-1) + jnp.sum(k * dk_later, axis=-2)
        if g.shape[-1] == 1:
            flow, left = jnp.sum(flow, axis=-1, keepdims=True), jnp.sum(left, axis=-1, keepdims=True)
        later = jnp.triu(jnp.ones((g.shape[-2], g.shape[-2]), precise))
        dg = jnp.einsum("ij,nbhjx->nbhix", later, flow, precision=lax.Precision.HIGHEST) + left[..., None, :]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dg, d_state


_chunked = over_groups(_chunks_forward, _chunks_backward)
