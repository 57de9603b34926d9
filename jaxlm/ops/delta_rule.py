"""Delta rules: the state forgets what it holds under a key before a value is written there.

    delta_rule       S' = exp(g_t) S_{t-1},  S_t = S' + k_t^T (w_t v_t - (e_t k_t) S')
    dplr_delta_rule  S_t = exp(g_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t

and o_t = scale q_t S_t. The first is DeltaNet (Yang et al. 2024, arXiv 2406.06484), with a decay Gated DeltaNet (2412.06464)
or, per channel, Kimi Delta Attention (2510.26692), with gates of their own for erasing and writing GDN-2 (2605.22791). The
second, diagonal plus low rank, is RWKV-7's (2503.14456).

The chunked forms split time into chunks of C tokens. What the tokens of a chunk write depends on what the ones before them
wrote, by a strictly lower triangular matrix A of scores, so (WY representation; Bischof and Van Loan 1987)

    w = (I + A)^-1 (x * before),  u = (I + A)^-1 (w_t v_t),  x = e k,  written = u - w h,
    o = scale (q * before) h + P written,  h_next = total * h + (k * after)^T written,

with h, P, `before`, `after` and `total` as in linear attention, and every weight a product of decays over a binary tree.
The inverse doubles its blocks: its entries stay as bounded as the inverse itself, where the product of powers of A that
is often used overflows for similar keys. A document boundary is a factor 0.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops import kernels
from jaxlm.ops.chunks import (
    assemble,
    check_inputs,
    decay_products,
    from_chunks,
    halves,
    join,
    over_groups,
    over_shards,
    product,
    scalar_weights,
    take_apart,
    to_chunks,
)
from jaxlm.ops.forms import choose
from jaxlm.ops.ranges import check_log_decay, check_range
from jaxlm.ops.segments import check_segment_ids, resets
from jaxlm.parallel import sequence

# How shards carry a state whose transition is a matrix [K, K].
MATRIX = {"apply": sequence.apply_matrix, "transpose": sequence.transpose_matrix}


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    *,
    write: Float[Array, "B T H V"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S' = exp(log_decay_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = scale q_t S_t, per batch row and head.

    Gates, decay products, the triangular inverse and states are float32 (float64 if an input is), and so are the sums of
    all matrix products, whose operands keep the dtype of q, k and v.

    The state stays bounded where |k_t| <= 1 and 0 <= beta <= 2; above 1 a step reflects, which gives the transition
    negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537). Gates outside that range are an error where values are
    known (`ops.ranges`).

    Args:
      q: queries; they read the state after their own token was written.
      k: keys.
      v: values.
      beta: [B, T, H], how much of the old value goes and of the new one comes; or [B, T, H, K], the erase gate e of
        S_t = S' + k_t^T (w_t v_t - (e_t k_t) S'), then with `write`, w (GDN-2).
      log_decay: natural logarithm of the decay, <= 0: None for none, [B, T, H] for one a head, [B, T, H, K] for one a
        key channel. Positive values make the state grow; they are an error where values are known (`ops.ranges`).
      write: [B, T, H, V], with an erase gate alone; in the same range.
      scale, initial_state, segment_ids: as in `linear_attention`.
      form: "recurrent" (token by token), "parallel" (all pairs, O(T^2) memory), "chunked" (O(T C) time and memory; its
        gradient keeps the inputs and a few states, and recomputes one state a chunk), "kernel" (Pallas, on TPUs
        and Hopper GPUs; its gradient keeps the inputs and a state a chunk, on GPUs also what the chunk's tokens write and
        an inverse) or "auto" (see `forms.choose`). On GPUs the kernel takes float32 only where
        `jax.default_matmul_precision` says "bfloat16", and rounds it to that; scores and v - k S' are float16 there: NaN or
        infinite from 65504 on, of fewer digits below 2e-5.
      chunk_size: C, a power of two. Sequences shorter than it are one smaller chunk. The kernel has its own.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, gates known to be out of range, a chunk_size that is not a power of two, an
        unknown form, or form="kernel" where the kernel cannot run, with the reason.
    """
    check_inputs(q, {"k": k}, v, log_decay, initial_state, chunk_size)
    if beta.shape not in (q.shape[:3], q.shape):
        raise ValueError(f"beta must be [B, T, H] = {q.shape[:3]} or [B, T, H, K] = {q.shape}, got {beta.shape}")
    if (beta.ndim == 4) != (write is not None):
        raise ValueError(
            "write goes with an erase gate beta [B, T, H, K], and an erase gate with write; "
            f"got beta {beta.shape} and write {'None' if write is None else write.shape}"
        )
    if write is not None and write.shape != v.shape:
        raise ValueError(f"write must be [B, T, H, V] = {v.shape} as v, got {write.shape}")
    check_segment_ids(segment_ids, q.shape[:2])
    check_log_decay(log_decay)
    for name, gate in (("beta", beta), ("write", write)):
        check_range(name, gate, 0, 2, "it is a gate, such as sigmoid(x), or 2 * sigmoid(x) for negative eigenvalues")
    precise, state = _precision(initial_state, (*q.shape[::2], v.shape[-1]), q, k, v, beta, log_decay, write)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    beta = beta.astype(precise).reshape(*q.shape[:3], -1)
    write = None if write is None else write.astype(precise)
    log_decay = None if log_decay is None else log_decay.astype(precise).reshape(*q.shape[:3], -1)
    reset = None if segment_ids is None else resets(segment_ids)

    inputs = (q, k, v, beta, write, log_decay)
    decay = "none" if log_decay is None else "scalar" if log_decay.shape[-1] == 1 else "vector"
    # Kernels have gates and states in float32: float64 of them counts as float64 of all.
    operand = jnp.result_type(q, k, v) if precise == jnp.float32 else precise
    form = choose(
        "delta_rule", form, T=q.shape[1], dtype=operand, heads=q.shape[2], head_dim=q.shape[3],
        value_dim=v.shape[3], decay=decay, decoupled=write is not None,
    ).form  # fmt: skip
    if form in ("chunked", "kernel") and sequence.split(q.shape[1]):
        run, transition = partial(_run, scale, form, chunk_size), partial(_transition, chunk_size)
        o, final_state = over_shards(run, transition, inputs, reset, state, **MATRIX)
        return o.astype(v.dtype), final_state
    o, final_state = _run(scale, form, chunk_size, inputs, reset, state)
    return o.astype(v.dtype), final_state


