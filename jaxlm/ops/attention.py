"""Causal softmax attention with grouped queries, sliding windows, packed documents and a ring-buffer cache."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops.forms import choose
from jaxlm.ops.segments import check_segment_ids, positions_in_runs, resets, run_index
from jaxlm.parallel import sequence

Cache = dict[str, Array]

# The chunked form takes queries in blocks, whose scores take B * H * BLOCK * S numbers; smaller ones for short
# sequences, for which SPANS blocks skip most of what the causal mask would hide.
BLOCK = 256
SMALL_BLOCK = 64
SPANS = 4


def init_attention_cache(
    batch: int, length: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike, value_dim: int | None = None
) -> Cache:
    """An empty cache of `length` slots: a ring into which token number n (over all calls) goes at slot n % length.

    Attention through it is exact while `length` is at least the window, or at least the number of tokens ever written.

    Returns:
      k [B, S, G, K] and v [B, S, G, V] of `dtype`; positions int32 [B, S], each key's position in its document, -1 for
      an empty slot; count int32 [], the number of tokens written so far, the same for all rows.

    Raises:
      ValueError: if length is less than 1.
    """
    if length < 1:
        raise ValueError(f"length={length} of the attention cache must be at least 1")
    return {
        "k": jnp.zeros((batch, length, kv_heads, head_dim), dtype),
        "v": jnp.zeros((batch, length, kv_heads, head_dim if value_dim is None else value_dim), dtype),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "count": jnp.zeros((), jnp.int32),
    }


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    form: str = "auto",
) -> tuple[Float[Array, "B T H V"], Cache | None]:
    """softmax(scale q k^T) v over the keys up to each query (Vaswani et al. 2017; grouped queries: arXiv 2305.13245).

    A query sees the keys of its own run (stretch of equal segment ids) at most window - 1 positions back. The first run
    of a row continues the document in the cache. Softmax and sums are float32 or finer.

    Args:
      q: queries.
      k: keys; query head h reads key head h // (H/G).
      v: values.
      scale: multiplies q; None for K ** -0.5.
      window: positions a query sees, its own included; None for all.
      segment_ids: document of each token; rows of ragged prompts are padded on the left with an id of their own, so
        that the padding is a run that nothing sees.
      positions: position of each token in its document, rising by one a token within a run. They matter to windows that
        reach into the cache. None counts from 0 in each run, in the first from the cache's newest position + 1.
      cache: from `init_attention_cache` or an earlier call.
      form: "parallel" (all scores at once), "chunked" (scores of a block of queries at a time, recomputed for the
        gradient), "recurrent" (token by token through the cache), "kernel" (cuDNN) or "auto" (see `forms.choose`).

    Returns:
      o in v's dtype, and the cache with the call's tokens written (the last S of them, if there are more) and the
      tokens of any run but the last dropped; None if none was given.

    Raises:
      ValueError: on shapes that do not fit, window < 1, H not a multiple of G, or a form that cannot run.
    """
    _check(q, k, v, window, positions, cache)
    batch, length, _, keys = q.shape
    check_segment_ids(segment_ids, (batch, length))
    scale = keys**-0.5 if scale is None else scale
    reset = None if segment_ids is None else resets(segment_ids)
    if cache is None and form in ("auto", "chunked") and sequence.split(length):
        return _over_shards(scale, window, q, k, v, reset), None
    form = choose(
        "attention", form, T=length, dtype=q.dtype, head_dim=keys, value_dim=v.shape[-1],
        masked=reset is not None, cached=cache is not None,
    ).form  # fmt: skip

    if form == "kernel":
        near = None if window is None else (window - 1, 0)
        o = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=near, implementation="cudnn"
        )
        return o, None
    if positions is None:
        start = jnp.zeros(batch, jnp.int32) if cache is None else jnp.max(cache["positions"], axis=1) + 1
        positions = positions_in_runs(reset, start, length)
    if form == "recurrent":
        used = cache
        if used is None:
            used = init_attention_cache(batch, length, k.shape[2], keys, k.dtype, v.shape[-1])
        o, used = _recurrent(q, k, v, positions, reset, used, scale, window)
        return o, None if cache is None else used
    queries, keys = _places(positions, None if reset is None else run_index(reset), cache)
    attend = _parallel if form == "parallel" else _chunked
    o = attend(q, *_with_cache(cache, k, v), queries, keys, scale, window)
    return o, None if cache is None else _write(cache, k, v, positions, reset)


def write_cache(
    cache: Cache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Cache:
    """An attention cache with the call's tokens written, without a query; runs but the last are dropped, as the op does."""
    old = cache["positions"]
    if segment_ids is not None:
        run = run_index(resets(segment_ids))
        positions = jnp.where(run == run[:, -1:], positions, -1)
        old = jnp.where(run[:, -1:] == 0, old, -1)
    total, slots = k.shape[1], old.shape[1]
    kept = min(total, slots)
    places = (cache["count"] + total - kept + jnp.arange(kept)) % slots

    def put(buffer, new):
        return buffer.at[:, places].set(new[:, total - kept :].astype(buffer.dtype), unique_indices=True)

    return {
        "k": put(cache["k"], k), "v": put(cache["v"], v), "positions": put(old, positions), "count": cache["count"] + total,
    }  # fmt: skip


