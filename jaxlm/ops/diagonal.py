"""Diagonal linear recurrences: h_t = a_t h_{t-1} + b_t, each channel by itself.

Three ops share this file, by what enters a step and what is kept of it:

- `diagonal_recurrence`: any a and b, every h is an output. HGRN (arXiv 2311.04823), minGRU and minLSTM (2410.01201).
- `diagonal_ssm`: a fixed complex a, N states a channel read out to one number. S4D (2206.11893).
- `selective_scan`: a and b made of small per-token factors, N states a channel read out to one number. Mamba (2312.00752).

The last two never hold their N states for all tokens at once: they keep one state a chunk.

Every weight here is a product of factors a of modulus <= 1, never a quotient, nor the exponential of a difference of
cumulative sums: nothing overflows, and a token decayed by exp(-80) costs its neighbours no digits. A document boundary
is a factor 0.

Each op is, underneath, a `run_*` function of arrays, a reset mask and an initial state, for whoever splits time over
devices: there a reset may be True at a row's token 0 and then drops the state that enters. The state leaves a piece as
S_out = M S_in + N, elementwise, with N what `run_*` leaves from zeros and M what `*_transition` gives.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxlm.ops import kernels
from jaxlm.ops.forms import choose
from jaxlm.ops.ranges import check_log_decay, check_range
from jaxlm.ops.segments import check_segment_ids, resets
from jaxlm.parallel import sequence

# Backends of XLA that compute with complex numbers.
COMPLEX_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")

Number = Float[Array, "..."] | Complex[Array, "..."]


def diagonal_recurrence(
    log_a: Number,
    b: Number,
    *,
    initial_state: Number | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Number, Number]:
    """h_t = exp(log_a_t) h_{t-1} + b_t, elementwise over the axes after batch and time.

    Decays and states are float32 (complex64 where b is complex; float64, complex128 if an input is).

    The gradient is the reverse recurrence dh_t = do_t + a_{t+1} dh_{t+1} with db = dh and da_t = dh_t h_{t-1} (Martin and
    Cundy 2018, arXiv 1709.04057; by jax's convention for complex numbers nothing is conjugated) in the form that was
    asked for; it keeps a and h. "recurrent" leaves the gradient to autodiff.

    Args:
      log_a: natural logarithm of the factor, of real part <= 0: [B, T, *D] as b, or [*D] if it is the same at all times.
        Larger values make the state grow; they are an error where values are known (`ops.ranges`).
      b: what is added at every token, [B, T, *D], of any number of channel axes.
      initial_state: [B, *D], the h that token 0 continues; None for zeros.
      segment_ids: h is zeroed between two tokens whose ids differ, so that each document of a packed row gets what it
        gets alone. The first run of a row continues `initial_state`.
      form: "recurrent" (token by token), "parallel" (`jax.lax.associative_scan`), "chunked" (chunks side by side, token
        by token, then a scan of their ends), "kernel" (Pallas, on TPUs and Hopper GPUs, for real numbers), "fft" (a
        convolution with the powers of a; only for log_a [*D] without segment ids, and later tokens change the rounding of
        earlier outputs) or "auto" (see `forms.choose`).
      chunk_size: tokens a chunk, a power of two.

    Returns:
      h [B, T, *D] in b's dtype, and the last h [B, *D], unrounded.

    Raises:
      ValueError: on shapes that do not fit, a complex log_a or state for a real b, or a form that is unknown or cannot run.
    """
    if b.ndim < 2 or b.shape[1] < 1:
        raise ValueError(f"b must be [B, T, *D] with at least one token, got {b.shape}")
    if log_a.shape not in (b.shape, b.shape[2:]):
        raise ValueError(f"log_a must be [B, T, *D] = {b.shape} as b, or [*D] = {b.shape[2:]}, got {log_a.shape}")
    _check_state(initial_state, "[B, *D]", (b.shape[0], *b.shape[2:]))
    for name, x in (("log_a", log_a), ("initial_state", initial_state)):
        if x is not None and jnp.iscomplexobj(x) and not jnp.iscomplexobj(b):
            raise ValueError(f"{name} is complex and b is {b.dtype}; make b complex, h is")
    check_log_decay(log_a, "log_a")
    platform, _ = kernels.target()
    if jnp.iscomplexobj(b) and platform not in COMPLEX_PLATFORMS:
        raise ValueError(
            f"b is {b.dtype}, but {platform} has no complex numbers; use diagonal_ssm, which carries pairs of reals, or a "
            f"device of {', '.join(COMPLEX_PLATFORMS)}"
        )
    reset = _resets(segment_ids, b.shape[:2], chunk_size)
    # The kernel has the state in float32: float64 of it counts as float64 of all.
    precise = _precise(log_a, b, initial_state)
    operand = jnp.result_type(log_a, b) if precise == jnp.float32 else precise
    form = choose("diagonal_recurrence", form, T=b.shape[1], dtype=operand).form
    if form in ("chunked", "kernel") and sequence.split(b.shape[1]):
        channels = ("heads", *(None,) * (b.ndim - 3)) if b.ndim > 2 else ()
        h, final_state = _over_shards(
            lambda inputs, reset, state: run_diagonal(*inputs, reset, state, form=form, chunk_size=chunk_size),
            lambda inputs, reset: diagonal_transition(inputs[0], reset, inputs[1].shape),
            (log_a, b), (channels if log_a.ndim < b.ndim else (*_TOKENS, *channels), (*_TOKENS, *channels)),
            (*_TOKENS, *channels), channels, b.shape[1], reset,
            _start(initial_state, (b.shape[0], *b.shape[2:]), log_a, b),
        )  # fmt: skip
        return h.astype(b.dtype), final_state
    h, final_state = run_diagonal(log_a, b, reset, initial_state, form=form, chunk_size=chunk_size)
    return h.astype(b.dtype), final_state


def run_diagonal(
    log_a: Number, b: Number, reset: Bool[Array, "B T"] | None, state: Number | None, *, form: str, chunk_size: int = 64
) -> tuple[Number, Number]:
    """`diagonal_recurrence` with resets for segment ids: where True, h_{t-1} is dropped, at token 0 too.

    Returns:
      h [B, T, *D] and the last h [B, *D], both unrounded.
    """
    precise = _precise(log_a, b, state)
    b = b.astype(precise)
    if form == "fft" and (log_a.ndim == b.ndim or reset is not None):
        raise ValueError('form="fft" takes log_a [*D] and no segment ids; use form="chunked"')
    state = jnp.zeros((b.shape[0], *b.shape[2:]), precise) if state is None else state.astype(precise)
    a = jnp.exp(log_a.astype(_precise(log_a)))
    if log_a.ndim < b.ndim:
        a = a[None, None]
    if reset is not None:
        a = jnp.where(_over(reset, b.ndim), 0, a)
    if form == "recurrent":
        return _recurrent(a, b, state)
    return _solve(form, chunk_size, a, b, state)


def diagonal_transition(log_a: Number, reset: Bool[Array, "B T"] | None, shape: tuple[int, ...]) -> Number:
    """M [B, *D] or [1, *D] of `run_diagonal` for b of this shape [B, T, *D]: the product of the factors of all tokens."""
    log_a = log_a.astype(_precise(log_a))
    total = shape[1] * log_a[None] if log_a.ndim < len(shape) else jnp.sum(log_a, axis=1)
    return _unless_reset(jnp.exp(total), reset)


_TOKENS = ("batch", sequence.AXIS)


def _over_shards(run, transition, inputs, input_axes, output_axes, state_axes, length: int, reset, state, **options):
    """A recurrence whose tokens are split over devices (`jaxlm.parallel.sequence`); channels follow the heads."""
    sizes = {"batch": state.shape[0], sequence.AXIS: length, **({"heads": state.shape[1]} if state.ndim > 1 else {})}
    op = sequence.Recurrence(run, transition, input_axes, output_axes, ("batch", *state_axes), **options)
    return sequence.recurrence(op, sizes, inputs, reset, state)


def _start(state, shape: tuple[int, ...], *arrays):
    """The state in the precision of the computation, zeros for None."""
    precise = _precise(*arrays, state)
    return jnp.zeros(shape, precise) if state is None else state.astype(precise)


def _check_state(state, name: str, shape: tuple[int, ...]) -> None:
    if state is not None and state.shape != shape:
        raise ValueError(f"initial_state must be {name} = {shape}, got {state.shape}")


def _check_modulus(a: Float[Array, "D 2 N"]) -> None:
    if not isinstance(a, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            modulus = jnp.linalg.norm(a.astype(_precise(a)), axis=1)
        # exp(i y) or a quotient of two numbers of one size is 1 but for rounding.
        most = 1 + 8 * float(jnp.finfo(a.dtype).eps)
        remedy = "it is a factor of the state, such as exp(dt * rate) with Re rate <= 0"
        check_range("the modulus of a", modulus, 0, most, remedy)


def _resets(segment_ids, shape: tuple[int, int], chunk_size: int):
    check_segment_ids(segment_ids, shape)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}; the default is 64")
    return None if segment_ids is None else resets(segment_ids)


def _precise(*arrays) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*(x.dtype for x in arrays if x is not None)), jnp.float32)


def _over(mask: Array, ndim: int) -> Array:
    """Append axes of size 1 up to `ndim`."""
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def _unless_reset(m: Array, reset: Bool[Array, "B T"] | None) -> Array:
    return m if reset is None else jnp.where(_over(jnp.any(reset, axis=1), m.ndim), 0, m)


# Below, a is [B, T, *D], or has 1 for B, or for B and T; b is [B, T, *D], state [B, *D].


def _recurrent(a, b, state):
    """The definition, one token a step."""

    def step(h, token):
        a, b = token
        h = a * h + b
        return h, h

    if b.shape[1] == 1:
        state, h = step(state, (a[:, 0], b[:, 0]))
        return h[:, None], state
    a = jnp.broadcast_to(a, (a.shape[0], *b.shape[1:]))
    state, h = lax.scan(step, state, (jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)))
    return jnp.moveaxis(h, 0, 1), state


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(form: str, size: int, a, b, state):
    """h [B, T, *D] and the last h [B, *D]."""
    h = _FORMS[form](size, a, b, state)
    return h, h[:, -1]


def _solve_forward(form, size, a, b, state):
    h = _FORMS[form](size, a, b, state)
    return (h, h[:, -1]), (a, h, state)


def _solve_backward(form, size, residuals, cotangents):
    (a, h, state), (d_out, d_final) = residuals, cotangents
    if form == "kernel":
        da, dh, d_state = kernels.diagonal_gradient(jnp.broadcast_to(a, h.shape), h, state, d_out, d_final)
        return jnp.sum(da, axis=[i for i in (0, 1) if a.shape[i] == 1], keepdims=True), dh, d_state
    d_out = d_out.at[:, -1].add(d_final)
    later = a if a.shape[1] == 1 else jnp.roll(a, -1, axis=1)  # what comes around multiplies a state of zeros
    dh = _FORMS[form](size, jnp.flip(later, 1), jnp.flip(d_out, 1), jnp.zeros_like(state))
    dh = jnp.flip(dh, 1)
    da = dh * jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    da = jnp.sum(da, axis=[i for i in (0, 1) if a.shape[i] == 1], keepdims=True)
    return (da if jnp.iscomplexobj(a) else jnp.real(da)), dh, a[:, 0] * dh[:, 0]


_solve.defvjp(_solve_forward, _solve_backward)


def _parallel(size, a, b, state):
    def combine(earlier, later):
        (a1, h1), (a2, h2) = earlier, later
        return a2 * a1, a2 * h1 + h2

    b = b.at[:, 0].add(a[:, 0] * state)
    a = jnp.broadcast_to(a, (a.shape[0], *b.shape[1:]))
    return lax.associative_scan(combine, (a, b), axis=1)[1]


def _chunked(size, a, b, state):
    """All chunks from zeros, side by side and token by token, then the states between chunks, then what these add."""
    length = b.shape[1]
    size = min(size, length)
    b = _to_chunks(b, size)
    a = jnp.broadcast_to(a[None], (size, *a.shape)) if a.shape[1] == 1 else _to_chunks(a, size)

    def step(carry, token):
        product, h = carry
        a, b = token
        carry = a * product, a * h + b
        return carry, carry

    start = jnp.ones(a.shape[1:], a.dtype), jnp.zeros(b.shape[1:], b.dtype)
    (product, write), (products, h) = lax.scan(step, start, (a, b))
    leaving = _parallel(size, product, write, state)
    entering = jnp.concatenate([state[:, None], leaving[:, :-1]], axis=1)
    h = jnp.moveaxis(h + products * entering, 0, 2)
    return h.reshape(h.shape[0], -1, *h.shape[3:])[:, :length]


def _kernel(size, a, b, state):
    return kernels.diagonal_recurrence(jnp.broadcast_to(a, b.shape), b, state)


def _to_chunks(x, size: int):
    """[B, T, ..] to [C, B, N, ..], the last chunk filled with zeros."""
    return jnp.moveaxis(_rows(x, size), 2, 0)


def _rows(x, size: int):
    """[B, T, ..] to [B, N, C, ..], the last chunk filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _fft(size, a, b, state):
    length = b.shape[1]
    a = a[0, 0]
    powers = _powers(a, length + 1, jnp.multiply)
    return _convolve(powers[None, :-1], b) + powers[None, 1:] * state[:, None]


_FORMS = {"parallel": _parallel, "chunked": _chunked, "fft": _fft, "kernel": _kernel}


def _convolve(kernel, x):
    """sum_l kernel[l] x[t - l] along axis 1, by transforms of a length that nothing wraps around."""
    length = x.shape[1]
    size = 1 << (2 * length - 1).bit_length()
    if jnp.iscomplexobj(x):
        return jnp.fft.ifft(jnp.fft.fft(kernel, size, axis=1) * jnp.fft.fft(x, size, axis=1), axis=1)[:, :length]
    product = jnp.fft.rfft(kernel, size, axis=1) * jnp.fft.rfft(x, size, axis=1)
    return jnp.fft.irfft(product, size, axis=1)[:, :length]


def _powers(a, count: int, multiply):
    """[count, ..]: 1, a, a^2, .. by doubling; log2(count) products of whole blocks."""
    # a^0 = 1.
    one = jnp.ones_like(a) if multiply is jnp.multiply else _one(a)
    powers, top = one[None], a
    while powers.shape[0] < count:
        powers = jnp.concatenate([powers, multiply(powers, top)])
        top = multiply(top, top)
    return powers[:count]


# Complex numbers as pairs: not every accelerator has complex arithmetic, and products with tables of them are real
# matrix products with twice the columns. A pair is the axis before the last, [.., 2, N].


def pair_product(x: Float[Array, "*X 2 N"], y: Float[Array, "*Y 2 N"]) -> Float[Array, "*Z 2 N"]:
    (x_re, x_im), (y_re, y_im) = (x[..., 0, :], x[..., 1, :]), (y[..., 0, :], y[..., 1, :])
    return jnp.stack([x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re], axis=-2)


def _one(like: Float[Array, "*X 2 N"]) -> Float[Array, "*X 2 N"]:
    """1 as pairs: only the first of a pair is one."""
    return jnp.ones_like(like).at[..., 1, :].set(0)


def _conjugate(x: Float[Array, "*X 2 N"]) -> Float[Array, "*X 2 N"]:
    """Re sum_n x_n y_n is the plain dot product of the pairs conj(x) and y."""
    return x * jnp.asarray([[1], [-1]], x.dtype)


def diagonal_ssm(
    u: Float[Array, "B T D"],
    a: Float[Array, "D 2 N"],
    c: Float[Array, "D 2 N"],
    *,
    initial_state: Float[Array, "B D 2 N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D 2 N"]]:
    """h_t = a h_{t-1} + u_t and y_t = Re sum_n c_n h_tn: N complex states a channel, all fed by its input (S4D).

    The time-invariant diagonal state space model of Gu et al. 2022 (arXiv 2206.11893, eq. 3), discretised: its input
    matrix and the factor 2 of conjugate pairs go into c. All is float32 (float64 if an input is). Complex numbers are
    pairs of reals, (real, imaginary) along the axis before the last.

    Every form is differentiated by JAX, without a rule of its own.

    Args:
      u: inputs.
      a: factors, |a| <= 1. Larger ones make the state grow; they are an error where values are known (`ops.ranges`).
      c: read-out.
      initial_state: the h that token 0 continues; None for zeros.
      segment_ids: h is zeroed between two tokens whose ids differ. The first run continues `initial_state`.
      form: "recurrent"; "chunked" (per channel Toeplitz blocks of C x C and one state a chunk); "parallel" (the same with
        one chunk: O(T^2)); "fft" (convolution with the kernel Re sum_n c_n a_n^l, O(T log T); from zeros and without
        segment ids only, and later tokens change the rounding of earlier outputs); or "auto" (see `forms.choose`).
      chunk_size: C, a power of two.

    Returns:
      y in u's dtype, and the last h.

    Raises:
      ValueError: on shapes that do not fit, values known to be out of range, or a form that is unknown or cannot run.
    """
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"u must be [B, T, D] with at least one token, got {u.shape}")
    if a.ndim != 3 or a.shape[:2] != (u.shape[2], 2) or c.shape != a.shape:
        raise ValueError(f"a and c must both be [D, 2, N] with D = {u.shape[2]} as in u, got {a.shape} and {c.shape}")
    _check_state(initial_state, "[B, D, 2, N]", (u.shape[0], *a.shape))
    _check_modulus(a)
    reset = _resets(segment_ids, u.shape[:2], chunk_size)
    if form in ("auto", "chunked") and sequence.split(u.shape[1]):
        states = ("heads", None, None)
        y, final_state = _over_shards(
            lambda inputs, reset, state: run_ssm(*inputs, reset, state, form="chunked", chunk_size=chunk_size),
            lambda inputs, reset: ssm_transition(inputs[1], reset, inputs[0].shape[1]),
            (u, a, c), ((*_TOKENS, "heads"), states, states), (*_TOKENS, "heads"), states, u.shape[1], reset,
            _start(initial_state, (u.shape[0], *a.shape), u, a, c), apply=pair_product, transpose=_conjugate,
        )  # fmt: skip
        return y.astype(u.dtype), final_state
    form = choose("diagonal_recurrence", form, T=u.shape[1], dtype=u.dtype, read_out=True).form
    y, final_state = run_ssm(u, a, c, reset, initial_state, form=form, chunk_size=chunk_size)
    return y.astype(u.dtype), final_state


