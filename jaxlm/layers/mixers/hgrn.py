"""HGRN: hierarchically gated recurrent network (Qin et al. 2023, arXiv 2311.04823; layer of flash-linear-attention)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, HeadOutput, LayerContext, State, head_size
from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


class HGRNSettings(Schema):
    """Elementwise gated recurrence whose forget gates have a lower bound that rises with the layer."""

    op: ClassVar[str] = "diagonal_recurrence"
    kind: Literal["hgrn"] = "hgrn"
    expand: float = Field(1.0, gt=0, description="State channels as a multiple of the model width.")
    chunk_size: ChunkSize = 64

    def size(self, width: int) -> int:
        return head_size(width * self.expand, 1, "hgrn.expand")

    def sequence_flops(self, width: int, context: int) -> float:
        return 2.0 * self.size(width)


def forget_gate(
    forget: Float[Array, "*X"], bound_logit: Float[Array, "*D"]
) -> tuple[Float[Array, "*X"], Float[Array, "*X"]]:
    """log f and 1 - f of f = l + (1 - l) sigmoid(forget), with the lower bound as log l - log(1 - l)."""
    low, rest = jax.nn.log_sigmoid(bound_logit), jax.nn.log_sigmoid(-bound_logit)
    # A sum of two numbers that make one, which rounding may leave above it.
    log_f = jnp.minimum(jnp.logaddexp(low, rest + jax.nn.log_sigmoid(forget)), 0)
    # 1 - f, without the cancellation.
    return log_f, jax.nn.sigmoid(-bound_logit) * jax.nn.sigmoid(-forget)


class HGRN(nnx.Module):
    """h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t), f_t = l + (1 - l) sigmoid(W_f x_t); RMSNorm(h) swish(W_g x) W_o.

    The lower bound l of layer i of L is sum_{j<i} softmax(table)_j per channel in the paper (eq. 5; its cumulative sum
    less the first row), with one learned table [L, D] of zeros for all layers. Layers here share no parameters, so each
    has the row of D logits that moves its own bound: l = i e^logit / (i e^logit + L - i), which is the paper's for a table
    that has the logit in its first i rows and 0 after. At the start, at logit 0, it is the paper's i / L; layer 0 has
    bound 0 whatever its logit; L D numbers are trained. That bounds rise with the layer holds at the start and is, unlike
    in the paper, not enforced after.
    """

    def __init__(self, settings: HGRNSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        size = settings.size(context.width)
        self.input = Dense(context.width, size, axes=("embed", "heads"), rngs=rngs)
        self.forget = Dense(context.width, size, axes=("embed", "heads"), rngs=rngs)
        self.bound_logit = param(jnp.zeros(size), ("heads",), "dynamics")
        self.position = param(jnp.asarray(context.index / context.depth, jnp.float32), (), "constant")
        self.output = HeadOutput(context, size, size, gate=True, rngs=rngs)

    def lower_bound_logit(self) -> Float[Array, D]:
        """log l - log(1 - l), minus infinity in layer 0."""
        position = jax.lax.stop_gradient(self.position[...])
        return self.bound_logit[...] + jnp.log(position) - jnp.log1p(-position)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        bound = self.lower_bound_logit()
        forget = constrain(self.forget(x), "batch", "sequence", "heads").astype(jnp.float32)
        log_f, rest = forget_gate(forget, bound)
        h, recurrent = diagonal_recurrence(
            log_f, rest * jax.nn.silu(self.input(x)).astype(jnp.float32),
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(h[:, :, None], x), {"recurrent": recurrent}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        return {"recurrent": jnp.zeros((batch, self.bound_logit.shape[-1]), jnp.float32)}
