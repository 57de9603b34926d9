"""Moneta, Yaad and Memora (Miras, Behrouz et al. 2025, arXiv 2504.13173)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, field_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import QKV, LayerContext, State, head_size
from jaxlm.layers.mixers.delta import LowRank, l2_normalise
from jaxlm.layers.mixers.ttt import FrozenChunk
from jaxlm.layers.norms import LayerNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.fast_weights import memora, miras_state, moneta, yaad
from jaxlm.params import param
from jaxlm.schema import Schema


class MirasSettings(Schema):
    """What the three share: an inner two-layer network a head, trained on each token to make its value of its key."""

    op: ClassVar[str] = "miras"
    heads: int = Field(16, gt=0, description="Number of heads.")
    expansion: int = Field(4, gt=0, description="Hidden units of the inner network as a multiple of a head's channels.")
    gate_rank: int = Field(32, gt=0, description="Rank of the projections to learning rates and decays.")
    initial_rate: float = Field(
        0.01, gt=0, lt=1, description="Inner learning rate at the start; its gradients sum over the tokens of a chunk."
    )
    rope_base: float | None = Field(10_000.0, gt=1, description="Base of the rotary embedding on q and k; null for none.")
    convolution: int = Field(4, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    chunk_size: FrozenChunk = 16

    def head_dim(self, width: int) -> int:
        return head_size(width, self.heads, f"{self.kind}: the width")

    def sequence_flops(self, width: int, context: int) -> float:
        """2 K E a head and layer: for the prediction, its gradient (one layer), the updates and the output."""
        return 14.0 * width * self.head_dim(width) * self.expansion


class MonetaSettings(MirasSettings):
    """Inner network with l_p loss and l_q retention."""

    kind: Literal["moneta"] = "moneta"
    initial_rate: float = Field(0.001, gt=0, lt=1, description="Inner learning rate at the start.")
    p: float = Field(3.0, ge=1, description="Exponent of the inner loss.")
    q_norm: float = Field(4.0, description="Exponent of the retention: 2 (none) or at least 3.")
    retention: Literal["gradient", "printed"] = Field(
        "gradient",
        description="From what is carried to the weights: 'gradient' of the squared l_q norm (degree 1), or as the paper "
        "prints it (degree 3 - q).",
    )

    @field_validator("q_norm")
    @classmethod
    def _q_norm_is_smooth(cls, q_norm: float) -> float:
        if q_norm != 2 and q_norm < 3:
            raise ValueError(f"moneta.q_norm={q_norm} has no second derivative at 0; use 2 or at least 3 (default 4)")
        return q_norm


class YaadSettings(MirasSettings):
    """Inner network with a Huber loss, whose threshold depends on the data, and decay."""

    kind: Literal["yaad"] = "yaad"


class MemoraSettings(MirasSettings):
    """Inner network whose weights are distributions, with KL retention.

    Rows of packed documents run token by token: exact, but slow.
    """

    kind: Literal["memora"] = "memora"
    initial_rate: float = Field(0.001, gt=0, lt=1, description="Inner learning rate at the start.")


class Miras(nnx.Module):
    """o_t = M_t(q_t), M(x) = x + LN(gelu(x W_in) W_out) trained by gradient descent; LN(o) swish(W_g x) W_o (section 5).

    q and k are rotated and of unit length. Learning rates sigmoid(W2 W1 x + rate_bias) and decays
    alpha = beta / (beta + theta) = sigmoid(W2 W1 x + decay_bias) are one a channel; Yaad's threshold
    softplus(W x + threshold_bias) is one a head. They start at initial_rate, 0.993 and sqrt(K).

    Gradients of the inner weights are taken at those that enter the chunk (Memora's at those its first token leaves), so
    chunk_size is a hyper-parameter of the model, not of how it is computed.
    """

    def __init__(self, settings: MonetaSettings | YaadSettings | MemoraSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width, heads, size = context.width, settings.heads, settings.head_dim(context.width)
        hidden = settings.expansion * size
        self.qkv = QKV(width, width, width, heads, settings.convolution, rngs=rngs)
        self.rate = LowRank(width, settings.gate_rank, width, bias=False, rngs=rngs)
        # The inverse of the sigmoid.
        rate_bias = math.log(settings.initial_rate / (1 - settings.initial_rate))
        self.rate_bias = param(jnp.full(width, rate_bias), ("heads",), "dynamics")
        self.decay = LowRank(width, settings.gate_rank, width, bias=False, rngs=rngs)
        self.decay_bias = param(jnp.full(width, 5.0), ("heads",), "dynamics")
        is_yaad = isinstance(settings, YaadSettings)
        self.threshold = Dense(width, heads, axes=("embed", "heads"), rngs=rngs) if is_yaad else None
        # The length of a value whose channels have unit variance, through the inverse of softplus.
        usual = jnp.full(heads, size**0.5)
        self.threshold_bias = param(usual + jnp.log(-jnp.expm1(-usual)), ("heads",), "dynamics") if is_yaad else None
        # Memora's are logarithms; with less noise all units were the same average, which the norm would blow up.
        fan_in = 0 if isinstance(settings, MemoraSettings) else -0.5
        normal = lambda *shape: shape[-2] ** fan_in * jax.random.normal(rngs.params(), shape)  # noqa: E731
        self.inner_in = param(normal(heads, size, hidden), ("heads", None, None), "hidden")
        self.inner_out = param(normal(heads, hidden, size), ("heads", None, None), "hidden")
        self.inner_norm_scale = param(jnp.ones((heads, size)), ("heads", None), "norm")
        self.inner_norm_bias = param(jnp.zeros((heads, size)), ("heads", None), "bias")
        self.norm = LayerNorm(width, axis="heads")
        self.gate = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.output = Dense(width, width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        settings = self.settings
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        positions = positions_in_segments(segment_ids, x.shape[:2], None if state is None else state["position"])
        if settings.rope_base is not None:
            q = rotary(q, positions, base=settings.rope_base)
            k = rotary(k, positions, base=settings.rope_base)
        rate = jax.nn.sigmoid(self.rate(x).astype(jnp.float32) + self.rate_bias[...]).reshape(q.shape)
        log_decay = jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32) + self.decay_bias[...]).reshape(q.shape)
        inputs = {
            "q": l2_normalise(q), "k": l2_normalise(k), "v": v, "rate": rate, "log_decay": log_decay,
            "weights": {"w_in": self.inner_in[...], "w_out": self.inner_out[...]}, "norm_scale": self.inner_norm_scale[...],
            "norm_bias": self.inner_norm_bias[...], "initial_state": None if state is None else state["inner"],
            "segment_ids": segment_ids, "chunk_size": settings.chunk_size,
        }  # fmt: skip
        if isinstance(settings, MonetaSettings):
            o, inner = moneta(**inputs, p=settings.p, q_norm=settings.q_norm, retention=settings.retention)
        elif isinstance(settings, YaadSettings):
            threshold = jax.nn.softplus(self.threshold(x).astype(jnp.float32) + self.threshold_bias[...])
            o, inner = yaad(**inputs, threshold=threshold)
        else:
            o, inner = memora(**inputs)
        y = self.output(self.norm(o.reshape(x.shape)) * jax.nn.silu(self.gate(x)))
        return y, {"inner": inner, "position": positions[:, -1] + 1, **convolution}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        inner = miras_state(batch, *self.inner_in.shape[-3:])
        return {"inner": inner, "position": jnp.zeros(batch, jnp.int32), **self.qkv.init_state(batch, dtype)}
