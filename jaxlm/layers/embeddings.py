"""Token embedding and readout."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.params import param


class Embedding(nnx.Module):
    """Rows of a table `[vocabulary, width]`; starts normal with standard deviation 0.02 (GPT-2)."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        table = 0.02 * jax.random.normal(rngs.params(), (vocab_size, width))
        self.table = param(table, ("vocab", "embed"), "input")

    def __call__(self, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike) -> Float[Array, "B T D"]:
        return self.table[...].astype(dtype)[tokens]
