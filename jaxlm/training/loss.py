"""Next-token cross-entropy that never holds the logits of a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.parallel.context import constrain


class Loss(NamedTuple):
    """Sums over tokens (weights applied), float32."""

    nll: Float[Array, ""]
    z_loss: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Loss:
    """Summed negative log likelihood (nats), summed log-partition squared (PaLM z-loss, arXiv 2204.02311 sec. 5) and hits.

    The tokens of a row are dealt to pieces of `chunk`, n-th by n-th so that a split sequence stays where it is; each piece's
    logits `[B, chunk, vocab]` live only while it is computed, in the backward too. Logits, softmax and sums are float32.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    pieces = -(-length // chunk)
    padding = pieces * chunk - length

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, pieces, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def piece(kernel, hidden, targets, weights):
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "sequence", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A one-hot sum instead of a gather keeps a vocabulary sharded over devices where it is.
        one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
        target_logit = jnp.sum(jnp.where(one_hot, logits, 0.0), axis=-1)
        hit = target_logit >= jnp.max(logits, axis=-1)
        return Loss(
            jnp.sum(weights * (log_z - target_logit)), jnp.sum(weights * log_z**2), jnp.sum(weights * hit)
        )

    if pieces == 1:
        return piece(kernel, hidden, targets, weights)
    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(
        lambda sums, xs: (jax.tree.map(jnp.add, sums, piece(kernel, *xs)), None),
        Loss(zero, zero, zero),
        (cut(hidden), cut(targets), cut(weights)),
    )
    return total
