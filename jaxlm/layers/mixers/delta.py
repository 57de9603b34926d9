"""Mixers on the delta rule: DeltaNet, Gated DeltaNet, and Kimi Delta Attention with the gates of Gated DeltaNet-2."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import QKV, ChunkSize, LayerContext, State, head_size, zeros_state
from jaxlm.layers.mixers.mamba2 import dt_bias
from jaxlm.layers.norms import RMSNorm
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


def l2_normalise(x: Float[Array, "... K"], eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(|x|^2 + eps) over the last axis, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class LowRank(nnx.Module):
    """x W_down W_up (+ b)."""

    def __init__(self, width: int, rank: int, size: int, *, bias: bool, rngs: nnx.Rngs):
        self.down = Dense(width, rank, axes=("embed", None), rngs=rngs)
        self.up = Dense(rank, size, axes=(None, "heads"), bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T X"]:
        return self.up(self.down(x))


class GatedOutput(nnx.Module):
    """RMSNorm of each head of the recurrence's output, times an activation of a projection of x, then the output projection.

    The norm's scale [head_dim] is shared by all heads. The gate's projection has full rank, or a given one.
    """

    def __init__(
        self,
        context: LayerContext,
        values: int,
        head_dim: int,
        *,
        gate: Literal["none", "swish", "sigmoid"],
        rank: int | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.activation = gate
        self.norm = RMSNorm(head_dim, eps=1e-5)
        if gate == "none":
            self.gate = None
        elif rank is None:
            self.gate = Dense(context.width, values, axes=("embed", "heads"), bias=bias, rngs=rngs)
        else:
            self.gate = LowRank(context.width, rank, values, bias=bias, rngs=rngs)
        self.project = Dense(values, context.width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.norm(o.astype(x.dtype)).reshape(*x.shape[:-1], -1)
        if self.gate is not None:
            activation = jax.nn.silu if self.activation == "swish" else jax.nn.sigmoid
            y = y * activation(self.gate(x))
        return self.project(y)


class DeltaSettings(Schema):
    """What the mixers on the delta rule share."""

    op: ClassVar[str] = "delta_rule"
    kind: str
    heads: int = Field(16, gt=0, description="Number of heads of queries and keys.")
    value_heads: int | None = Field(
        None, gt=0, description="Number of heads of values and states, a multiple of heads; null: as many."
    )
    head_dim: int | None = Field(None, gt=0, description="Key channels a head; null: width / heads.")
    expand_v: float = Field(1.0, gt=0, description="Value channels a head as a multiple of its key channels.")
    convolution: int = Field(4, ge=0, description="Width of the short convolution on q, k and v; 0 for silu alone.")
    negative_eigenvalues: bool = Field(
        False, description="Write strengths in (0, 2): transitions with eigenvalues in (-1, 1) (arXiv 2411.12537)."
    )
    chunk_size: ChunkSize = 64

    @model_validator(mode="after")
    def _value_heads_divide(self):
        if self.groups % self.heads:
            raise ValueError(f"value_heads={self.value_heads} must be a multiple of heads={self.heads}")
        return self

    @property
    def groups(self) -> int:
        """Number of heads of values."""
        return self.value_heads or self.heads

    def sizes(self, width: int) -> tuple[int, int]:
        """Key and value channels a head."""
        keys = self.head_dim or head_size(width, self.heads, f"{self.kind}: the width")
        return keys, head_size(keys * self.expand_v, 1, f"{self.kind}.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        """Read for the correction, write, read-out: 2KV each a head."""
        keys, values = self.sizes(width)
        return 6.0 * self.groups * keys * values


class DeltaNetSettings(DeltaSettings):
    """Delta rule: each write first erases what the state holds under its key."""

    kind: Literal["deltanet"] = "deltanet"
    output_gate: bool = Field(False, description="Multiply the normed output by swish of a projection.")


class GatedDeltaNetSettings(DeltaSettings):
    """Delta rule whose heads forget at a data-dependent rate."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    heads: int = Field(6, gt=0, description="Number of heads of queries and keys.")
    # Six heads divide few widths: the key channels do not follow the model's.
    head_dim: int = Field(256, gt=0, description="Key channels a head.")
    expand_v: float = Field(2.0, gt=0, description="Value channels a head as a multiple of its key channels.")
    output_gate: bool = Field(True, description="Multiply the normed output by swish of a projection.")


class KDASettings(DeltaSettings):
    """Delta rule whose key channels forget at data-dependent rates."""

    kind: Literal["kda"] = "kda"
    decay_bound: float | None = Field(
        None, lt=0, description="Log decays are bound * sigmoid(..), never below this (-5 is usual); null: softplus, unbounded."
    )
    gates: Literal["head", "channel"] = Field(
        "head",
        description="Write strength: 'head' one a head; 'channel' an erase gate a key channel and a write gate a value "
        "channel (Gated DeltaNet-2, arXiv 2605.22791).",
    )