def run_ssm(
    u: Float[Array, "B T D"],
    a: Float[Array, "D 2 N"],
    c: Float[Array, "D 2 N"],
    reset: Bool[Array, "B T"] | None,
    state: Float[Array, "B D 2 N"] | None,
    *,
    form: str,
    chunk_size: int = 64,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D 2 N"]]:
    """`diagonal_ssm` with resets for segment ids: where True, h_{t-1} is dropped, at token 0 too.

    Each row has as many tokens as `lengths` says, T if None. What stands behind them must have u = 0; it does not decay the
    state, which a reset there still drops.
    """
    if form == "fft" and (reset is not None or state is not None or lengths is not None):
        raise ValueError('form="fft" takes neither initial_state nor segment_ids nor lengths; use form="chunked"')
    precise = _precise(u, a, c, state)
    u, a, c = (x.astype(precise) for x in (u, a, c))
    state = jnp.zeros((u.shape[0], *a.shape), precise) if state is None else state.astype(precise)
    if form == "recurrent":
        return _ssm_recurrent(u, a, c, reset, state, lengths)
    size = 1 << (u.shape[1] - 1).bit_length() if form == "parallel" else chunk_size
    return _ssm_chunked(u, a, c, reset, state, lengths, size, fft=form == "fft")


def ssm_transition(
    a: Float[Array, "D 2 N"], reset: Bool[Array, "B T"] | None, length: int, lengths: Int[Array, " B"] | None = None
) -> Float[Array, "B D 2 N"] | Float[Array, "1 D 2 N"]:
    """M of `run_ssm` over `length` tokens, of which a row has `lengths`: the power of a, or 0; pairs, to be multiplied as
    complex numbers."""
    square = a.astype(_precise(a))
    power = _one(square)[None]
    lengths = jnp.full(1, length) if lengths is None else lengths
    for bit in range(length.bit_length()):
        power = jnp.where(_over(lengths >> bit & 1, 4) == 1, pair_product(power, square), power)
        square = pair_product(square, square)
    return _unless_reset(power, reset)


def _ssm_recurrent(u, a, c, reset, state, lengths):
    """The definition, one token a step."""

    def step(h, token):
        u, reset, counts = token
        if reset is not None:
            h = jnp.where(reset[:, None, None, None], 0, h)
        after = pair_product(a, h)
        after = after.at[..., 0, :].add(u[..., None])
        h = after if counts is None else jnp.where(counts[:, None, None, None], after, h)
        return h, jnp.sum(_conjugate(c) * h, axis=(-2, -1))

    counts = None if lengths is None else jnp.arange(u.shape[1]) < lengths[:, None]
    if u.shape[1] == 1:
        state, y = step(state, jax.tree.map(lambda x: x[:, 0], (u, reset, counts)))
        return y[:, None], state
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, reset, counts))
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