def read_cache(
    scores: Float[Array, "B H S"], v: Float[Array, "B S G V"], visible: Bool[Array, "B S"]
) -> Float[Array, "B 1 H V"]:
    """softmax(scores) v of one token a row over the visible slots of a cache; head h reads value head h // (H/G)."""
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    batch, slots, groups, values = v.shape
    weights = weights.reshape(batch, groups, -1, slots)
    o = jnp.einsum("bgrs,bsgv->bgrv", weights, v, precision="highest", preferred_element_type=jnp.float32)
    return o.reshape(batch, 1, -1, values)


def score_cache(q: Float[Array, "B 1 H K"], k: Float[Array, "B S G K"]) -> Float[Array, "B H S"]:
    """q k^T of one token a row with the keys of a cache, float32; head h meets key head h // (H/G)."""
    batch, _, heads, size = q.shape
    q = q.reshape(batch, k.shape[2], -1, size).astype(k.dtype)
    scores = jnp.einsum("bgrk,bsgk->bgrs", q, k, precision="highest", preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, -1)


def _check(q, k, v, window, positions, cache) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with at least one token, got {q.shape}")
    batch, length, heads, keys = q.shape
    if k.ndim != 4 or (k.shape[:2], k.shape[3]) != ((batch, length), keys):
        raise ValueError(f"k must be [B, T, G, K] with B, T = {(batch, length)} and K = {keys} as in q, got {k.shape}")
    if heads % k.shape[2]:
        raise ValueError(
            f"q has H={heads} heads, which must be a multiple of k's G={k.shape[2]} heads; change one of them"
        )
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, G, V] with B, T, G = {k.shape[:3]} as in k, got {v.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (a query sees itself), or None for no window")
    if positions is not None and positions.shape != (batch, length):
        raise ValueError(f"positions must be [B, T] = {(batch, length)}, got {positions.shape}")
    if cache is not None:
        slots = cache["k"].shape[1]
        wanted = {
            "k": (batch, slots, *k.shape[2:]),
            "v": (batch, slots, *v.shape[2:]),
            "positions": (batch, slots),
            "count": (),
        }
        for name, shape in wanted.items():
            if cache[name].shape != shape:
                raise ValueError(
                    f"cache[{name!r}] must be {shape} to fit q, k and v, got {cache[name].shape}; "
                    "make it by init_attention_cache(B, length, G, K, dtype, V)"
                )


def _softmax_attention(q, k, v, mask: Bool[Array, "b T S"], scale: float):
    """Attention under a mask that leaves every query at least one key."""
    matmul = _matmul(q, k, v)
    q, k, v_heads = _group(q, k.shape[2]), _heads_first(k), _heads_first(v)
    scores = scale * matmul("bgrtk,bgsk->bgrts", q, k)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    return _ungroup(matmul("bgrts,bgsv->bgrtv", weights, v_heads)).astype(v.dtype)


def _matmul(q, k, v):
    operand = jnp.result_type(q, k, v)
    precise = jnp.promote_types(operand, jnp.float32)

    def matmul(equation, x, y):
        # HIGHEST concerns float32 operands alone, which TPUs and GPUs would otherwise round.
        exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": precise}
        return jnp.einsum(equation, x.astype(operand), y.astype(operand), **exact)

    return matmul


def _group(q: Float[Array, "B T H K"], groups: int) -> Float[Array, "B G R T K"]:
    return q.reshape(*q.shape[:2], groups, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)


def _ungroup(o: Float[Array, "B G R T V"]) -> Float[Array, "B T H V"]:
    batch, groups, repeats, length, values = o.shape
    return o.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * repeats, values)