def dplr_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = Diag(exp(log_decay_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t and o_t = scale q_t S_t (RWKV-7).

    a reads the state before its decay. In RWKV-7 a is the negative of a unit key, and b that key times an in-context
    learning rate in (0, 1). Precision as in `delta_rule`.

    Args:
      q: queries, RWKV's receptance r.
      k, v: keys and values.
      a: reads what is to be replaced.
      b: where its replacement goes.
      log_decay: natural logarithm of the decay, <= 0, one a key channel.
      scale, initial_state, segment_ids, form, chunk_size: as in `delta_rule`; RWKV-7's scale is 1.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, a chunk_size that is not a power of two, or an unknown form.
    """
    check_inputs(q, {"k": k, "a": a, "b": b}, v, None, initial_state, chunk_size)
    if log_decay is None or log_decay.shape != q.shape:
        got = None if log_decay is None else log_decay.shape
        raise ValueError(f"log_decay must be [B, T, H, K] = {q.shape}, got {got}")
    check_segment_ids(segment_ids, q.shape[:2])
    check_log_decay(log_decay)
    precise, state = _precision(initial_state, (*q.shape[::2], v.shape[-1]), q, k, v, a, b, log_decay)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reset = None if segment_ids is None else resets(segment_ids)
    inputs = (q, k, v, a, b, log_decay.astype(precise))
    if form in ("auto", "chunked") and sequence.split(q.shape[1]):
        run, transition = partial(_run_dplr, scale, "chunked", chunk_size), partial(_transition_dplr, chunk_size)
        o, final_state = over_shards(run, transition, inputs, reset, state, **MATRIX)
        return o.astype(v.dtype), final_state
    form = choose("dplr_delta_rule", form, T=q.shape[1], dtype=jnp.result_type(q, k, v, a, b)).form
    o, final_state = _run_dplr(scale, form, chunk_size, inputs, reset, state)
    return o.astype(v.dtype), final_state


def _precision(state, shape, *arrays):
    """The dtype of gates and states, and the state in it."""
    given = [x.dtype for x in (*arrays, state) if x is not None]
    precise = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    batch, heads, values = shape
    keys = arrays[0].shape[-1]
    state = jnp.zeros((batch, heads, keys, values), precise) if state is None else state.astype(precise)
    return precise, state


def _size(form: str, length: int, chunk_size: int) -> int:
    size = 1 << (length - 1).bit_length()
    return min(size, chunk_size) if form == "chunked" else size


def _run(scale, form: str, chunk_size: int, inputs, reset: Bool[Array, "B T"] | None, state):
    """`delta_rule` on prepared arrays; a reset drops the state that a token would continue, at token 0 too."""
    q, k, v, beta, write, log_decay = inputs
    if form == "recurrent":
        return _recurrent(scale, q, k, v, beta, write, log_decay, reset, state)
    if form == "kernel":
        return kernels.matrix_recurrence("delta_rule", scale, (q, k, v, beta, log_decay), reset, state)
    chunks = _in_chunks(form, chunk_size, (q, k, v, beta, write, _with_resets(log_decay, reset, q, state.dtype)))
    run = _chunked if form == "chunked" else _forward
    o, final_state = run(scale, *chunks, state)
    return from_chunks(o, q.shape[1]), final_state


def _transition(chunk_size: int, inputs, reset: Bool[Array, "B T"] | None) -> Float[Array, "B H K K"]:
    """M of S_out = M S_in + N over these tokens: what the rule makes of the identity when nothing is written."""
    q, k, v, beta, _, log_decay = inputs
    precise = beta.dtype
    nothing = jnp.zeros((*q.shape[:3], 1), precise)
    g = _with_resets(log_decay, reset, q, precise)
    k, nothing, beta, g = _in_chunks("chunked", chunk_size, (k, nothing, beta, g))
    matmul = partial(product, operand=jnp.result_type(q, inputs[1], v), precise=precise)
    decay = _Decay(g, k, precise)
    w, u, _, _ = _written(k, beta * k, nothing, decay, matmul)
    identity = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=precise), (*k.shape[1:3], k.shape[-1], k.shape[-1]))
    return _states(k * decay.after, w, u, decay.total, identity, matmul)[2]


def _with_resets(log_decay, reset, q, precise):
    if reset is None:
        return log_decay
    kept = jnp.zeros((*q.shape[:3], 1), precise) if log_decay is None else log_decay
    return jnp.where(reset[..., None, None], -jnp.inf, kept)


def _in_chunks(form: str, chunk_size: int, arrays):
    size = _size(form, arrays[0].shape[1], chunk_size)
    return [None if x is None else to_chunks(x, size) for x in arrays]


def _over_tokens(step, state, tokens):
    if tokens[0].shape[1] == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], tokens))
        return o[:, None], state
    state, o = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1), state


def _read(x, state):
    return jnp.einsum("bhk,bhkv->bhv", x, state, precision=lax.Precision.HIGHEST)


def _recurrent(scale, q, k, v, beta, write, g, reset, state):
    """The definition, one token a step."""

    def step(state, token):
        q, k, v, beta, write, g, reset = token
        q, k, v = (x.astype(state.dtype) for x in (q, k, v))
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        if g is not None:
            state = jnp.exp(g)[..., None] * state
        written = (beta if write is None else write) * v - _read(beta * k, state)
        state = state + k[..., None] * written[..., None, :]
        return state, _read(scale * q, state)

    return _over_tokens(step, state, (q, k, v, beta, write, g, reset))


# From here on arrays are [N, B, H, C, channels], as in linear_attention. Padding tokens have k = v = g = beta = 0: they
# write nothing, erase nothing and decay nothing.


class _Decay:
    """Products of a chunk's decays, and scores weighted by them: none, one a head, or one a key channel.

    `scores(x, y)` is sum_c x_ic y_jc prod_{j<l<=i} a_lc for i >= j (i > j if strict), and `pullback(x, y, d)` its gradients
    with respect to x and y.
    """

    def __init__(self, g, like, precise):
        self.scalar = g is not None and g.shape[-1] == 1
        self.levels = None
        self.before = self.after = self.total = jnp.ones((like.shape[0], 1, 1, 1, 1), precise)
        if g is not None:
            self.before, self.after, self.levels = decay_products(g)
            self.total = jnp.swapaxes(self.before[..., -1:, :], -1, -2)
        if self.scalar:
            self.weights = scalar_weights(self.levels, g[..., 0])

    def _mask(self, scores, strict):
        if self.scalar:
            scores = scores * self.weights
        if strict or not self.scalar:
            scores = jnp.tril(scores, -1 if strict else 0)
        return scores

    def scores(self, x, y, matmul, *, strict: bool = False):
        if self.levels is None or self.scalar:
            return self._mask(matmul("nbhik,nbhjk->nbhij", x, y), strict)
        own = jnp.sum(x.astype(self.before.dtype) * y.astype(self.before.dtype), axis=-1)
        blocks = [matmul("nbhmik,nbhmjk->nbhmij", *self._pair(x, y, *level)) for level in self.levels]
        return assemble(jnp.zeros_like(own) if strict else own, blocks)

    def pullback(self, x, y, d, matmul, *, strict: bool = False):
        if self.levels is None or self.scalar:
            d = self._mask(d, strict)
            return matmul("nbhij,nbhjk->nbhik", d, y), matmul("nbhij,nbhik->nbhjk", d, x)
        d_own, d_blocks = take_apart(d)
        d_own = jnp.zeros_like(d_own[..., None]) if strict else d_own[..., None]
        dx, dy = d_own * y, d_own * x
        for (before, after), d_block in zip(self.levels, d_blocks, strict=True):
            right, left = self._pair(x, y, before, after)
            d_right = before * matmul("nbhmij,nbhmjk->nbhmik", d_block, left)
            d_left = after * matmul("nbhmij,nbhmik->nbhmjk", d_block, right)
            dx = dx + join(jnp.zeros_like(d_right), d_right)
            dy = dy + join(d_left, jnp.zeros_like(d_left))
        return dx, dy

    @staticmethod
    def _pair(x, y, before, after):
        s = before.shape[-2]
        return halves(x, s)[1] * before, halves(y, s)[0] * after

    def gradient(self, g, flow, left):
        """dg of the flow per token (row operands times their gradients less column operands times theirs), and of `left`,
        what the decays of the chunk do to the state that leaves it."""
        if self.scalar:
            flow, left = jnp.sum(flow, axis=-1, keepdims=True), jnp.sum(left, axis=-1, keepdims=True)
        later = jnp.triu(jnp.ones((g.shape[-2], g.shape[-2]), flow.dtype))
        return jnp.einsum("ij,nbhjx->nbhix", later, flow, precision=lax.Precision.HIGHEST) + left[..., None, :]


def unit_triangular_inverse(a: Float[Array, "*b C C"]) -> Float[Array, "*b C C"]:
    """(I + a)^-1 of a strictly lower triangular a, C a power of two, by doubling diagonal blocks.

    The inverse of [[X, 0], [A, Y]] is [[X^-1, 0], [-Y^-1 A X^-1, Y^-1]]: no intermediate is larger than the blocks of the
    result, whereas the product (I - a)(I + a^2)(I + a^4).. reaches 1e17 for 64 equal keys, whose inverse has entries <= 1.
    """
    matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    tiles = jnp.ones((*a.shape[:-1], 1, 1), a.dtype)
    for block in take_apart(a)[1]:
        left, right = tiles[..., 0::2, :, :], tiles[..., 1::2, :, :]
        lower = -matmul(right, matmul(block, left))
        upper = jnp.concatenate([left, jnp.zeros_like(lower)], axis=-1)
        tiles = jnp.concatenate([upper, jnp.concatenate([lower, right], axis=-1)], axis=-2)
    return tiles[..., 0, :, :]


def _written(k, x, values, decay: _Decay, matmul):
    """What a chunk writes, u - w h for an entering state h; the inverse, and the rows that read h."""
    inverse = unit_triangular_inverse(decay.scores(x, k, matmul, strict=True))
    reads = x * decay.before
    return matmul("nbhij,nbhjk->nbhik", inverse, reads), matmul("nbhij,nbhjv->nbhiv", inverse, values), inverse, reads


def _states(keys, w, u, total, state, matmul):
    """States that enter the chunks, what each writes, and the last state, by h <- total h + keys^T (u - w h)."""

    def step(state, chunk):
        keys, w, u, total = chunk
        written = u - matmul("bhck,bhkv->bhcv", w, state)
        return total * state + matmul("bhck,bhcv->bhkv", keys, written), (state, written)

    total = jnp.broadcast_to(total, (keys.shape[0], *total.shape[1:]))
    final_state, (entering, written) = lax.scan(step, state, (keys, w, u, total))
    return entering, written, final_state


def _forward(scale, q, k, v, beta, write, g, state):
    """Outputs and final state; the parallel form is this with a single chunk, under plain autodiff."""
    matmul = partial(product, operand=jnp.result_type(q, k, v), precise=state.dtype)
    decay = _Decay(g, k, state.dtype)
    w, u, _, _ = _written(k, beta * k, (beta if write is None else write) * v, decay, matmul)
    entering, written, final_state = _states(k * decay.after, w, u, decay.total, state, matmul)
    scores = decay.scores(scale * q, k, matmul)
    reads = matmul("nbhck,nbhkv->nbhcv", q * (scale * decay.before), entering)
    return reads + matmul("nbhij,nbhjv->nbhiv", scores, written), final_state


def _backward(scale, inputs, cotangents):
    """The gradient in closed form: the reverse recurrence of the state's cotangent between chunks, the transposed WY
    products within, and dg as a reverse cumulative sum. The inverse T has dA = -T^T dT T^T."""
    q, k, v, beta, write, g, state = inputs
    do, d_final = cotangents
    matmul = partial(product, operand=jnp.result_type(q, k, v), precise=state.dtype)
    decay = _Decay(g, k, state.dtype)
    x, values = beta * k, (beta if write is None else write) * v
    w, u, inverse, reads = _written(k, x, values, decay, matmul)
    keys, queries = k * decay.after, q * (scale * decay.before)
    entering, written, _ = _states(keys, w, u, decay.total, state, matmul)

    scores = decay.scores(scale * q, k, matmul)
    local = matmul("nbhij,nbhiv->nbhjv", scores, do)
    read_by = matmul("nbhck,nbhcv->nbhkv", queries, do)

    def step(d_state, chunk):
        keys, w, local, read_by, total = chunk
        d_written = local + matmul("bhck,bhkv->bhcv", keys, d_state)
        return total * d_state + read_by - matmul("bhck,bhcv->bhkv", w, d_written), (d_state, d_written)

    total = jnp.broadcast_to(decay.total, (q.shape[0], *decay.total.shape[1:]))
    d_state, (d_leaving, d_written) = lax.scan(step, d_final, (keys, w, local, read_by, total), reverse=True)

    dq, dk = decay.pullback(scale * q, k, matmul("nbhiv,nbhjv->nbhij", do, written), matmul)
    dq = scale * dq + scale * decay.before * matmul("nbhcv,nbhkv->nbhck", do, entering)
    dk_later = decay.after * matmul("nbhcv,nbhkv->nbhck", written, d_leaving)

    dw = -matmul("nbhcv,nbhkv->nbhck", d_written, entering)
    d_inverse = matmul("nbhiv,nbhjv->nbhij", d_written, values) + matmul("nbhik,nbhjk->nbhij", dw, reads)
    d_values = matmul("nbhij,nbhiv->nbhjv", inverse, d_written)
    d_reads = matmul("nbhij,nbhik->nbhjk", inverse, dw)
    dx, dk_erased = decay.pullback(x, k, _d_inverse(inverse, d_inverse), matmul, strict=True)
    dx = dx + decay.before * d_reads
    column = dk + dk_later + dk_erased

    d_beta, d_write = dx * k, d_values * v
    if write is None:
        d_beta, d_write = jnp.sum(d_beta, -1, keepdims=True) + jnp.sum(d_write, -1, keepdims=True), None
    dg = None
    if g is not None:
        left = decay.total[..., 0] * jnp.sum(entering * d_leaving, axis=-1) + jnp.sum(k * dk_later, axis=-2)
        dg = decay.gradient(g, q * dq + x * dx - k * column, left)
    dk = column + beta * dx
    dv = (beta if write is None else write) * d_values
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_beta, d_write, dg, d_state


def _d_inverse(inverse, d):
    """Cotangent of A, which `pullback` masks, for that of (I + A)^-1."""
    transposed = jnp.swapaxes(inverse, -1, -2)
    return -jnp.matmul(jnp.matmul(transposed, d, precision=lax.Precision.HIGHEST), transposed, precision=lax.Precision.HIGHEST)


_chunked = over_groups(_forward, _backward)


# Diagonal plus low rank. A row a_i reads the state before token i decays it: as if it stood at token i - 1.


def _run_dplr(scale, form: str, chunk_size: int, inputs, reset: Bool[Array, "B T"] | None, state):
    """`dplr_delta_rule` on prepared arrays; a reset drops the state that a token would continue, at token 0 too."""
    q, k, v, a, b, log_decay = inputs
    if form == "recurrent":
        return _recurrent_dplr(scale, q, k, v, a, b, log_decay, reset, state)
    if reset is not None:
        a = jnp.where(reset[..., None, None], 0, a)
    chunks = _in_chunks(form, chunk_size, (q, k, v, a, b, _with_resets(log_decay, reset, q, state.dtype)))
    run = _chunked_dplr if form == "chunked" else _forward_dplr
    o, final_state = run(scale, *chunks, state)
    return from_chunks(o, q.shape[1]), final_state


def _transition_dplr(chunk_size: int, inputs, reset: Bool[Array, "B T"] | None) -> Float[Array, "B H K K"]:
    """M of S_out = M S_in + N over these tokens."""
    q, k, _, a, b, log_decay = inputs
    precise = log_decay.dtype
    if reset is not None:
        a = jnp.where(reset[..., None, None], 0, a)
    arrays = (k, jnp.zeros((*q.shape[:3], 1), precise), a, b, _with_resets(log_decay, reset, q, precise))
    k, nothing, a, b, g = _in_chunks("chunked", chunk_size, arrays)
    matmul = partial(product, operand=jnp.result_type(*inputs[:5]), precise=precise)
    decay = _Decay(g, k, precise)
    w, u, _, _, _, _ = _written_dplr(k, nothing, a, b, decay, matmul)
    identity = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=precise), (*k.shape[1:3], k.shape[-1], k.shape[-1]))
    return _states_dplr(b * decay.after, w, u, jnp.zeros((), precise), decay.total, identity, matmul)[2]


def _recurrent_dplr(scale, q, k, v, a, b, g, reset, state):
    """The definition, one token a step."""

    def step(state, token):
        q, k, v, a, b, g, reset = token
        q, k, v, a, b = (x.astype(state.dtype) for x in (q, k, v, a, b))
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        replaced = _read(a, state)
        state = jnp.exp(g)[..., None] * state + b[..., None] * replaced[..., None, :] + k[..., None] * v[..., None, :]
        return state, _read(scale * q, state)

    return _over_tokens(step, state, (q, k, v, a, b, g, reset))


def _earlier(x):
    """Rows at the token before: row i of the result is row i + 1 of x, the last zeros."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def _later(x):
    """The transpose of `_earlier`."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)


def _written_dplr(k, v, a, b, decay: _Decay, matmul):
    """What a_t S_{t-1} is in a chunk, u + w h for an entering state h, and what it is made of."""
    early = _earlier(a)
    inverse = unit_triangular_inverse(-_later(decay.scores(early, b, matmul)))
    before = jnp.concatenate([jnp.ones_like(decay.before[..., :1, :]), decay.before[..., :-1, :]], axis=-2)
    reads = a * before
    from_values = matmul("nbhij,nbhjv->nbhiv", _later(decay.scores(early, k, matmul)), v)
    w = matmul("nbhij,nbhjk->nbhik", inverse, reads)
    return w, matmul("nbhij,nbhjv->nbhiv", inverse, from_values), inverse, reads, before, from_values


def _states_dplr(keys, w, u, writes, total, state, matmul):
    """States that enter the chunks, what a reads in each, and the last state, by h <- total h + writes + keys^T (u + w h)."""

    def step(state, chunk):
        keys, w, u, writes, total = chunk
        replaced = u + matmul("bhck,bhkv->bhcv", w, state)
        return total * state + writes + matmul("bhck,bhcv->bhkv", keys, replaced), (state, replaced)

    writes = jnp.broadcast_to(writes, (keys.shape[0], *writes.shape[1:]))
    final_state, (entering, replaced) = lax.scan(step, state, (keys, w, u, writes, total))
    return entering, replaced, final_state


def _forward_dplr(scale, q, k, v, a, b, g, state):
    matmul = partial(product, operand=jnp.result_type(q, k, v, a, b), precise=state.dtype)
    decay = _Decay(g, k, state.dtype)
    w, u, *_ = _written_dplr(k, v, a, b, decay, matmul)
    writes = matmul("nbhck,nbhcv->nbhkv", k * decay.after, v)
    entering, replaced, final_state = _states_dplr(b * decay.after, w, u, writes, decay.total, state, matmul)
    o = matmul("nbhck,nbhkv->nbhcv", q * (scale * decay.before), entering)
    o = o + matmul("nbhij,nbhjv->nbhiv", decay.scores(scale * q, k, matmul), v)
    return o + matmul("nbhij,nbhjv->nbhiv", decay.scores(scale * q, b, matmul), replaced), final_state


def _backward_dplr(scale, inputs, cotangents):
    q, k, v, a, b, g, state = inputs
    do, d_final = cotangents
    matmul = partial(product, operand=jnp.result_type(q, k, v, a, b), precise=state.dtype)
    decay = _Decay(g, k, state.dtype)
    w, u, inverse, reads, before, from_values = _written_dplr(k, v, a, b, decay, matmul)
    keys, erasers, queries = k * decay.after, b * decay.after, q * (scale * decay.before)
    writes = matmul("nbhck,nbhcv->nbhkv", keys, v)
    entering, replaced, _ = _states_dplr(erasers, w, u, writes, decay.total, state, matmul)

    local = matmul("nbhij,nbhiv->nbhjv", decay.scores(scale * q, b, matmul), do)
    read_by = matmul("nbhck,nbhcv->nbhkv", queries, do)

    def step(d_state, chunk):
        erasers, w, local, read_by, total = chunk
        d_replaced = local + matmul("bhck,bhkv->bhcv", erasers, d_state)
        return total * d_state + read_by + matmul("bhck,bhcv->bhkv", w, d_replaced), (d_state, d_replaced)

    chunks = (erasers, w, local, read_by, decay.total)
    d_state, (d_leaving, d_replaced) = lax.scan(step, d_final, chunks, reverse=True)

    dq_k, dk = decay.pullback(scale * q, k, matmul("nbhiv,nbhjv->nbhij", do, v), matmul)
    dq_b, db = decay.pullback(scale * q, b, matmul("nbhiv,nbhjv->nbhij", do, replaced), matmul)
    dq = scale * (dq_k + dq_b + decay.before * matmul("nbhcv,nbhkv->nbhck", do, entering))
    dk_later = decay.after * matmul("nbhcv,nbhkv->nbhck", v, d_leaving)
    db_later = decay.after * matmul("nbhcv,nbhkv->nbhck", replaced, d_leaving)

    dw = matmul("nbhcv,nbhkv->nbhck", d_replaced, entering)
    d_inverse = matmul("nbhiv,nbhjv->nbhij", d_replaced, from_values) + matmul("nbhik,nbhjk->nbhij", dw, reads)
    d_from_values = matmul("nbhij,nbhiv->nbhjv", inverse, d_replaced)
    d_reads = matmul("nbhij,nbhik->nbhjk", inverse, dw)
    early = _earlier(a)
    d_early_b, db_replaced = decay.pullback(early, b, _earlier(-_d_inverse(inverse, d_inverse)), matmul)
    d_scores = _earlier(matmul("nbhiv,nbhjv->nbhij", d_from_values, v))
    d_early_k, dk_replaced = decay.pullback(early, k, d_scores, matmul)
    da = before * d_reads + _later(d_early_b + d_early_k)
    dk = dk + dk_later + dk_replaced
    db = db + db_later + db_replaced

    scores_k, scores_ak = decay.scores(scale * q, k, matmul), _later(decay.scores(early, k, matmul))
    dv = matmul("nbhij,nbhiv->nbhjv", scores_k, do) + matmul("nbhck,nbhkv->nbhcv", keys, d_leaving)
    dv = dv + matmul("nbhij,nbhiv->nbhjv", scores_ak, d_from_values)

    left = decay.total[..., 0] * jnp.sum(entering * d_leaving, axis=-1)
    left = left + jnp.sum(k * dk_later + b * db_later, axis=-2)
    dg = decay.gradient(g, q * dq - k * dk - b * db + _earlier(a * da), left)
    return (*(d.astype(x.dtype) for d, x in zip((dq, dk, dv, da, db), inputs[:5], strict=True)), dg, d_state)


_chunked_dplr = over_groups(_forward_dplr, _backward_dplr)
