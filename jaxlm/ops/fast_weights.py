"""Fast weights trained by gradient descent at test time: TTT-Linear and the Miras trio Moneta, Yaad, Memora.

The state of these layers is a small network, the inner model, that each token trains to map its key to its value; the
output is the inner model at the token's query. So that a chunk of C tokens is matrix products, all its gradients are
taken at the weights W_0 at the chunk's start. **C is a hyper-parameter of the model**: another C is another model.
Chunks are counted from the start of each document, and the state carries a chunk's start, the gradients since, and the
position in it; so documents may begin anywhere in a row, and a call may end anywhere in a chunk.

The gradient of one layer of the inner model is an outer product z_i^T d_i of what enters it and the error at what
leaves it. The weights that token t reads are

    W_t = beta_t W_0 + sum_{i<=t} (beta_t / beta_i) z_i^T u_i,        u_i = -rate_i d_i,

with beta_t the product of decays since the chunk's start, and x_t W_t is linear attention with query x_t, keys z_i and
values u_i (Behrouz et al. 2025, arXiv 2504.13173, eq. 28-29; Sun et al. 2024, arXiv 2407.04620, section 2.5).

Rows are cut into windows of C tokens. Where documents or states put chunks elsewhere, a window holds tokens of the
chunk that entered it, then of the next chunk of the same document (which begins with weights that the first must
finish), then of documents that begin inside (with the initial weights; none of them lasts a chunk). Each of the three
is computed for the whole window, with other tokens masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops.chunks import decay_products, halves, join, product, take_apart, vector_scores
from jaxlm.ops.forms import choose
from jaxlm.ops.ranges import check_log_decay, check_range
from jaxlm.ops.segments import check_segment_ids, positions_in_runs, resets

NORM_EPS = 1e-6
Weights = dict[str, Array]


class FastState(NamedTuple):
    """What a fast-weight layer keeps of the past; all leading axes are [B, H], but for the position's.

    Attributes:
      start: the inner weights at which gradients of the current chunk are taken (Moneta, Memora: their dual variables),
        less those with which documents begin: so it is zero before the first token.
      change: the decayed sum of the updates since.
      decay: beta, the product of the decays since, a channel; absent where nothing decays.
      position: number of tokens of the current chunk so far, < C.
    """

    start: Weights
    change: Weights
    decay: Float[Array, "B H D"] | None
    position: Int[Array, " B"]


class _Rule(NamedTuple):
    """An inner model and how it learns.

    Attributes:
      chunk: (start, change, decay, tokens, active) -> (o, start, change, decay) for tokens [B, H, C, ...] that see each
        other where `same` says so; inactive ones write nothing.
      finish: (start, change, decay) -> start of the next chunk.
    """

    chunk: Callable
    finish: Callable


class _Tokens(NamedTuple):
    """Tokens of a window, [N, B, H, C, X] and [N, B, C] while windows lead, without N inside one."""

    q: Float[Array, "*N B H C D"]
    k: Float[Array, "*N B H C D"]
    v: Float[Array, "*N B H C D"]
    rate: Float[Array, "*N B H C R"]
    gates: tuple[Array, ...]
    position: Int[Array, "*N B C"]
    reset: Bool[Array, "*N B C"] | None
    valid: Bool[Array, "*N B C"]


def ttt_state(batch: int, heads: int, channels: int, dtype=jnp.float32) -> FastState:
    """The state of `ttt_linear` before the first token."""
    shapes = {"w": (heads, channels, channels), "b": (heads, channels)}
    return _zero_state(batch, shapes, None, dtype)


def miras_state(batch: int, heads: int, channels: int, hidden: int, dtype=jnp.float32) -> FastState:
    """The state of `moneta`, `yaad` and `memora` before the first token."""
    shapes = {"w_in": (heads, channels, hidden), "w_out": (heads, hidden, channels)}
    return _zero_state(batch, shapes, jnp.ones((batch, heads, channels), dtype), dtype)


def _zero_state(batch, shapes, decay, dtype) -> FastState:
    start, change = ({name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()} for _ in range(2))
    return FastState(start, change, decay, jnp.zeros(batch, jnp.int32))


def _where(condition: Bool[Array, " B"], x, y):
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y), x, y)


def _window(rule: _Rule, chunk_size: int, aligned: bool, fresh: FastState, state: FastState, tokens: _Tokens):
    """One window of at most chunk_size tokens, see the module's docstring; `aligned` if it is one chunk."""
    width = tokens.q.shape[-2]
    reset, valid = tokens.reset, tokens.valid
    if reset is not None:
        # A document that begins with the window is the one that enters it.
        state = _where(reset[:, 0], fresh, state)
        reset = None if width == 1 else reset.at[:, 0].set(False)
    first = valid if reset is None else valid & (lax.cumsum(reset.astype(jnp.int32), axis=1) == 0)
    tokens = tokens._replace(reset=None)

    index = state.position[:, None] + jnp.arange(width, dtype=jnp.int32)
    entered = first & (index < chunk_size)
    o, *weights = rule.chunk(*state[:3], tokens, entered)
    position = state.position + jnp.sum(entered, axis=1, dtype=jnp.int32)
    full = position == chunk_size
    begun = fresh._replace(start=rule.finish(*weights))
    start, change, decay, position = _where(full, begun, FastState(*weights, position))

    if not aligned and width > 1:
        following = first & (index >= chunk_size)
        o_following, *weights = rule.chunk(start, change, decay, tokens, following)
        o = jnp.where(following[:, None, :, None], o_following, o)
        start, change, decay, position = FastState(*weights, position + jnp.sum(following, axis=1, dtype=jnp.int32))
    state = FastState(start, change, decay, position)

    if reset is not None:
        later = valid & ~first
        o_later, *weights = rule.chunk(*fresh[:3], tokens._replace(reset=reset), later)
        o = jnp.where(later[:, None, :, None], o_later, o)
        position = jnp.max(jnp.where(later, tokens.position + 1, 0) * _is_last(later), axis=1)
        state = _where(jnp.any(later, axis=1), FastState(*weights, position), state)
    return state, o


