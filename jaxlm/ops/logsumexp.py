"""Running log-sum-exp: z_t = log sum_{s<=t} exp(logit_s), channel by channel.

What normalises the additive recurrence of LightNet (Qin et al. 2024, arXiv 2405.21022, section 3). It is associative, so
sequences split over devices pass it on like a recurrence's state: each shard folds its tokens to one sum, and an exclusive
prefix over the shards, restarted where documents start, gives each the sum of what stands before it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.ops.segments import check_segment_ids, resets
from jaxlm.parallel import sequence


def running_logsumexp(
    logits: Float[Array, "B T H K"], before: Float[Array, "B H K"] | None, segment_ids: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """z_t = log sum_{s <= t} exp(logit_s) over each document so far, and the log decay z_{t-1} - z_t <= 0.

    Args:
      logits: in float32.
      before: z before token 0, which the first run of a row continues; minus infinity, and None, where nothing was summed.
      segment_ids: sums start anew where the id changes.

    Returns:
      z, and the log decay; that of a document's first token, which no state precedes, is 0.

    Raises:
      ValueError: on segment ids that do not fit, or shards of the sequence that do not divide it.
    """
    batch, length, heads, _ = logits.shape
    check_segment_ids(segment_ids, (batch, length))
    first = jnp.zeros((batch, length), bool) if segment_ids is None else resets(segment_ids)
    if not sequence.split(length):
        return _continued(*_within(logits, first), first, before)
    if before is None:
        before = jnp.full_like(logits[:, 0], -jnp.inf)
    tokens = ("batch", sequence.AXIS, "heads", None)
    return sequence.shard_map(
        _local, {"batch": batch, sequence.AXIS: length, "heads": heads},
        (tokens, tokens[:2], ("batch", "heads", None)), (tokens, tokens), logits, first, before,
    )  # fmt: skip


def _local(logits, first, before):
    """A shard's tokens, once the shards before have said what they sum to."""
    z, started = _within(logits, first)
    return _continued(z, started, first, _entering(z[:, -1], started[:, -1], before))


def _within(
    logits: Float[Array, "B T H K"], first: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T H K"], Bool[Array, "B T 1 1"]]:
    """z of these tokens alone, and whether a document has started among those up to each."""

    def join(left, right):
        return jnp.where(right[1], right[0], jnp.logaddexp(left[0], right[0])), left[1] | right[1]

    return lax.associative_scan(join, (logits, first[..., None, None]), axis=1)


def _entering(
    last: Float[Array, "B H K"], started: Bool[Array, "B 1 1"], before: Float[Array, "B H K"]
) -> Float[Array, "B H K"]:
    """z before a shard's token 0, where every shard sums to `last`, anew if a document `started` in it."""
    rank = lax.axis_index(sequence.AXIS)

    def step(carry, shard):
        z, entering = carry
        index, last, started = shard
        return (jnp.where(started, last, jnp.logaddexp(z, last)), jnp.where(index == rank, z, entering)), None

    shards = (jnp.arange(lax.axis_size(sequence.AXIS)), *lax.all_gather((last, started), sequence.AXIS))
    return lax.scan(step, (before, before), shards)[0][1]


def _continued(z, started, first, before):
    """z that continues `before` where no document has started, and the log decay."""
    if before is None:
        before = jnp.full_like(z[:, 0], -jnp.inf)
    else:
        z = jnp.where(started, z, jnp.logaddexp(before[:, None], z))
    previous = jnp.concatenate([before[:, None], z[:, :-1]], axis=1)
    # Sums never fall, but rounding may make them.
    none = first[..., None, None] | (previous == -jnp.inf) | (previous > z)
    return z, jnp.where(none, 0, previous - z)
