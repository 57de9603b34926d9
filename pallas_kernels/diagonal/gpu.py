"""Diagonal linear recurrences on Hopper GPUs (Mosaic GPU): h_t = a_t h_{t-1} + b_t, each channel by itself, and their gradient.

A warpgroup walks 128 channels, one a thread, token by token; the copy engine brings tiles of 32 tokens ahead of it and takes
the results away. Backward walks in reverse,

    dh_t = do_t + a_{t+1} dh_{t+1},  da_t = dh_t h_{t-1},  db_t = dh_t,

and makes da in the same pass. Where rows and channels are too few to fill the chip, time is split into segments: a first walk
finds what each adds to the state and the product of its decays, and a second one starts from the states that enter them.

Per token and channel, float32: forward 12 bytes and 2 FLOPs, backward 20 bytes (with segments 20 and 28): memory bounds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu
from pallas_kernels.gpu import CHIPS, F32, Call, load, walk_chunks

TILE = 32  # tokens
WIDTH = 128  # channels of a warpgroup
LANES = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)
FEWEST = 8  # tiles of a segment


def declines(*, dtype, chip: str) -> str | None:
    """Why the kernel does not run on numbers of this dtype on this chip (`jax.Device.device_kind`), or None."""
    if not any(name in chip for name in CHIPS):
        return f"the GPU kernel is made for Hopper ({', '.join(CHIPS)}), not for {chip or 'an unknown chip'}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the GPU kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


def _walk(call, name, step, inputs, results, states, *, first=None, reverse=False):
    """Walk the tiles of [B, T, D] in order, a warpgroup for 128 channels of each segment of time.

    Args:
      step: of (rows of the inputs in memory [TILE, WIDTH] by name, the row before the first or None, results likewise, carried
        values) returns the carried values.
      inputs: name -> [B, T, D].
      results: names of the arrays [B, T, D] that `step` fills.
      states: the carried values that enter the segments, [B, S, D] each.
      first: (name of an input, [B, D] what stands before its token 0) for the row before.

    Returns:
      results, and the carried values that leave the segments.
    """
    B, T, D = next(iter(inputs.values())).shape
    S = states[0].shape[1]
    tiles = T // TILE
    each = -(-tiles // S)
    stages = 3
    scratch = {f"{key}_s": plgpu.SMEM((stages, TILE, WIDTH), F32) for key in inputs}
    scratch |= {f"{key}_out": plgpu.SMEM((TILE, WIDTH), F32) for key in results}
    scratch |= {
        "full": plgpu.Barrier(num_arrivals=len(inputs) + (first is not None), num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    }  # fmt: skip
    operands = [*inputs.values(), *states]
    if first is not None:
        operands.append(first[1])
        scratch["before_s"] = plgpu.SMEM((stages, WIDTH), F32)
    shape = jax.ShapeDtypeStruct
    out_type = [shape((B, T, D), F32)] * len(results) + [shape((B, S, D), F32)] * len(states)

    def body(*refs, full, empty, before_s=None, **memory):
        refs = list(refs)
        of_inputs = {key: refs.pop(0) for key in inputs}
        of_states = [refs.pop(0) for _ in states]
        first_ref = refs.pop(0) if first is not None else None
        of_results, finals = refs[: len(results)], refs[len(results) :]
        b, s, d = (lax.axis_index(axis) for axis in ("b", "s", "d"))
        channels = pl.ds(d * WIDTH, WIDTH)
        start = s * each
        count = jnp.maximum(jnp.minimum(start + each, tiles) - start, 0)

        def tile(n):
            return start + (count - 1 - n if reverse else n)

        def fetch(n, slot):
            tokens = pl.ds(tile(n) * TILE, TILE)
            for key, ref in of_inputs.items():
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, channels], memory[f"{key}_s"].at[slot], full.at[slot])
            if first is not None:
                before = jnp.maximum(tile(n) * TILE - 1, 0)
                plgpu.copy_gmem_to_smem(of_inputs[first[0]].at[b, before, channels], before_s.at[slot], full.at[slot])

        at_first = None if first is None else plgpu.load(first_ref.at[b, channels], layout=LANES, optimized=False)

        def turn(n, slot, carried):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            before = None
            if first is not None:
                before = jnp.where(lax.broadcast(tile(n) == 0, (WIDTH,)), at_first, load(before_s.at[slot], LANES))
            rows = {key: memory[f"{key}_s"].at[slot] for key in inputs}
            carried = step(rows, before, {key: memory[f"{key}_out"] for key in results}, carried)
            if results:
                plgpu.commit_smem()
                for key, ref in zip(results, of_results, strict=True):
                    plgpu.copy_smem_to_gmem(memory[f"{key}_out"], ref.at[b, pl.ds(tile(n) * TILE, TILE), channels])
            return carried

        carried = tuple(plgpu.load(ref.at[b, s, channels], layout=LANES, optimized=False) for ref in of_states)
        carried = walk_chunks(fetch, turn, carried, count=count, wg=jnp.int32(0), wgs=1, full=full, empty=empty)
        for ref, x in zip(finals, carried, strict=True):
            ref.at[b, s, channels][...] = x
        plgpu.wait_smem_to_gmem(0)

    found = call(body, name, {"b": B, "s": S, "d": D // WIDTH}, operands, out_type, scratch, 1)
    return found[: len(results)], found[len(results) :]


def _forward_step(rows, before, out, carried):
    [h] = carried
    for t in range(TILE):
        h = load(rows["a"].at[t], LANES) * h + load(rows["b"].at[t], LANES)
        out["h"].at[t][...] = h
    return (h,)


def _forward_totals(rows, before, out, carried):
    h, product = carried
    for t in range(TILE):
        a = load(rows["a"].at[t], LANES)
        h, product = a * h + load(rows["b"].at[t], LANES), a * product
    return h, product


def _backward_step(rows, before, out, carried):
    [later] = carried  # a_{t+1} dh_{t+1}
    for t in reversed(range(TILE)):
        dh = load(rows["do"].at[t], LANES) + later
        out["db"].at[t][...] = dh
        out["da"].at[t][...] = dh * (load(rows["h"].at[t - 1], LANES) if t else before)
        later = load(rows["a"].at[t], LANES) * dh
    return (later,)


def _backward_totals(rows, before, out, carried):
    later, product = carried
    for t in reversed(range(TILE)):
        a = load(rows["a"].at[t], LANES)
        later, product = a * (load(rows["do"].at[t], LANES) + later), a * product
    return later, product


def _entering(call, name, totals, inputs, state, *, reverse=False):
    """The carried values that enter segments of time [B, S, D], of which the first to be walked gets `state`."""
    B, T, D = next(iter(inputs.values())).shape
    S = max(1, min(2 * gpu.SMS // (B * D // WIDTH), T // TILE // FEWEST))
    S = -(-(T // TILE) // -(-(T // TILE) // S))  # none is empty
    if S == 1:
        return state[:, None]
    start = (jnp.zeros((B, S, D), F32), jnp.ones((B, S, D), F32))
    _, (added, product) = _walk(call, name, totals, inputs, (), start, reverse=reverse)

    def joined(first, second):
        (added_1, product_1), (added_2, product_2) = first, second
        return product_2 * added_1 + added_2, product_1 * product_2

    def shifted(x, before):
        """Every segment's number in the place of the one walked after it."""
        parts = [x[:, 1:], before] if reverse else [before, x[:, :-1]]
        return jnp.concatenate(parts, axis=1)

    before = (shifted(added, state[:, None]), shifted(product, jnp.ones_like(state)[:, None]))
    return lax.associative_scan(joined, before, axis=1, reverse=reverse)[0]