def _is_last(active: Bool[Array, "B C"]) -> Bool[Array, "B C"]:
    return active & ~jnp.pad(active[:, 1:], ((0, 0), (0, 1)))


def _scan(body: Callable, group: int, state: FastState, windows: _Tokens):
    """lax.scan over groups of windows: the gradient keeps a state a group, and those of one group at a time, and
    computes every window twice more."""
    checkpoint = partial(jax.checkpoint, prevent_cse=False)
    grouped = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), windows)
    state, o = lax.scan(checkpoint(lambda state, windows: lax.scan(checkpoint(body), state, windows)), state, grouped)
    return state, o.reshape(-1, *o.shape[2:])


def _run(op, rule, q, k, v, rate, gates, weights, *, fresh, state, segment_ids, form, chunk_size, packable=True):
    """What the inner models share. `rate` and `gates` are [B, T, H, X]; unless packable, rows of documents run token by
    token."""
    batch, length = q.shape[:2]
    check_segment_ids(segment_ids, (batch, length))
    aligned = state is None and segment_ids is None
    given = fresh if state is None else jax.tree.map(lambda s, f: s.astype(f.dtype), state, fresh)
    fresh = fresh._replace(start=jax.tree.map(jnp.add, fresh.start, weights))
    state = given._replace(start=jax.tree.map(jnp.add, given.start, weights))
    reset = None if segment_ids is None else resets(segment_ids)
    position = jnp.broadcast_to(positions_in_runs(reset, state.position, length) % chunk_size, (batch, length))

    form = choose(op, form, T=length, dtype=q.dtype).form
    width = 1 if form == "recurrent" or (reset is not None and not packable) else min(chunk_size, _power(length))
    count = -(-length // width)
    group = 1 << (count.bit_length() - 1) // 2  # about the square root
    count = -(-count // group) * group
    pad = count * width - length

    def windows(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, count, width, *x.shape[2:]), 1, 0)
        return x if x.ndim == 3 else jnp.swapaxes(x, 2, 3)

    rate, gates = jax.tree.map(lambda x: x.astype(_precise(fresh.start)), (rate, gates))
    valid = jnp.ones((batch, length), bool)
    tokens = jax.tree.map(windows, _Tokens(q, k, v, rate, gates, position, reset, valid))
    body = partial(_window, rule, chunk_size, aligned, fresh)
    if count == 1:
        state, o = body(state, jax.tree.map(lambda x: x[0], tokens))
        o = o[None]
    else:
        state, o = _scan(body, group, state, tokens)
    o = jnp.swapaxes(jnp.moveaxis(o, 0, 1), 2, 3).reshape(batch, count * width, *v.shape[2:])[:, :length]
    return o.astype(v.dtype), state._replace(start=jax.tree.map(jnp.subtract, state.start, weights))


def _power(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _normalize(x: Float[Array, "... D"]) -> tuple[Float[Array, "... D"], Float[Array, "... 1"]]:
    """(x - mean) / std, and 1 / std."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS)
    return centred * inverse, inverse


def _normalize_backward(d_normal, normal, inverse):
    """The cotangent of x from that of (x - mean) / std."""
    mean = jnp.mean(d_normal, axis=-1, keepdims=True)
    along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    return (d_normal - mean - normal * along) * inverse


def _precise(*inputs) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(inputs)), jnp.float32)


def _check_tokens(q, k, v, chunk_size: int) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, D] with at least one token, got {q.shape}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {q.shape}, got {x.shape}; the inner model maps D to D")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}; the usual one is 16")


def _check_shapes(vectors: dict, weights: Weights, state: FastState | None, fresh: FastState) -> None:
    wanted = {name: x.shape[1:] for name, x in fresh.start.items()}
    for name, (x, shape) in (vectors | {f"weights[{n!r}]": (weights[n], shape) for n, shape in wanted.items()}).items():
        if x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {x.shape}")
    if state is not None:
        got, wanted = (jax.tree.map(lambda x: x.shape, tree) for tree in (state, fresh))
        if got != wanted:
            raise ValueError(f"initial_state must have the shapes {wanted}, got {got}; see ttt_state and miras_state")


def _check_rate(rate: Array) -> None:
    """Negative step sizes would climb the inner loss."""
    check_range("rate", rate, 0, math.inf, "it is a step size, such as sigmoid(x)")


def _matmul_for(tokens: _Tokens, start: Weights) -> Callable:
    return partial(product, operand=jnp.result_type(tokens.q, tokens.k, tokens.v), precise=_precise(start))


def ttt_linear(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    rate: Float[Array, "B T H"],
    token_scale: Float[Array, " C"],
    weights: dict[str, Float[Array, "H ..."]],
    norm_scale: Float[Array, "H D"],
    norm_bias: Float[Array, "H D"],
    *,
    initial_state: FastState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 16,
) -> tuple[Float[Array, "B T H D"], FastState]:
    """TTT-Linear (Sun et al. 2024, arXiv 2407.04620): the inner model f(x) = x + LN(x W + b) learns l = |f(k) - v|^2 / 2.

    With G_s = dl_s / d(k W + b) at the weights W_0, b_0 of the chunk's start, and t, s positions in the chunk,

        W_t = W_0 - token_scale_t sum_{s<=t} rate_s k_s^T G_s,    b_t likewise,    o_t = q_t + LN(q_t W_t + b_t),

    computed as in the paper's dual form (section 2.5), and the next chunk starts from W_{C-1}. The inner rate matrix is
    the outer product token_scale_t rate_s of the official code: the token that reads scales all earlier updates.

    Inner weights, gradients and states are float32 (float64 if an input is); operands of matrix products keep the dtype
    of q, k and v.

    Args:
      q, k, v: queries, keys and the values that the inner model learns to make of them.
      rate: step size of each token's update, >= 0. Negative ones are an error where values are known (`ops.ranges`).
      token_scale: factor of the updates by the position in the chunk at which they are read.
      weights: the inner weights at the start of documents: "w" [H, D, D] and "b" [H, D].
      norm_scale, norm_bias: of the inner model's LayerNorm, which does not learn at test time.
      initial_state: what token 0 continues; None for the start of a document.
      segment_ids: the inner model starts anew where the id changes. The first run continues `initial_state`.
      form: "recurrent" (token by token), "chunked" or "auto". Both take gradients at the chunk's start. The gradient of
        either keeps one state in about sqrt(T/C) and recomputes the others.
      chunk_size: C, a power of two: part of the model, not of how it is computed.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, values known to be out of range, a chunk_size that is not a power of two, or
        an unknown form.
    """
    _check_tokens(q, k, v, chunk_size)
    batch, _, heads, channels = q.shape
    precise = _precise(q, k, v, rate, weights)
    fresh = ttt_state(batch, heads, channels, precise)
    norm = {"norm_scale": (norm_scale, (heads, channels)), "norm_bias": (norm_bias, (heads, channels))}
    vectors = {"rate": (rate, q.shape[:3]), "token_scale": (token_scale, (chunk_size,)), **norm}
    _check_shapes(vectors, weights, initial_state, fresh)
    _check_rate(rate)
    norm = (norm_scale.astype(precise)[:, None], norm_bias.astype(precise)[:, None])
    token_scale = token_scale.astype(precise)
    rule = _Rule(partial(_ttt_chunk, token_scale, norm), partial(_ttt_finish, token_scale))
    return _run(
        "ttt_linear", rule, q, k, v, rate[..., None], (), weights, fresh=fresh, state=initial_state,
        segment_ids=segment_ids, form=form, chunk_size=chunk_size,
    )  # fmt: skip


def _ttt_chunk(token_scale, norm, start, change, decay, tokens, active):
    q, k, v, rate, _, position, reset, _ = tokens
    matmul = _matmul_for(tokens, start)
    scale, bias = norm
    normal, inverse = _normalize(matmul("bhcd,bhde->bhce", k, start["w"]) + start["b"][:, :, None])
    errors = k + scale * normal + bias - v
    updates = -rate * _normalize_backward(scale * errors, normal, inverse)
    updates = jnp.where(active[:, None, :, None], updates, 0)

    same = jnp.tril(jnp.ones(2 * q.shape[-2:-1], updates.dtype))
    last = jnp.ones((), updates.dtype)
    if reset is not None:
        run = lax.cumsum(reset.astype(jnp.int32), axis=1)
        same = same * (run[:, None, :, None] == run[:, None, None, :])
        last = (run == run[:, -1:])[:, None, :, None]
    scores = same * (matmul("bhcd,bhed->bhce", q, k) + 1)
    moved = matmul("bhcd,bhde->bhce", q, change["w"]) + change["b"][:, :, None] + matmul("bhcs,bhsd->bhcd", scores, updates)
    z = matmul("bhcd,bhde->bhce", q, start["w"]) + start["b"][:, :, None] + token_scale[position][:, None, :, None] * moved
    o = q + scale * _normalize(z)[0] + bias
    updates = last * updates
    change = {
        "w": change["w"] + matmul("bhcd,bhce->bhde", k, updates),
        "b": change["b"] + jnp.sum(updates, axis=-2),
    }
    return o, start, change, decay


def _ttt_finish(token_scale, start, change, decay):
    return jax.tree.map(lambda w, c: w + token_scale[-1] * c, start, change)


def moneta(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    rate: Float[Array, "B T H D"],
    log_decay: Float[Array, "B T H D"],
    weights: dict[str, Float[Array, "H ..."]],
    norm_scale: Float[Array, "H D"],
    norm_bias: Float[Array, "H D"],
    *,
    p: float = 3.0,
    q_norm: float = 4.0,
    retention: Literal["gradient", "printed"] = "gradient",
    initial_state: FastState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 16,
) -> tuple[Float[Array, "B T H D"], FastState]:
    """Moneta (Behrouz et al. 2025, arXiv 2504.13173, eq. 24-25): the l_p loss and l_q retention.

    The inner model is M(x) = x + LN(gelu(x W_in) W_out), and its loss |M(k) - v|_p^p, with sign(e) smoothed to
    tanh(10 e) and |e| to sqrt(e^2 + 1e-6). A is decayed and updated; the weights at a chunk's start are a function of it:

        A_t = exp(log_decay_t) A_{t-1} - rate_t dl/dW(W_0),    W_0 = |A|^(q-2) A / |A|_q^(q-2)    ("gradient")
                                                               W_0 = A / |A|_q^(q-2)              ("printed")

    with A at the start of the chunk in the second. Inside a chunk W_t starts from W_0 and moves as A does (eq. 28);
    the map applies at boundaries alone. "gradient" is the gradient of |A|_q^2 / 2, of degree 1 in A; its norm is an
    average over the entries, which multiplies W by a constant so that its scale is A's for memories of any size.
    "printed" is the paper's formula, of degree 3 - q. 1e-6 is added to the sum of |A|^q.

    Rates and decays are one a channel: on the input channels of W_in and on the output channels of W_out.

    Args:
      q, k, v: queries, keys and the values that the inner model learns to make of them.
      rate: step sizes, >= 0. Negative ones are an error where values are known.
      log_decay: natural logarithm of the decays, <= 0. Positive values are an error where values are known (`ops.ranges`).
      weights: A at the start of documents: "w_in" [H, D, E] and "w_out" [H, E, D].
      norm_scale, norm_bias: of the inner model's LayerNorm, which does not learn at test time.
      p, q_norm: exponents of the loss and of the retention, p >= 1 and q_norm 2 or >= 3.
      retention: "gradient" or "printed".
      initial_state, segment_ids, form, chunk_size: as in `ttt_linear`; the chunk is part of the model.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, exponents or values known to be out of range, an unknown retention or form.
    """
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}; the default is 3")
    if q_norm != 2 and q_norm < 3:
        raise ValueError(f"q_norm must be 2 or at least 3, got {q_norm}; the default is 4")
    if retention not in ("gradient", "printed"):
        raise ValueError(f'retention={retention!r} is not there; choose "gradient" or "printed"')

    def pull(error, gates):
        return p * jnp.tanh(10 * error) * (error * error + 1e-6) ** ((p - 1) / 2)

    def primal(dual):
        if q_norm == 2:
            return dual
        total = jnp.sum(jnp.abs(dual) ** q_norm, axis=(-2, -1), keepdims=True) + 1e-6
        if retention == "printed":
            return dual / total ** ((q_norm - 2) / q_norm)
        average = total / (dual.shape[-2] * dual.shape[-1])
        return jnp.abs(dual) ** (q_norm - 2) * dual / average ** ((q_norm - 2) / q_norm)

    return _miras(pull, primal, q, k, v, rate, {"log_decay": log_decay}, weights, norm_scale, norm_bias,
                  initial_state, segment_ids, form, chunk_size)  # fmt: skip


def yaad(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    rate: Float[Array, "B T H D"],
    log_decay: Float[Array, "B T H D"],
    threshold: Float[Array, "B T H"],
    weights: dict[str, Float[Array, "H ..."]],
    norm_scale: Float[Array, "H D"],
    norm_bias: Float[Array, "H D"],
    *,
    initial_state: FastState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 16,
) -> tuple[Float[Array, "B T H D"], FastState]:
    """Yaad (Behrouz et al. 2025, arXiv 2504.13173, eq. 26): the Huber loss of the error's norm, and decay.

    With e = M(k) - v and M as in `moneta`, the loss is |e|^2 / 2 up to |e| = threshold and threshold |e| - threshold^2 / 2
    beyond, whose gradient (e, shortened to the threshold) is continuous, unlike that of the paper's l_1 branch:

        W_t = exp(log_decay_t) W_{t-1} - rate_t dl/dW(W_0).

    Args:
      threshold: > 0, the norm from which an error counts as an outlier; negative ones are an error where values are known.
      weights: the inner weights at the start of documents.
      For the others see `moneta`. The chunk is part of the model.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, values known to be out of range, or an unknown form.
    """

    def pull(error, gates):
        square = jnp.sum(error * error, axis=-1, keepdims=True)
        outlier = square > gates[1] ** 2
        # The inner where keeps the gradient of the square root finite for errors of 0.
        return error * jnp.where(outlier, gates[1] * lax.rsqrt(jnp.where(outlier, square, 1)), 1)

    gates = {"log_decay": log_decay, "threshold": threshold}
    return _miras(pull, lambda dual: dual, q, k, v, rate, gates, weights, norm_scale, norm_bias,
                  initial_state, segment_ids, form, chunk_size)  # fmt: skip


def memora(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    rate: Float[Array, "B T H D"],
    log_decay: Float[Array, "B T H D"],
    weights: dict[str, Float[Array, "H ..."]],
    norm_scale: Float[Array, "H D"],
    norm_bias: Float[Array, "H D"],
    *,
    initial_state: FastState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 16,
) -> tuple[Float[Array, "B T H D"], FastState]:
    """Memora (Behrouz et al. 2025, arXiv 2504.13173, eq. 27, 30): squared loss and KL retention.

        W_t = softmax(log_w_t),    log_w_t = exp(log_decay_t) log_w_{t-1} - rate_t dl/dW,    l = |M(k) - v|^2 / 2,

    with M as in `moneta` and the softmax over the inputs of each output, so that the weights of every unit are a
    distribution. The first token of a chunk is exact: its gradient is taken at the weights that enter it (the "lag
    token"). The weights it leaves, W_1, are those at which the other tokens take their gradients, and which all tokens
    of the chunk read; log_w keeps on moving, and its softmax is taken again at the next chunk. With a chunk of one
    token it is the recurrence itself.

    Rows of packed documents run token by token in every form: each document that begins inside a chunk would have a W_1
    of its own.

    Args:
      weights: log_w at the start of documents.
      For the others see `moneta`. The chunk is part of the model.

    Returns:
      o in v's dtype, and the state after the last token.

    Raises:
      ValueError: on shapes that do not fit, values known to be out of range, or an unknown form.
    """
    return _miras(lambda error, gates: error, None, q, k, v, rate,
                  {"log_decay": log_decay}, weights, norm_scale, norm_bias,
                  initial_state, segment_ids, form, chunk_size)  # fmt: skip


def _miras(pull, primal, q, k, v, rate, gates, weights, norm_scale, norm_bias, state, segment_ids, form, chunk_size):
    """`pull` is the gradient of the loss by the error, `primal` makes weights of the dual variables that are carried;
    None for Memora, whose chunks do so once more inside."""
    _check_tokens(q, k, v, chunk_size)
    batch, length, heads, channels = q.shape
    precise = _precise(q, k, v, rate, gates, weights)
    fresh = miras_state(batch, heads, channels, weights["w_in"].shape[-1], precise)
    shapes = {"log_decay": q.shape, "threshold": (batch, length, heads)}
    vectors = {name: (x, shapes[name]) for name, x in gates.items()}
    norm = {"norm_scale": (norm_scale, (heads, channels)), "norm_bias": (norm_bias, (heads, channels))}
    _check_shapes({"rate": (rate, q.shape), **vectors, **norm}, weights, state, fresh)
    _check_rate(rate)
    check_log_decay(gates["log_decay"])
    check_range("threshold", gates.get("threshold"), 0, math.inf, "it is the norm of an error, such as exp(x)")
    norm = (norm_scale.astype(precise)[:, None], norm_bias.astype(precise)[:, None])
    model = partial(_gradients, norm, pull)
    chunk = partial(_memora_chunk, norm, model) if primal is None else partial(_miras_chunk, norm, primal, model)
    gates = tuple(x.reshape(batch, length, heads, -1) for x in gates.values())
    return _run(
        "miras", _Rule(chunk, _miras_finish), q, k, v, rate, gates, weights, fresh=fresh, state=state,
        segment_ids=segment_ids, form=form, chunk_size=chunk_size, packable=primal is not None,
    )  # fmt: skip


def _gradients(norm, pull, matmul, weights, k, v, gates):
    """The inner model's hidden units at the keys, and the errors at what leaves each of its layers."""
    scale, bias = norm
    hidden, back = jax.vjp(jax.nn.gelu, matmul("bhcd,bhde->bhce", k, weights["w_in"]))
    normal, inverse = _normalize(matmul("bhce,bhed->bhcd", hidden, weights["w_out"]))
    errors = pull(k + scale * normal + bias - v, gates)
    d_out = _normalize_backward(scale * errors, normal, inverse)
    (d_in,) = back(matmul("bhcd,bhed->bhce", d_out, weights["w_out"]))
    return hidden, d_in, d_out


def _decayed(decay, weights: Weights) -> Weights:
    """Decays [B, H, D] on the input channels of w_in and the output channels of w_out."""
    return {"w_in": decay[..., :, None] * weights["w_in"], "w_out": decay[..., None, :] * weights["w_out"]}


def _updates(matmul, after, rate, k, hidden, d_in, d_out) -> Weights:
    """The sum of a window's updates, each decayed by the tokens after it."""
    step = -rate * after
    return {
        "w_in": matmul("bhcd,bhce->bhde", step * k, d_in),
        "w_out": matmul("bhce,bhcd->bhed", hidden, step * d_out),
    }


def _products(tokens: _Tokens, active, decay):
    """beta of each token; and its decays within the window: before, after, levels of `decay_products`."""
    g = jnp.where(active[:, None, :, None], tokens.gates[0], 0)
    if tokens.reset is None:
        before, after, levels = decay_products(g[None])
        return decay[:, :, None] * before[0], before[0], after[0], levels
    reset = jnp.broadcast_to(tokens.reset[:, None, :, None], g.shape)
    before, after, levels = decay_products(jnp.where(reset, -jnp.inf, g)[None])

    def join(x, y):
        return jnp.where(y[1], y[0], x[0] * y[0]), x[1] | y[1]

    beta, _ = lax.associative_scan(join, (jnp.exp(g), reset), axis=2)
    return beta, before[0], after[0], levels


def _miras_chunk(norm, primal, gradients, start, change, decay, tokens, active):
    q, k, v, rate, gates = tokens[:5]
    matmul = _matmul_for(tokens, start)
    rate = jnp.where(active[:, None, :, None], rate, 0)
    beta, before, after, levels = _products(tokens, active, decay)
    weights = jax.tree.map(primal, start)
    hidden, d_in, d_out = gradients(matmul, weights, k, v, gates)

    # Layer by layer x W_t: through the chunk's start, through the updates that entered, through those of the window.
    scores = vector_scores(1.0, q[None], (-rate * k)[None], levels, partial(matmul))[0]
    z = matmul("bhcd,bhde->bhce", q * beta, weights["w_in"]) + matmul("bhcd,bhde->bhce", q * before, change["w_in"])
    read = jax.nn.gelu(z + matmul("bhcs,bhse->bhce", scores, d_in))
    scores = matmul("bhce,bhse->bhcs", read, hidden)
    y = beta * matmul("bhce,bhed->bhcd", read, weights["w_out"]) + before * matmul("bhce,bhed->bhcd", read, change["w_out"])
    y = y + _gated_sum(matmul, scores, -rate * d_out, levels)
    scale, bias = norm
    o = q + scale * _normalize(y)[0] + bias

    written = _updates(matmul, after, rate, k, hidden, d_in, d_out)
    change = jax.tree.map(jnp.add, _decayed(before[:, :, -1], change), written)
    return o, start, change, beta[:, :, -1]


def _gated_sum(matmul, scores, values, levels):
    """sum_{j<=i} scores_ij (prod_{j<l<=i} a_l) values_j with decays a channel of the values."""
    own, blocks = take_apart(scores)
    total = own[..., None] * values
    for (ahead, behind), block in zip(levels, blocks, strict=True):
        left = halves(values, ahead.shape[-2])[0]
        right = ahead[0] * matmul("bhmij,bhmjd->bhmid", block, behind[0] * left)
        total = total + join(jnp.zeros_like(right), right)
    return total


def _memora_chunk(norm, gradients, start, change, decay, tokens, active):
    k, v, rate, gates = tokens[1:5]
    matmul = _matmul_for(tokens, start)
    # The lag token, as a window of its own; there is at most one, for such rows are not packed.
    lag = (active & (tokens.position == 0))[:, None, :, None]
    pick = lambda x: jnp.sum(jnp.where(lag, x, 0), axis=2, keepdims=True)  # noqa: E731
    one_k, one_rate = pick(k), pick(rate)
    log_softmax = partial(jax.tree.map, partial(jax.nn.log_softmax, axis=-2))
    log_weights = log_softmax(start)
    hidden, d_in, d_out = gradients(matmul, jax.tree.map(jnp.exp, log_weights), one_k, pick(v), (pick(gates[0]),))
    written = _updates(matmul, 1.0, one_rate, one_k, hidden, d_in, d_out)
    moved = jax.tree.map(jnp.add, _decayed(jnp.exp(pick(gates[0]))[:, :, 0], log_weights), written)
    start = _where(jnp.any(lag, axis=(1, 2, 3)), log_softmax(moved), start)

    # Not exp: after the last token of a chunk the logarithms are not normalised.
    weights = jax.tree.map(partial(jax.nn.softmax, axis=-2), start)
    others = active[:, None, :, None] & ~lag
    _, before, after, _ = _products(tokens, others[:, 0, :, 0], decay)
    hidden, d_in, d_out = gradients(matmul, weights, k, v, gates)
    written = _updates(matmul, after, jnp.where(others, rate, 0), k, hidden, d_in, d_out)
    change = jax.tree.map(jnp.add, _decayed(before[:, :, -1], change), written)

    scale, bias = norm
    read = jax.nn.gelu(matmul("bhcd,bhde->bhce", tokens.q, weights["w_in"]))
    o = tokens.q + scale * _normalize(matmul("bhce,bhed->bhcd", read, weights["w_out"]))[0] + bias
    return o, start, change, decay * before[:, :, -1]


def _miras_finish(start, change, decay):
    return jax.tree.map(jnp.add, _decayed(decay, start), change)