def _ssm_chunked(u, a, c, reset, state, lengths, size: int, *, fft: bool):
    """y = Toeplitz(k) u + (c a^{i+1}) h within a chunk that h enters, k_l = Re sum_n c_n a_n^l; h <- a^C h + sum a^.. u."""
    einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    length = u.shape[1]
    size = min(size, 1 << (length - 1).bit_length())
    chunks = math.ceil(length / size)
    last = length - (chunks - 1) * size
    powers = _powers(a, size + 1, pair_product)
    blocks = _rows(u, size)

    # What reaches a chunk's end, and how far into the chunk its entering state does.
    kept, reached = blocks, None
    if reset is not None:
        runs = _rows(reset, size)
        runs = lax.cumsum(runs.astype(jnp.int32), axis=2)
        kept = jnp.where((runs == runs[..., -1:])[..., None], blocks, 0)
        reached = runs == 0
    writes = einsum("bmjd,jdsn->mbdsn", kept[:, :-1], powers[size - 1 :: -1])
    passes = None if reset is None else jnp.moveaxis(reached[:, :-1, -1], 1, 0)

    def step(h, chunk):
        write, passes = chunk
        through = pair_product(powers[size], h)
        if passes is not None:
            through = jnp.where(passes[:, None, None, None], through, 0)
        return through + write, h

    state, entering = lax.scan(step, state, (writes, passes))
    entering = jnp.concatenate([entering, state[None]])
    # The last chunk may be shorter: nothing decays after its last token.
    if lengths is None:
        final = pair_product(powers[last], state)
        if reset is not None:
            final = jnp.where(reached[:, -1, -1, None, None, None], final, 0)
        final = final + einsum("bjd,jdsn->bdsn", kept[:, -1, :last], powers[:last][::-1])
    else:
        final = _final_of_lengths(lengths, blocks, powers, entering, reset)

    if fft:
        starts = pair_product(c, _powers(powers[size], chunks, pair_product))
        kernel = einsum("mdsn,jdsn->mjd", _conjugate(starts), powers[:-1])
        return _convolve(kernel.reshape(1, -1, u.shape[2])[:, :length], u), final

    reads = einsum("idsn,mbdsn->bmid", _conjugate(pair_product(c, powers[1:])), entering)
    taps = einsum("dsn,ldsn->ld", _conjugate(c), powers[:-1])
    if reset is None:
        lag = jnp.arange(size)[:, None] - jnp.arange(size)
        toeplitz = jnp.where(lag[..., None] >= 0, taps[jnp.maximum(lag, 0)], 0)
        y = einsum("ijd,bmjd->bmid", toeplitz, blocks) + reads
    else:
        y = _within_runs(taps, blocks, runs) + jnp.where(reached[..., None], reads, 0)
    return y.reshape(u.shape[0], -1, u.shape[2])[:, :length], final


