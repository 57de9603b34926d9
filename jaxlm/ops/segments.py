"""Documents packed into rows: where a row's state resets.

A *run* is a stretch of equal segment ids; an id that comes back later starts a new run. The first run of a row
continues whatever state enters the row.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxlm.parallel import sequence

_TOKENS = ("batch", sequence.AXIS)


def check_segment_ids(segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]) -> None:
    """Raises ValueError unless the ids are integers `[B, T]`."""
    if segment_ids is None:
        return
    if segment_ids.shape != shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of shape [B, T] = {shape}, got {segment_ids.dtype} {segment_ids.shape}; "
            "give one id a token"
        )


def resets(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at tokens whose id differs from the token before; never at token 0, which continues the incoming state."""

    def local(segment_ids):
        before = sequence.halo(segment_ids, segment_ids[:, :1])
        return segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)

    if sequence.split(segment_ids.shape[1]):
        return _over_shards(local, segment_ids.shape, (_TOKENS,), segment_ids)
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def run_index(reset: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of resets up to and including each token."""

    def local(reset):
        index = lax.cumsum(reset.astype(jnp.int32), axis=1)
        return index + sequence.over_earlier(jnp.sum, index[:, -1:])

    if sequence.split(reset.shape[1]):
        return _over_shards(local, reset.shape, (_TOKENS,), reset)
    return lax.cumsum(reset.astype(jnp.int32), axis=1)


def positions_in_runs(reset: Bool[Array, "B T"] | None, start: Int[Array, B], length: int) -> Int[Array, "B T"]:
    """Position of each token in its run, from 0; in the first run from `start`."""
    index = jnp.arange(length, dtype=jnp.int32)
    if reset is None:
        return start[:, None] + index

    def origins(first, reset):
        """Index of the newest reset, 0 before the first; `first` is the index of token 0."""
        return lax.cummax(jnp.where(reset, first + jnp.arange(reset.shape[1], dtype=jnp.int32), 0), axis=1)

    def local(reset):
        origin = origins(lax.axis_index(sequence.AXIS) * reset.shape[1], reset)
        return jnp.maximum(origin, sequence.over_earlier(jnp.max, origin[:, -1:]))

    split = sequence.split(length)
    origin = _over_shards(local, reset.shape, (_TOKENS,), reset) if split else origins(0, reset)
    return index - origin + jnp.where(run_index(reset) == 0, start[:, None], 0)


def counts_in_runs(
    counted: Int[Array, "B T R"], reset: Bool[Array, "B T"] | None, start: Int[Array, "B R"]
) -> Int[Array, "B T R"]:
    """What the tokens before each one in its run count to, in the first run on top of `start`; of every R by itself."""

    def before(counted, reset, split):
        total = lax.cumsum(counted, axis=1)
        if split:
            total = total + sequence.over_earlier(jnp.sum, total[:, -1:])
        total = total - counted
        # Counts never fall: that at the newest reset is the largest at a reset so far.
        origin = lax.cummax(jnp.where(reset[..., None], total, 0), axis=1)
        if split:
            origin = jnp.maximum(origin, sequence.over_earlier(jnp.max, origin[:, -1:]))
        return total - origin

    reset = jnp.zeros(counted.shape[:2], bool) if reset is None else reset
    if sequence.split(counted.shape[1]):
        count = _over_shards(partial(before, split=True), reset.shape, (_TOKENS, _TOKENS), counted, reset)
    else:
        count = before(counted, reset, split=False)
    return count + jnp.where(run_index(reset)[..., None] == 0, start[:, None], 0)


def _over_shards(fn, shape, in_axes, *args):
    return sequence.shard_map(fn, {"batch": shape[0], sequence.AXIS: shape[1]}, in_axes, _TOKENS, *args)
