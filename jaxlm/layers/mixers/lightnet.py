"""LightNet: linear attention whose decays come from a running sum (Qin et al. 2024, arXiv 2405.21022)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import (
    ChunkSize,
    LayerContext,
    State,
    head_size,
    recurrent_flops,
    split_heads,
    zeros_state,
)
from jaxlm.layers.mixers.delta import GatedOutput
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.logsumexp import running_logsumexp
from jaxlm.ops.segments import resets
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema


class LightNetSettings(Schema):
    """Linear attention that weighs each key channel by a softmax over the tokens so far."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["lightnet"] = "lightnet"
    head_dim: int = Field(128, gt=0, description="Channels of keys and values a head.")
    gate_rank: int = Field(128, gt=0, description="Rank of the output gate's projection.")
    zero_start: bool = Field(
        False,
        description="Sums start from exp(0) instead of nothing in every document (z_0 = 0, the authors' code xmixers): its "
        "first token has weight sigmoid(logit) instead of 1.",
    )
    chunk_size: ChunkSize = 64

    def heads(self, width: int) -> int:
        return head_size(width, self.head_dim, "lightnet: the width over head_dim, as")

    def sequence_flops(self, width: int, context: int) -> float:
        return recurrent_flops(self.heads(width), self.head_dim, self.head_dim)


class LightNet(nnx.Module):
    """S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(l_t - z_t)^T v_t, z_t = log sum_{s<=t} exp(l_s), o_t = silu(q_t) S_t.

    So o_t = silu(q_t) sum_s softmax_{s<=t}(l_s) v_s, channel by channel (section 3: additive recurrence), l the keys'
    logits. Then RMSNorm over all channels, a low-rank swish gate and the output projection (flash-linear-attention).
    With zero_start one more logit of 0, of a token without a value, stands before each document: z_0 = 0.
    """

    def __init__(self, settings: LightNetSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width = context.width
        self.heads = settings.heads(width)
        self.q = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.k = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.v = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.output = GatedOutput(context, width, width, gate="swish", rank=settings.gate_rank, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        q = split_heads(jax.nn.silu(self.q(x)), self.heads)
        logits = split_heads(self.k(x), self.heads).astype(jnp.float32)
        before = dict.fromkeys(("recurrent", "sum")) if state is None else state
        summed, total = logits, before["sum"]
        if self.settings.zero_start:
            # A row's first document has its exp(0) in the sum before it, later ones in their first term.
            total = self._nothing(x.shape[0]) if total is None else total
            if segment_ids is not None:
                summed = jnp.where(resets(segment_ids)[..., None, None], jnp.logaddexp(logits, 0), logits)
        z, log_decay = running_logsumexp(summed, total, segment_ids)
        k = jnp.exp(logits - z).astype(x.dtype)
        o, recurrent = linear_attention(
            q, k, split_heads(self.v(x), self.heads), constrain(log_decay, "batch", "sequence", "heads", None),
            initial_state=before["recurrent"], segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(o.reshape(*x.shape[:2], 1, -1), x), {"recurrent": recurrent, "sum": z[:, -1]}

    def _nothing(self, batch: int) -> Float[Array, "B H K"]:
        """The logarithm of the sum before a document's first token."""
        return jnp.full((batch, self.heads, self.settings.head_dim), 0 if self.settings.zero_start else -jnp.inf, jnp.float32)

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        size = self.settings.head_dim
        return {"recurrent": zeros_state(batch, self.heads, size, size), "sum": self._nothing(batch)}