def _whole(x, fill=0.0):
    """[B, T, D] with whole tiles of tokens and blocks of channels."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, -x.shape[2] % WIDTH)), constant_values=fill)


def _of_channels(state):
    return jnp.pad(state, ((0, 0), (0, -state.shape[1] % WIDTH)))


def forward(a, b, state, *, interpret=False):
    """h of every token.

    Args:
      a, b: [B, T, D] float32; state: [B, D] float32, the h before token 0.
      interpret: run by the interpreter: True, or its `InterpretGPUParams`.

    Returns:
      h [B, T, D] float32.
    """
    call = Call(interpret)
    inputs = {"a": _whole(a), "b": _whole(b)}
    entering = _entering(call, "diagonal_states", _forward_totals, inputs, _of_channels(state))
    [h], _ = _walk(call, "diagonal_forward", _forward_step, inputs, ("h",), (entering,))
    return h[:, : b.shape[1], : b.shape[2]]


def backward(a, h, do, state, d_final, *, interpret=False):
    """Gradients from the cotangent of h.

    Args:
      a, state, interpret: as given to `forward`; h: what it returned; do: [B, T, D] float32.
      d_final: [B, D] float32, added to the cotangent of the last h.

    Returns:
      da and db [B, T, D], and the gradient of the state [B, D], float32.
    """
    call, (_, T, D) = Call(interpret), h.shape
    # Padding passes the last token's cotangent on.
    a, h, do = _whole(a, 1.0), _whole(h), _whole(do)
    state, d_final = (_of_channels(x) for x in (state, d_final))
    entering = _entering(call, "diagonal_backward_states", _backward_totals, {"a": a, "do": do}, d_final, reverse=True)
    (da, db), [d_state] = _walk(
        call, "diagonal_backward", _backward_step, {"a": a, "h": h, "do": do}, ("da", "db"), (entering,), first=("h", state),
        reverse=True,
    )  # fmt: skip
    return da[:, :T, :D], db[:, :T, :D], d_state[:, 0, :D]
