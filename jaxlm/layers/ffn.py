"""Channel mixers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Discriminator, Field, Tag

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.rwkv7 import RWKVChannelMixing, RWKVChannelMixingSettings
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema


class SwiGLUSettings(Schema):
    """Gated feed-forward network."""

    kind: Literal["swiglu"] = "swiglu"
    ratio: float = Field(4.0, gt=0, description="Expansion of an ungated network with as many parameters.")
    multiple_of: int = Field(256, gt=0, description="The hidden size is rounded up to a multiple of this.")
    hidden: int | None = Field(None, gt=0, description="Hidden size; null: width * ratio * 2/3, rounded up.")

    def hidden_size(self, width: int) -> int:
        if self.hidden is not None:
            return self.hidden
        return self.multiple_of * -(-int(width * self.ratio * 2 / 3) // self.multiple_of)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, settings: SwiGLUSettings, context: LayerContext, *, rngs: nnx.Rngs):
        width, hidden = context.width, settings.hidden_size(context.width)
        self.gate = Dense(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.up = Dense(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Dense(hidden, width, axes=("mlp", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], None]:
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "batch", "sequence", "mlp")), None

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> None:
        return None


class NoFFNSettings(Schema):
    """No channel mixer: a block is its sequence mixer alone (Mamba)."""

    kind: Literal["none"] = "none"


# kind -> (settings, module). A channel mixer is `y, state = ffn(x, state, segment_ids)`; most need no state.
FFNS = {
    "swiglu": (SwiGLUSettings, SwiGLU),
    "none": (NoFFNSettings, None),
    "rwkv": (RWKVChannelMixingSettings, RWKVChannelMixing),
}


def _kind(value: Any) -> str:
    return value.get("kind", "swiglu") if isinstance(value, dict) else value.kind


# `kind` may be left out where it is the usual one.
FFNSettings = Annotated[
    Annotated[SwiGLUSettings, Tag("swiglu")]
    | Annotated[NoFFNSettings, Tag("none")]
    | Annotated[RWKVChannelMixingSettings, Tag("rwkv")],
    Discriminator(_kind),
]
