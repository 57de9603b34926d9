"""Channel mixers."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.parallel.mesh import constrain
from jaxlm.schema import Schema


class SwiGLUSettings(Schema):
    """Gated feed-forward network."""

    ratio: float = Field(4.0, gt=0, description="Expansion of an ungated network with as many parameters.")
    multiple_of: int = Field(256, gt=0, description="The hidden size is rounded up to a multiple of this.")
    hidden: int | None = Field(None, gt=0, description="Hidden size; null: width * ratio * 2/3, rounded up.")

    def hidden_size(self, width: int) -> int:
        if self.hidden is not None:
            return self.hidden
        return self.multiple_of * -(-int(width * self.ratio * 2 / 3) // self.multiple_of)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, settings: SwiGLUSettings, width: int, *, output_gain: float = 1.0, rngs: nnx.Rngs):
        hidden = settings.hidden_size(width)
        self.gate = Dense(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.up = Dense(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Dense(hidden, width, axes=("mlp", "embed"), gain=output_gain, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "batch", "sequence", "mlp"))