def _final_of_lengths(
    lengths: Int[Array, " B"], blocks: Float[Array, "B M C D"], powers: Float[Array, "C+1 D 2 N"],
    entering: Float[Array, "M B D 2 N"], reset: Bool[Array, "B T"] | None,
) -> Float[Array, "B D 2 N"]:  # fmt: skip
    """The state after each row's last token, from the state that enters the chunk of this token."""
    rows, size = jnp.arange(lengths.shape[0]), blocks.shape[2]
    chunk = jnp.maximum(lengths - 1, 0) // size
    last = lengths - chunk * size
    # Its tokens moved to the chunk's end.
    source = jnp.arange(size) - size + last[:, None]
    u = jnp.where(source[..., None] < 0, 0, blocks[rows[:, None], chunk[:, None], jnp.maximum(source, 0)])
    h = pair_product(powers[last], entering[chunk, rows])
    if reset is not None:
        # A token, and what enters, reaches the end if no reset comes later.
        later = jnp.sum(reset, axis=1, keepdims=True) - lax.cumsum(reset.astype(jnp.int32), axis=1)
        later = _rows(later, size)[rows[:, None], chunk[:, None], jnp.maximum(source, 0)]
        u = jnp.where((later == 0)[..., None], u, 0)
        none = ~jnp.any(reset & (jnp.arange(reset.shape[1]) >= (chunk * size)[:, None]), axis=1)
        h = jnp.where(_over(none, 4), h, 0)
    return h + jnp.einsum("bjd,jdsn->bdsn", u, powers[size - 1 :: -1], precision=lax.Precision.HIGHEST)


