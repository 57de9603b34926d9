"""minGRU and minLSTM: recurrent networks whose gates see the input alone (Feng et al. 2024, arXiv 2410.01201)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, LayerContext, State, head_size
from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema


class MinimalSettings(Schema):
    """What both have."""

    op: ClassVar[str] = "diagonal_recurrence"
    kind: str
    expand: float = Field(1.5, gt=0, description="State channels as a multiple of the model width.")
    chunk_size: ChunkSize = 64

    def size(self, width: int) -> int:
        return head_size(width * self.expand, 1, f"{self.kind}.expand")

    def sequence_flops(self, width: int, context: int) -> float:
        return 2.0 * self.size(width)


class MinGRUSettings(MinimalSettings):
    """A GRU without the hidden state in its gates, linear in the state."""

    kind: Literal["mingru"] = "mingru"


class MinLSTMSettings(MinimalSettings):
    """An LSTM without the hidden state in its gates, which are normalised to sum to one."""

    kind: Literal["minlstm"] = "minlstm"


def positive(x: Float[Array, "*X"]) -> Float[Array, "*X"]:
    """g(x) = x + 1/2 for x >= 0, else sigmoid(x): continuous, increasing and > 0 (appendix B.2.1)."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


class _Minimal(nnx.Module):
    """h_t = f_t h_{t-1} + (1 - f_t) g(W_h x_t), read out by W_o; no biases, as in the authors' reference code.

    That code sums in log space. Since g > 0 and 0 < f < 1 all terms are positive, so the plain sum loses nothing either.
    """

    gates: ClassVar[tuple[str, ...]]

    def __init__(self, settings: MinimalSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.size = settings.size(context.width)
        self.project = nnx.Dict(
            {name: Dense(context.width, self.size, axes=("embed", "heads"), rngs=rngs) for name in ("hidden", *self.gates)}
        )
        self.output = Dense(self.size, context.width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    @staticmethod
    def forget_logit(gates: dict[str, Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        gates = {
            name: constrain(project(x), "batch", "sequence", "heads").astype(jnp.float32)
            for name, project in self.project.items()
        }
        logit = self.forget_logit(gates)
        h, recurrent = diagonal_recurrence(
            jax.nn.log_sigmoid(logit), jax.nn.sigmoid(-logit) * positive(gates["hidden"]),
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(h.astype(x.dtype)), {"recurrent": recurrent}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        return {"recurrent": jnp.zeros((batch, self.size), jnp.float32)}


class MinGRU(_Minimal):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), z = sigmoid(W_z x) (section 3.1)."""

    gates: ClassVar[tuple[str, ...]] = ("update",)

    @staticmethod
    def forget_logit(gates: dict[str, Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        return -gates["update"]


class MinLSTM(_Minimal):
    """h_t = f'_t h_{t-1} + i'_t g(W_h x_t), f' = f / (f + i), i' = i / (f + i), f, i = sigmoid(W_f x), sigmoid(W_i x)
    (section 3.2)."""

    gates: ClassVar[tuple[str, ...]] = ("forget", "input")

    @staticmethod
    def forget_logit(gates: dict[str, Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        # f / (f + i) = sigmoid(log f - log i).
        return jax.nn.log_sigmoid(gates["forget"]) - jax.nn.log_sigmoid(gates["input"])
