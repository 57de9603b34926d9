"""Drawing the next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, B],
    *,
    valid: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, B]:
    """One token a row.

    Args:
      logits: unnormalised log probabilities.
      keys: one a row, so that a row's draw does not depend on the others.
      valid: ids from here on are padding of the vocabulary and never drawn.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from the k likeliest.
      top_p: draw from the fewest likeliest tokens whose probabilities (after temperature and top_k) reach p: nucleus
        sampling (Holtzman et al. 2020, arXiv 1904.09751). The likeliest is always among them.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < valid, logits, -jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None and top_k < valid:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if top_p is not None and top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # Kept: those before which less than p has been gathered.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, before < top_p, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits)
