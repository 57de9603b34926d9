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

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops import kernels
from jaxlm.ops.chunks import (
    check_inputs,
    chunk_states,
    decays,
    from_chunks,
    join,
    over_groups,
    over_shards,
    product,
    scalar_weights,
    take_apart,
    to_chunks,
    vector_pairs,
    vector_scores,
)
from jaxlm.ops.forms import choose
from jaxlm.ops.ranges import check_log_decay
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
        key channel. Positive values make the state grow; they are an error where values are known (`ops.ranges`).
      scale: multiplies q; None for K ** -0.5.
      initial_state: the state that token 0 continues; None for zeros.
      segment_ids: the state is zeroed between two tokens whose ids differ, so that each document of a packed row gets
        what it gets alone. The first run of a row continues `initial_state`.
      form: "recurrent" (token by token), "parallel" (all pairs, O(T^2) memory), "chunked" (O(T C) time and memory; its
        gradient keeps the inputs and a few states, and recomputes one state a chunk), "kernel" (Pallas, on TPUs
        and Hopper GPUs; its gradient keeps the inputs and one state a chunk) or "auto" (see `forms.choose`). On GPUs the
        kernel takes float32 only where `jax.default_matmul_precision` says "bfloat16", and rounds it to that.
      chunk_size: C, a power of two. Sequences shorter than it are one smaller chunk. The kernel has its own.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, a chunk_size that is not a power of two, an unknown form, or form="kernel"
        where the kernel cannot run, with the reason.
    """
    check_inputs(q, {"k": k}, v, log_decay, initial_state, chunk_size)
    batch, length, heads, keys = q.shape
    check_segment_ids(segment_ids, (batch, length))
    check_log_decay(log_decay)
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
    decay = "none" if log_decay is None else "scalar" if log_decay.shape[-1] == 1 else "vector"
    # Kernels have gates and states in float32: float64 of them counts as float64 of all.
    operand = jnp.result_type(q, k, v) if precise == jnp.float32 else precise
    form = choose(
        "linear_attention", form, T=length, dtype=operand, heads=heads, head_dim=keys, value_dim=v.shape[-1], decay=decay,
    ).form  # fmt: skip
    if form in ("chunked", "kernel") and sequence.split(length):
        o, final_state = over_shards(partial(_run, scale, form, chunk_size), _transition, inputs, reset, initial_state)
        return o.astype(v.dtype), final_state
    o, final_state = _run(scale, form, chunk_size, inputs, reset, initial_state)
    return o.astype(v.dtype), final_state


def _run(scale, form: str, chunk_size: int, inputs, reset: Bool[Array, "B T"] | None, state):
    """The op on prepared arrays; a reset drops the state that a token would continue, at token 0 too."""
    q, k, v, log_decay = inputs
    batch, length, heads, _ = q.shape
    if form == "recurrent":
        return _recurrent(scale, q, k, v, log_decay, reset, state)
    if form == "kernel":
        return kernels.matrix_recurrence("linear_attention", scale, inputs, reset, state)
    if reset is not None:
        kept = jnp.zeros((batch, length, heads, 1), state.dtype) if log_decay is None else log_decay
        log_decay = jnp.where(reset[..., None, None], -jnp.inf, kept)
    size = 1 << (length - 1).bit_length()
    if form == "chunked":
        size = min(size, chunk_size)
    chunks = [None if x is None else to_chunks(x, size) for x in (q, k, v, log_decay)]
    run = _chunked if form == "chunked" else _chunks_forward
    o, final_state = run(scale, *chunks, state)
    return from_chunks(o, length), final_state


def _transition(inputs, reset: Bool[Array, "B T"] | None) -> Float[Array, "B H K 1"] | Float[Array, "B H 1 1"]:
    """M of S_out = M * S_in + N over these tokens: the product of the decays, 0 once a document starts among them."""
    q, _, _, log_decay = inputs
    batch, _, heads, _ = q.shape
    if log_decay is None:
        total = jnp.ones((batch, heads, 1, 1), jnp.promote_types(q.dtype, jnp.float32))
    else:
        total = jnp.exp(jnp.sum(log_decay, axis=1))[..., None]
    return total if reset is None else jnp.where(jnp.any(reset, axis=1)[:, None, None, None], 0, total)


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


def _dtypes(q, k, v, state):
    return {"operand": jnp.result_type(q, k, v), "precise": state.dtype}


def _chunks_forward(scale, q, k, v, g, state):
    """Outputs and final state; the parallel form is this with a single chunk, under plain autodiff."""
    matmul = partial(product, **_dtypes(q, k, v, state))
    before, after, total, levels = decays(g, q, state.dtype)
    writes = matmul("nbhck,nbhcv->nbhkv", k * after, v)
    entering, final_state = chunk_states(total, writes, state)
    if g is None:
        scores = scale * jnp.tril(matmul("nbhik,nbhjk->nbhij", q, k))
    elif g.shape[-1] == 1:
        scores = scale * matmul("nbhik,nbhjk->nbhij", q, k) * scalar_weights(levels, g[..., 0])
    else:
        scores = vector_scores(scale, q, k, levels, matmul)
    o = matmul("nbhck,nbhkv->nbhcv", q * (scale * before), entering) + matmul("nbhij,nbhjv->nbhiv", scores, v)
    return o, final_state


def _chunks_backward(scale, inputs, cotangents):
    """The gradient in closed form (GLA, arXiv 2312.06635, section 4.3): the reverse recurrence of the state's cotangent
    between chunks, matrix products within them, and dg as a reverse cumulative sum of q dq - k dk."""
    q, k, v, g, state = inputs
    do, d_final = cotangents
    matmul = partial(product, **_dtypes(q, k, v, state))
    precise = state.dtype
    before, after, total, levels = decays(g, q, precise)
    before = scale * before
    entering, _ = chunk_states(total, matmul("nbhck,nbhcv->nbhkv", k * after, v), state)
    reads = matmul("nbhck,nbhcv->nbhkv", q * before, do)
    d_leaving, d_state = chunk_states(total, reads, d_final, reverse=True)

    d_scores = matmul("nbhiv,nbhjv->nbhij", do, v)
    dq = before * matmul("nbhcv,nbhkv->nbhck", do, entering)
    dk_later = after * matmul("nbhcv,nbhkv->nbhck", v, d_leaving)
    if g is None or g.shape[-1] == 1:
        scores = scale * matmul("nbhik,nbhjk->nbhij", q, k)
        d_scores = scale * d_scores
        if g is None:
            scores, d_scores = jnp.tril(scores), jnp.tril(d_scores)
        else:
            weights = scalar_weights(levels, g[..., 0])
            scores, d_scores = scores * weights, d_scores * weights
        dq = dq + matmul("nbhij,nbhjk->nbhik", d_scores, k)
        dk = dk_later + matmul("nbhij,nbhik->nbhjk", d_scores, q)
    else:
        scores = vector_scores(scale, q, k, levels, matmul)
        d_own, d_blocks = take_apart(d_scores)
        d_own = scale * d_own[..., None]
        dq = dq + d_own * k
        dk = dk_later + d_own * q
        for (x, y), (ahead, behind), d_block in zip(vector_pairs(scale, q, k, levels), levels, d_blocks, strict=True):
            dx = scale * ahead * matmul("nbhmij,nbhmjk->nbhmik", d_block, y)
            dy = behind * matmul("nbhmij,nbhmik->nbhmjk", d_block, x)
            dq = dq + join(jnp.zeros_like(dx), dx)
            dk = dk + join(dy, jnp.zeros_like(dy))
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