def _heads_first(x: Float[Array, "B S G X"]) -> Float[Array, "B G S X"]:
    return x.transpose(0, 2, 1, 3)


class _Places(NamedTuple):
    """Where tokens stand, queries or keys, for the mask; None where it does not matter."""

    index: Int[Array, "1 L"]  # in the call; -1 for slots of the cache
    position: Int[Array, "b L"]  # what windows are measured in
    run: Int[Array, "b L"] | None  # -1 for empty slots


def _mask(query: _Places, key: _Places, window: int | None) -> Bool[Array, "b T S"]:
    mask = query.index[:, :, None] >= key.index[:, None, :]
    if window is not None:
        mask = mask & (query.position[:, :, None] - key.position[:, None, :] < window)
    if query.run is not None:
        mask = mask & (query.run[:, :, None] == key.run[:, None, :])
    return mask


def _places(positions, run, cache: Cache | None) -> tuple[_Places, _Places]:
    """The places of the call's tokens, and of the cache's slots and these tokens."""
    batch, length = positions.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if cache is None:
        # Positions rise by one a token within a run, so the index serves for windows; it keeps masks free of the batch.
        queries = _Places(index, index, run)
        return queries, queries
    queries = _Places(index, positions, jnp.zeros((batch, length), jnp.int32) if run is None else run)
    cached = cache["positions"]
    slots = _Places(jnp.full((1, cached.shape[1]), -1, jnp.int32), cached, jnp.minimum(cached, 0))
    return queries, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), slots, queries)


def _with_cache(cache: Cache | None, k, v):
    if cache is None:
        return k, v
    return tuple(jnp.concatenate([cache[name].astype(x.dtype), x], axis=1) for name, x in (("k", k), ("v", v)))


def _parallel(q, k, v, queries: _Places, keys: _Places, scale, window):
    return _softmax_attention(q, k, v, _mask(queries, keys, window), scale)


def _chunked(q, k, v, queries: _Places, keys: _Places, scale, window):
    """FlashAttention's algorithm (arXiv 2205.14135) with all keys of a query block in one tile: the forward pass keeps
    the output and the logarithm of the softmax's sum, the backward pass recomputes the weights."""
    o = _blocks(scale, window, _group(q, k.shape[2]), _heads_first(k), _heads_first(v), queries, keys)
    return _ungroup(o).astype(v.dtype)


def _over_shards(scale, window, q, k, v, reset):
    """Queries stay; keys and values of all shards are gathered (LASP-2H, arXiv 2502.07563; Llama 3's context parallelism),
    or those of the window from the shard before."""
    batch, length, groups = k.shape[:3]
    count = sequence.shards()
    near = window is not None and window - 1 <= length // count

    def local(q, k, v, run):
        size = q.shape[1]
        first = lax.axis_index(sequence.AXIS) * size
        own = jnp.arange(size, dtype=jnp.int32)
        run = jnp.zeros(q.shape[:2], jnp.int32) if run is None else run
        if near:
            before = jnp.arange(1 - window, 0, dtype=jnp.int32)
            # Nothing stands before the first shard: a run that no query is in.
            nothing = (jnp.zeros((k.shape[0], window - 1, *x.shape[2:]), x.dtype) for x in (k, v))
            k, v = (jnp.concatenate([sequence.halo(x, zeros), x], axis=1) for x, zeros in zip((k, v), nothing, strict=True))
            none = jnp.full((k.shape[0], window - 1), -1, jnp.int32)
            key_run = jnp.concatenate([sequence.halo(run, none), run], axis=1)
            index = first + jnp.concatenate([before, own])
        else:
            # The shard's own keys last, as `_spans` wants them; later shards' then stand first, hidden by their index.
            def gather(x):
                return jnp.roll(lax.all_gather(x, sequence.AXIS, axis=1, tiled=True), -(first + size), axis=1)

            k, v, key_run = gather(k), gather(v), gather(run)
            index = jnp.roll(jnp.arange(count * size, dtype=jnp.int32), -(first + size))
        queries = _Places((first + own)[None], (first + own)[None], run)
        return _chunked(q, k, v, queries, _Places(index[None], index[None], key_run), scale, window)

    heads = ("batch", sequence.AXIS, "kv_heads", None)
    run, tokens = (None, None) if reset is None else (run_index(reset), ("batch", sequence.AXIS))
    sizes = {"batch": batch, sequence.AXIS: length, "kv_heads": groups}
    return sequence.shard_map(local, sizes, (heads, heads, heads, tokens), heads, q, k, v, run)