class _Delta(nnx.Module):
    """Projections, convolutions and L2 norms of q and k around `delta_rule`; what differs is how the gates come about."""

    def __init__(self, settings: DeltaSettings, context: LayerContext, gate: str, rank: int | None = None, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        keys, values = settings.heads * self.key_dim, settings.groups * self.value_dim
        self.qkv = QKV(context.width, keys, values, settings.heads, settings.convolution, rngs=rngs)
        self.output = GatedOutput(context, values, self.value_dim, gate=gate, rank=rank, bias=rank is not None, rngs=rngs)

    def gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array | None, Array | None]:
        """beta, log_decay and write of `delta_rule`, float32."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        settings = self.settings
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        if not settings.convolution:
            q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
        q, k = l2_normalise(q), l2_normalise(k)
        if settings.groups > settings.heads:
            # Value head h reads the keys of head h // (groups / heads).
            q, k = (self._heads(jnp.repeat(y, settings.groups // settings.heads, axis=2)) for y in (q, k))
            v = self._heads(v)
        beta, log_decay, write = self.gates(x)
        o, recurrent = delta_rule(
            q, k, v, beta, log_decay, write=write,
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=settings.chunk_size,
        )  # fmt: skip
        return self.output(o, x), {"recurrent": recurrent, **convolution}

    def _heads(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T H X"]:
        return constrain(x.reshape(*x.shape[:2], self.settings.groups, -1), "batch", "sequence", "heads", None)

    def _strength(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        return (1 + self.settings.negative_eigenvalues) * jax.nn.sigmoid(x.astype(jnp.float32))

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        recurrent = zeros_state(batch, self.settings.groups, self.key_dim, self.value_dim)
        return {"recurrent": recurrent, **self.qkv.init_state(batch, dtype)}


class DeltaNet(_Delta):
    """S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1}), o_t = q_t S_t / sqrt(K) (Yang et al. 2024, arXiv 2406.06484, eq. 3).

    q, k, v = silu(conv(W x)), q and k of unit length a head; beta = sigmoid(W_b x). RMSNorm a head, output projection.
    """

    def __init__(self, settings: DeltaNetSettings, context: LayerContext, *, rngs: nnx.Rngs):
        super().__init__(settings, context, "swish" if settings.output_gate else "none", rngs=rngs)
        self.beta = Dense(context.width, settings.groups, axes=("embed", "heads"), rngs=rngs)

    def gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array | None, Array | None]:
        return self._strength(self.beta(x)), None, None


class GatedDeltaNet(_Delta):
    """S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S') (Yang et al. 2024, arXiv 2412.06464, eq. 10).

    As `DeltaNet`, with g = -exp(a_log) softplus(W_a x + dt_bias) a head and a swish-gated norm.
    """

    def __init__(self, settings: GatedDeltaNetSettings, context: LayerContext, *, rngs: nnx.Rngs):
        super().__init__(settings, context, "swish" if settings.output_gate else "none", rngs=rngs)
        heads = settings.groups
        self.beta = Dense(context.width, heads, axes=("embed", "heads"), rngs=rngs)
        self.decay = Dense(context.width, heads, axes=("embed", "heads"), rngs=rngs)
        # Rates uniform in (0, 16]: 0 itself has no logarithm.
        self.a_log = param(jnp.log(16 * (1 - jax.random.uniform(rngs.params(), (heads,)))), ("heads",), "dynamics")
        self.dt_bias = param(dt_bias(rngs.params(), (heads,), 1e-3, 0.1), ("heads",), "dynamics")

    def gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array | None, Array | None]:
        dt = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        return self._strength(self.beta(x)), -jnp.exp(self.a_log[...]) * dt, None


class KDA(_Delta):
    """S' = Diag(exp(g_t)) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S') (Kimi Linear, arXiv 2510.26692, eq. 1).

    As `DeltaNet`, with g = -exp(a_log) softplus(f + dt_bias) a key channel, f a low-rank projection, or bounded
    g = bound sigmoid(exp(a_log) (f + dt_bias)), and a norm gated by sigmoid of a low-rank projection.

    With gates = channel it is Gated DeltaNet-2 (arXiv 2605.22791): S_t = S' + k_t^T (w_t v_t - (e_t k_t) S'), e and w
    sigmoids of full projections, an erase gate a key channel and a write gate a value channel.
    """

    def __init__(self, settings: KDASettings, context: LayerContext, *, rngs: nnx.Rngs):
        rank = settings.sizes(context.width)[1]
        super().__init__(settings, context, "sigmoid", rank, rngs=rngs)
        heads, width = settings.groups, context.width
        keys = heads * self.key_dim
        self.decay = LowRank(width, rank, keys, bias=False, rngs=rngs)
        if settings.gates == "head":
            self.beta = Dense(width, heads, axes=("embed", "heads"), rngs=rngs)
            self.write = None
        else:
            self.beta = Dense(width, keys, axes=("embed", "heads"), rngs=rngs)
            self.write = Dense(width, heads * self.value_dim, axes=("embed", "heads"), rngs=rngs)
        bounded = settings.decay_bound is not None
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16)
        self.a_log = param(jnp.zeros(heads) if bounded else jnp.log(rates), ("heads",), "dynamics")
        self.dt_bias = param(dt_bias(rngs.params(), (keys,), 1e-3, 0.1), ("heads",), "dynamics")

    def gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array | None, Array | None]:
        rate = jnp.exp(self.a_log[...])[:, None]
        f = self._heads(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        if self.settings.decay_bound is None:
            log_decay = -rate * jax.nn.softplus(f)
        else:
            log_decay = self.settings.decay_bound * jax.nn.sigmoid(rate * f)
        beta = self._strength(self.beta(x))
        if self.write is None:
            return beta, log_decay, None
        return self._heads(beta), log_decay, jax.nn.sigmoid(self._heads(self.write(x)).astype(jnp.float32))