def _within_runs(taps: Float[Array, "C D"], u: Float[Array, "B M C D"], runs: Int[Array, "B M C"]) -> Float[Array, "B M C D"]:
    """y_i = sum_{j <= i, same run} taps[i - j] u_j in chunks of a power of two.

    Tokens i and j part at exactly one block of 2s tokens, with i in its right half and j in its left. They are of one run
    if j is of the last run of the left half and so is i: the mask is a product of one for j and one for i, and what is
    between them is a matrix product with a Toeplitz block that all blocks of a level share.
    """
    y = taps[0] * u
    s = 1
    while s < u.shape[2]:
        left = u.reshape(*u.shape[:2], -1, 2, s, u.shape[3])[..., 0, :, :]
        run_left, run_right = (runs.reshape(*runs.shape[:2], -1, 2, s)[..., half, :] for half in (0, 1))
        kept = jnp.where((run_left == run_left[..., -1:])[..., None], left, 0)
        lag = s + jnp.arange(s)[:, None] - jnp.arange(s)
        reads = jnp.einsum("ijd,bmnjd->bmnid", taps[lag], kept, precision=lax.Precision.HIGHEST)
        reads = jnp.where((run_right == run_left[..., -1:])[..., None], reads, 0)
        y = y + jnp.stack([jnp.zeros_like(reads), reads], axis=3).reshape(u.shape)
        s *= 2
    return y