class _Span(NamedTuple):
    """Consecutive blocks of queries and the keys that they meet."""

    starts: range  # first query of each block
    size: int  # queries a block
    keys: int  # that stand before the span's end
    near: int  # keys that a block meets of those, the last ones up to it


def _spans(length: int, slots: int, window: int | None) -> list[_Span]:
    """Blocks of equal size in spans, then the rest. No block meets keys after its span, nor those before all its
    windows, except that `slots` keys of a cache, whose order says nothing, stand before the call's: then it meets all
    up to its span.
    """
    size = min(BLOCK, max(SMALL_BLOCK, -(-length // SPANS)))
    full = length // size * size
    stride = -(-(full // size) // SPANS) * size
    ranges = [range(start, min(start + stride, full), size) for start in range(0, full, stride or 1)]
    spans = []
    for starts in [*ranges, *([range(full, length, size)] if full < length else [])]:
        block = min(size, length - starts[0])
        keys = slots + starts[-1] + block
        spans.append(_Span(starts, block, keys, keys if window is None or slots else min(keys, block + window - 1)))
    return spans


def _over_blocks(body, carry, span: _Span, blocks):
    """`lax.scan` of `body` over a span's blocks: the first query of each, and `blocks`, whose leading axis they are."""
    starts = jnp.array(span.starts, jnp.int32)
    if len(span.starts) > 1:
        return lax.scan(body, carry, (starts, blocks))
    carry, out = body(carry, jax.tree.map(lambda x: x[0], (starts, blocks)))
    return carry, jax.tree.map(lambda x: x[None], out)


def _split(x: Float[Array, "B G R T X"], span: _Span) -> Float[Array, "n B G R t X"]:
    x = lax.slice_in_dim(x, span.starts[0], span.starts[-1] + span.size, axis=3)
    return jnp.moveaxis(x.reshape(*x.shape[:3], -1, span.size, x.shape[-1]), 3, 0)


def _merge(parts: list[Float[Array, "n B G R t X"]]) -> Float[Array, "B G R T X"]:
    parts = [jnp.moveaxis(x, 0, 3) for x in parts]
    return jnp.concatenate([x.reshape(*x.shape[:3], -1, x.shape[-1]) for x in parts], axis=3)


def _block_scores(scale, window, span: _Span, start, q, k, v, queries: _Places, keys: _Places, matmul):
    """Masked scores of a block of queries, the first of the keys it meets, and those keys and values."""
    first = 0
    if span.near < span.keys:
        first = jnp.clip(start - window + 1, 0, span.keys - span.near)

    def near(x, axis):
        return lax.dynamic_slice_in_dim(x, first, span.near, axis)

    k, v = near(k, 2), near(v, 2)
    queries = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, span.size, 1), queries)
    mask = _mask(queries, jax.tree.map(lambda x: near(x, 1), keys), window)[:, None, None]
    return jnp.where(mask, scale * matmul("bgrtk,bgsk->bgrts", q, k), -jnp.inf), first, k, v


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(scale, window, q, k, v, queries, keys):
    return _blocks_forward(scale, window, q, k, v, queries, keys)[0]


def _blocks_forward(scale, window, q, k, v, queries, keys):
    matmul = _matmul(q, k, v)

    def body(span, carry, block):
        start, q_block = block
        scores, _, _, v_near = _block_scores(scale, window, span, start, q_block, k, v, queries, keys, matmul)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return carry, (matmul("bgrts,bgsv->bgrtv", weights, v_near) / total, top + jnp.log(total))

    spans = _spans(q.shape[3], k.shape[2] - q.shape[3], window)
    parts = [_over_blocks(partial(body, span), None, span, _split(q, span))[1] for span in spans]
    return _merge([o for o, _ in parts]), (q, k, v, queries, keys, parts)


def _blocks_backward(scale, window, residuals, do):
    q, k, v, queries, keys, parts = residuals
    matmul = _matmul(q, k, v)

    def body(span, carry, block):
        start, (q_block, do_block, (o, log_total)) = block
        scores, first, k_near, v_near = _block_scores(scale, window, span, start, q_block, k, v, queries, keys, matmul)
        weights = jnp.exp(scores - log_total)
        d_weights = matmul("bgrtv,bgsv->bgrts", do_block, v_near)
        d_scores = scale * weights * (d_weights - jnp.sum(do_block * o, axis=-1, keepdims=True))

        def add(total, part):
            part = part + lax.dynamic_slice_in_dim(total, first, span.near, 2)
            return lax.dynamic_update_slice_in_dim(total, part, first, 2)

        dk, dv = carry
        dk = add(dk, matmul("bgrts,bgrtk->bgsk", d_scores, q_block))
        dv = add(dv, matmul("bgrts,bgrtv->bgsv", weights, do_block))
        return (dk, dv), matmul("bgrts,bgsk->bgrtk", d_scores, k_near)

    carry, dq = (jnp.zeros(k.shape, do.dtype), jnp.zeros(v.shape, do.dtype)), []
    for span, kept in zip(_spans(q.shape[3], k.shape[2] - q.shape[3], window), parts, strict=True):
        carry, part = _over_blocks(partial(body, span), carry, span, (_split(q, span), _split(do, span), kept))
        dq.append(part)
    dk, dv = carry
    return _merge(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _recurrent(q, k, v, positions, reset, cache, scale, window):
    """Token by token: write, then read the cache alone."""

    def step(cache, token):
        q, k, v, positions, reset = jax.tree.map(lambda x: x[:, None], token)
        cached = cache["positions"] if reset is None else jnp.where(reset, -1, cache["positions"])
        slot = cache["count"] % cached.shape[1]

        def put(old, new):
            return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 1)

        cache = {
            "k": put(cache["k"], k), "v": put(cache["v"], v), "positions": put(cached, positions),
            "count": cache["count"] + 1,
        }  # fmt: skip
        mask = (cache["positions"] >= 0)[:, None, :]
        if window is not None:
            mask = mask & (positions[:, :, None] - cache["positions"][:, None, :] < window)
        o = _softmax_attention(q, cache["k"].astype(k.dtype), cache["v"].astype(v.dtype), mask, scale)
        return cache, o[:, 0]

    tokens = (q, k, v, positions, reset)
    if q.shape[1] == 1:
        cache, o = step(cache, jax.tree.map(lambda x: x[:, 0], tokens))
        return o[:, None], cache
    cache, o = lax.scan(step, cache, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1), cache


def _write(cache: Cache, k, v, positions, reset) -> Cache:
    """The cache after the call: slot s holds the newest token whose number is s modulo the slots."""
    length, slots = k.shape[1], cache["k"].shape[1]
    old_positions = cache["positions"]
    if reset is not None:
        run = run_index(reset)
        positions = jnp.where(run == run[:, -1:], positions, -1)
        old_positions = jnp.where(run[:, -1:] == 0, old_positions, -1)
    # Index in this call of the newest token for each slot; negative where the call has none.
    newest = length - 1 - (cache["count"] + length - 1 - jnp.arange(slots)) % slots
    take = jnp.maximum(newest, 0)

    def put(old, new):
        written = (newest >= 0).reshape(1, slots, *[1] * (new.ndim - 2))
        return jnp.where(written, jnp.take(new, take, axis=1).astype(old.dtype), old)

    return {
        "k": put(cache["k"], k), "v": put(cache["v"], v), "positions": put(old_positions, positions),
        "count": cache["count"] + length,
    }  # fmt: skip