def selective_scan(
    u: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t and y_t = sum_n c_tn h_tn, N states a channel (Mamba).

    The selective state space model of Gu and Dao 2023 (arXiv 2312.00752, algorithm 2 with the discretisation of its
    code: exp for a, Euler for b). All is float32 (float64 if an input is).

    Args:
      u: inputs.
      dt: step sizes, >= 0.
      a: rates, <= 0. Rates or steps of the other sign make the state grow; they are an error where values are known.
      b: what each state takes of the input; channels share it.
      c: what is read of each state; channels share it.
      initial_state: the h that token 0 continues; None for zeros.
      segment_ids: h is zeroed between two tokens whose ids differ. The first run continues `initial_state`.
      form: "recurrent", "parallel" (holds all states, [B, T, D, N]), "chunked" (holds those of one chunk; its gradient
        keeps one state a chunk and recomputes the others) or "auto" (see `forms.choose`).
      chunk_size: tokens a chunk, a power of two.

    Returns:
      y in u's dtype, and the last h.

    Raises:
      ValueError: on shapes that do not fit, values known to be out of range, or a form that is unknown or cannot run.
    """
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"u must be [B, T, D] with at least one token, got {u.shape}")
    if dt.shape != u.shape:
        raise ValueError(f"dt must have the shape of u, {u.shape}, got {dt.shape}")
    if a.ndim != 2 or a.shape[0] != u.shape[2]:
        raise ValueError(f"a must be [D, N] with D = {u.shape[2]} as in u, got {a.shape}")
    for name, x in (("b", b), ("c", c)):
        if x.shape != (*u.shape[:2], a.shape[1]):
            raise ValueError(f"{name} must be [B, T, N] = {(*u.shape[:2], a.shape[1])}, got {x.shape}")
    _check_state(initial_state, "[B, D, N]", (u.shape[0], *a.shape))
    check_range("dt", dt, 0, math.inf, "it is a step size, such as softplus(x)")
    check_range("a", a, -math.inf, 0, "it is a rate of decay, such as -exp(x)")
    reset = _resets(segment_ids, u.shape[:2], chunk_size)
    if form in ("auto", "chunked") and sequence.split(u.shape[1]):
        channels, shared = (*_TOKENS, "heads"), (*_TOKENS, None)
        y, final_state = _over_shards(
            lambda inputs, reset, state: run_selective(*inputs, reset, state, form="chunked", chunk_size=chunk_size),
            lambda inputs, reset: selective_transition(inputs[1], inputs[2], reset),
            (u, dt, a, b, c), (channels, channels, ("heads", None), shared, shared), channels, ("heads", None),
            u.shape[1], reset, _start(initial_state, (u.shape[0], *a.shape), u, dt, a, b, c),
        )  # fmt: skip
        return y.astype(u.dtype), final_state
    form = choose("diagonal_recurrence", form, T=u.shape[1], dtype=u.dtype, read_out=True).form
    y, final_state = run_selective(u, dt, a, b, c, reset, initial_state, form=form, chunk_size=chunk_size)
    return y.astype(u.dtype), final_state


def run_selective(
    u: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    state: Float[Array, "B D N"] | None,
    *,
    form: str,
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """`selective_scan` with resets for segment ids: where True, h_{t-1} is dropped, at token 0 too."""
    if form == "fft":
        raise ValueError('form="fft" needs rates that do not change in time; use form="chunked"')
    precise = _precise(u, dt, a, b, c, state)
    batch, length, _ = u.shape
    a = a.astype(precise)
    state = jnp.zeros((batch, *a.shape), precise) if state is None else state.astype(precise)

    def expand(u, dt, b):
        """Factors and additions [B, T, D, N]."""
        dt = dt.astype(precise)
        return jnp.exp(dt[..., None] * a), (dt * u.astype(precise))[..., None] * b.astype(precise)[..., None, :]

    def read(h, c):
        return jnp.einsum("...dn,...n->...d", h, c.astype(precise), precision=lax.Precision.HIGHEST)

    if form == "recurrent":

        def step(h, token):
            u, dt, b, c, reset = token
            factor, addition = expand(u, dt, b)
            h = factor * (h if reset is None else jnp.where(reset[:, None, None], 0, h)) + addition
            return h, read(h, c)

        if length == 1:
            state, y = step(state, jax.tree.map(lambda x: x[:, 0], (u, dt, b, c, reset)))
            return y[:, None], state
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, dt, b, c, reset))
        state, y = lax.scan(step, state, tokens)
        return jnp.moveaxis(y, 0, 1), state

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(state, tokens):
        u, dt, b, c, reset = tokens
        factors, additions = expand(u, dt, b)
        if reset is not None:
            factors = jnp.where(reset[..., None, None], 0, factors)
        h, final = _solve("parallel", 0, factors, additions, state)
        return final, read(h, c)

    # Padding tokens have dt = 0: they write nothing and decay nothing.
    size = length if form == "parallel" else min(chunk_size, length)
    chunks = jax.tree.map(lambda x: jnp.moveaxis(_rows(x, size), 1, 0), (u, dt, b, c, reset))
    state, y = lax.scan(chunk, state, chunks)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, u.shape[2])[:, :length], state


def selective_transition(
    dt: Float[Array, "B T D"], a: Float[Array, "D N"], reset: Bool[Array, "B T"] | None
) -> Float[Array, "B D N"]:
    """M of `run_selective`: the product of the factors of all tokens, or 0."""
    total = jnp.sum(dt.astype(_precise(dt, a)), axis=1)
    return _unless_reset(jnp.exp(total[..., None] * a), reset)
